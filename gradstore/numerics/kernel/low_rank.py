"""The largest eigenvalues of Phi^T Phi and their eigenvectors, from a random subspace.

Randomized subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.3): Y = Phi^T (Phi Q) is
summed over blocks of rows and made orthonormal again, a few times; then the small matrix (Phi Q)^T (Phi Q) is decomposed.

Shapes: N examples, D features of all groups together, d of one, L dimensions of the subspace, R eigenvectors that are kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from gradstore.numerics.generator import derive_key, normal
from gradstore.numerics.kernel.gram import ROWS_PER_PRODUCT

# Rows that are decomposed at once.
_PIECE_ROWS = 8192


class RitzPairs(NamedTuple):
    """Approximate eigenvalues, and their eigenvectors in the coordinates of an orthonormal basis."""

    eigenvalues: Float64[np.ndarray, " R"]
    """Descending, none negative."""
    rotation: Float64[np.ndarray, "L R"]
    """In columns: with the basis Q [D, L], Q times this are the eigenvectors."""


def random_basis(seed: int, groups: Sequence[tuple[str, int]], dimensions: int) -> Float64[np.ndarray, "D L"]:
    """Normal draws of every (group, features), one after another, keyed by the group's name: their order changes no draw."""
    drawn = [normal(derive_key(seed, name, "full kernel"), width, dimensions) for name, width in groups]
    return np.concatenate(drawn)


def add_power(
    sum_DL: Float64[np.ndarray, "D L"], features_ND: Float[np.ndarray, "N D"], basis_DL: Float[np.ndarray, "D L"]
) -> None:
    """Add Phi^T (Phi Q) of some rows in place: products of few rows in their type, summed in float64."""
    for start in range(0, len(features_ND), ROWS_PER_PRODUCT):
        piece_ND = features_ND[start : start + ROWS_PER_PRODUCT]
        projected_NL = coordinates(piece_ND, basis_DL).astype(basis_DL.dtype)
        # A few features at a time: the product itself would take as much memory as the sum.
        for first in range(0, piece_ND.shape[1], _PIECE_ROWS):
            last = first + _PIECE_ROWS
            sum_DL[first:last] += piece_ND[:, first:last].T @ projected_NL


def orthonormalize(values_DL: Float64[np.ndarray, "D L"]) -> None:
    """Replace columns by an orthonormal basis of what they span, in place; where they span less, the last ones are zero.

    They are decomposed piece by piece (a QR of stacked QR factors), so that nothing of their size is needed beside them, and
    twice, since dividing by small singular values loses orthogonality once.
    """
    for _ in range(2):
        factor_LL: np.ndarray = np.zeros((0, values_DL.shape[1]))
        for start in range(0, len(values_DL), _PIECE_ROWS):
            piece_DL = values_DL[start : start + _PIECE_ROWS]
            factor_LL = np.asarray(np.linalg.qr(np.concatenate([factor_LL, piece_DL]), mode="r"))
        _, singular_L, right_LL = np.linalg.svd(factor_LL, full_matrices=True)
        scale_L = np.zeros(values_DL.shape[1])
        spanned = singular_L > max(values_DL.shape) * np.finfo(np.float64).eps * singular_L.max(initial=0)
        scale_L[: len(singular_L)][spanned] = 1 / singular_L[spanned]
        turned_LL = right_LL.T * scale_L
        for start in range(0, len(values_DL), _PIECE_ROWS):
            piece = slice(start, start + _PIECE_ROWS)
            values_DL[piece] = values_DL[piece] @ turned_LL


def coordinates(
    features_ND: Float[np.ndarray, "N D"], basis_DL: Float[np.ndarray, "D L"]
) -> Float64[np.ndarray, "N L"]:
    """Return Phi Q of some rows: products of few features in their type, summed in float64."""
    result_NL = np.zeros((len(features_ND), basis_DL.shape[1]))
    for start in range(0, len(basis_DL), ROWS_PER_PRODUCT):
        piece = slice(start, start + ROWS_PER_PRODUCT)
        result_NL += features_ND[:, piece] @ basis_DL[piece]
    return result_NL


def ritz_pairs(moment_LL: Float64[np.ndarray, "L L"], rank: int) -> RitzPairs:
    """Return the ``rank`` largest eigenvalues of (Phi Q)^T (Phi Q), and their eigenvectors."""
    eigenvalues_L, rotation_LL = np.linalg.eigh(moment_LL)
    kept = slice(None, -rank - 1, -1)
    return RitzPairs(np.maximum(eigenvalues_L[kept], 0), np.ascontiguousarray(rotation_LL[:, kept]))
