"""Reading features as kernels and contributions take them: of rank-c factors the matrices that they stand for."""

from __future__ import annotations

import numpy as np

from gradstore.store.features import FeatureArray


def full_width(array: FeatureArray) -> int:
    """Features of a group as kernels see them."""
    return sum(part.shape[0] * part.shape[1] for part in array.parts) if is_factored(array) else array.features


def full_rows(array: FeatureArray, rows_NK: np.ndarray) -> np.ndarray:
    """Rows of a group as kernels see them."""
    from gradstore.numerics.factors import expand

    if not is_factored(array):
        return rows_NK
    shapes = [part.shape for part in array.parts]
    return expand(rows_NK, shapes, [part.factors or 0 for part in array.parts])


def inner_products(array: FeatureArray, queries_QK: np.ndarray, rows_NK: np.ndarray) -> np.ndarray:
    """Inner products [Q, N] of what rank-c factors stand for, which are not multiplied out."""
    from gradstore.numerics import factors

    shapes = [part.shape for part in array.parts]
    return factors.inner_products(queries_QK, rows_NK, shapes, [part.factors or 0 for part in array.parts])


def is_factored(array: FeatureArray) -> bool:
    """Whether a group's features are rank-c factors."""
    return any(part.factors is not None for part in array.parts)
