"""Rank-c factors of feature matrices: what they stand for, and their inner products without that."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32


def expand(
    stored_NK: Float32[np.ndarray, "N K"], shapes: Sequence[tuple[int, int]], factors: Sequence[int]
) -> Float32[np.ndarray, "N D"]:
    r"""The matrices that factors stand for, part after part, each flattened row by row.

    .. math:: F = \sum_{a=1}^{c} u_a v_a^T

    Parameters
    ----------
    stored_NK
        For every part u [c, r_o], then v [c, r_i]; N rows of them.
    shapes
        (r_o, r_i) of every part.
    factors
        c of every part.
    """
    result_ND = np.empty((len(stored_NK), sum(rows * columns for rows, columns in shapes)), np.float32)
    start = 0
    for (rows, columns), (u_NCR, v_NCS) in zip(shapes, _factors(stored_NK, shapes, factors), strict=True):
        matrix_NRS = result_ND[:, start : start + rows * columns].reshape(-1, rows, columns)
        np.matmul(u_NCR.transpose(0, 2, 1), v_NCS, out=matrix_NRS)
        result_ND[:, start : start + rows * columns] = matrix_NRS.reshape(len(stored_NK), -1)
        start += rows * columns
    return result_ND


def inner_products(
    left_QK: Float32[np.ndarray, "Q K"],
    right_NK: Float32[np.ndarray, "N K"],
    shapes: Sequence[tuple[int, int]],
    factors: Sequence[int],
) -> Float32[np.ndarray, "Q N"]:
    r"""Inner products of the matrices that factors stand for, of c^2 (r_o + r_i) products each instead of r_o r_i.

    .. math:: \langle F, F' \rangle = \sum_{a,b} (u_a \cdot u'_b)(v_a \cdot v'_b)
    """
    result_QN = np.zeros((len(left_QK), len(right_NK)), np.float32)
    pairs = zip(_factors(left_QK, shapes, factors), _factors(right_NK, shapes, factors), strict=True)
    for (u_QCR, v_QCS), (x_NCR, y_NCS) in pairs:
        for first in range(u_QCR.shape[1]):
            for second in range(x_NCR.shape[1]):
                result_QN += (u_QCR[:, first] @ x_NCR[:, second].T) * (v_QCS[:, first] @ y_NCS[:, second].T)
    return result_QN


def _factors(
    stored_NK: np.ndarray, shapes: Sequence[tuple[int, int]], factors: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(u [N, c, r_o], v [N, c, r_i]) of every part."""
    found, start = [], 0
    for (rows, columns), count in zip(shapes, factors, strict=True):
        middle, stop = start + count * rows, start + count * (rows + columns)
        u_NCR = stored_NK[:, start:middle].reshape(-1, count, rows)
        found.append((u_NCR, stored_NK[:, middle:stop].reshape(-1, count, columns)))
        start = stop
    return found
