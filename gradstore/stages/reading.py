"""Reading features as kernels and contributions take them, of rank-c factors the matrices that they stand for; and examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from gradstore.spec import MEAN_MEMBER
from gradstore.store.examples import Example, from_table
from gradstore.store.features import FeatureArray, FeatureSet, Piece


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


def members_of(feature_set: FeatureSet, member: str) -> list[FeatureSet]:
    """The set as the member has it whose kernel is meant, or, of the kernel of the mean of all, as each has it."""
    return [feature_set.of_member(name) for name in (feature_set.info.members if member == MEAN_MEMBER else [member])]


def next_mean(pieces: Iterator[Piece], array: FeatureArray, members: int) -> np.ndarray:
    """Rows of a group as kernels see them: the mean of the next pieces, one of each member; NaN where one is not valid."""
    total = full_rows(array, next(pieces).rows[array.name])
    if members == 1:
        return total
    total = total.copy()
    for piece in islice(pieces, members - 1):
        np.add(total, full_rows(array, piece.rows[array.name]), out=total)
    np.divide(total, members, out=total)
    return total


def examples_at(feature_set: FeatureSet, rows: Sequence[int]) -> list[Example]:
    """The examples of some rows of a set, in that order."""
    block_rows = feature_set.info.block_rows
    blocks = {row // block_rows for row in rows}
    tables = {block: from_table(feature_set.read_inputs(block)) for block in blocks}
    return [tables[row // block_rows][row % block_rows] for row in rows]
