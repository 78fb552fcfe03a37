"""Gram matrices Phi^T Phi, summed over pieces of rows, and their spectra."""

from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Float32, Float64

from gradstore.numerics.kernel.spectra import Spectrum, Vectors, refuse_not_finite

ROWS_PER_PRODUCT = 2048
# Columns of a tile of a Gram matrix: as wide as the half of a product that is not computed is worth more than its calls.
TILE = 1024


class GramSum:
    """The Gram matrix Phi^T Phi of rows that come in any number of pieces.

    Rows are gathered until there are 2,048, since small products cost as much in adding them up; their products are of the
    rows' precision, the sum over them is float64. Only one of two tiles that mirror each other is computed.

    Parameters
    ----------
    width
        D.
    dtype
        Precision of the products.
    """

    def __init__(self, width: int, dtype: npt.DTypeLike = np.float32) -> None:
        self._gram_DD = np.zeros((width, width))
        self._gathered_ND = np.empty((ROWS_PER_PRODUCT, width), dtype)
        self._count = 0

    def add(self, rows_ND: Float[np.ndarray, "N D"]) -> None:
        """Take in rows; those that are not valid must be zero."""
        taken = 0
        while taken < len(rows_ND):
            piece_ND = rows_ND[taken : taken + ROWS_PER_PRODUCT - self._count]
            taken += len(piece_ND)
            if len(piece_ND) == ROWS_PER_PRODUCT and piece_ND.dtype == self._gathered_ND.dtype:
                self._multiply(piece_ND)
                continue
            self._gathered_ND[self._count : self._count + len(piece_ND)] = piece_ND
            self._count += len(piece_ND)
            if self._count == ROWS_PER_PRODUCT:
                self._multiply_gathered()

    def total(self) -> Float64[np.ndarray, "D D"]:
        """Return the Gram matrix of all rows so far: symmetric, and the sum's own memory."""
        self._multiply_gathered()
        width = len(self._gram_DD)
        for start in range(0, width, TILE):
            stop = min(start + TILE, width)
            self._gram_DD[stop:, start:stop] = self._gram_DD[start:stop, stop:].T
        return self._gram_DD

    def _multiply_gathered(self) -> None:
        self._multiply(self._gathered_ND[: self._count])
        self._count = 0

    def _multiply(self, rows_ND: np.ndarray) -> None:
        # What passes the largest number is told once for the whole sum (`refuse_not_finite`).
        with np.errstate(over="ignore", invalid="ignore"):
            _add_product(self._gram_DD, rows_ND)


def _add_product(gram_DD: np.ndarray, rows_ND: np.ndarray) -> None:
    """Add the tiles of Phi^T Phi on and above its diagonal."""
    width = len(gram_DD)
    for start in range(0, width, TILE):
        left_NT = rows_ND[:, start : start + TILE]
        # numpy sees that both factors are one array, and computes half of the symmetric product.
        gram_DD[start : start + TILE, start : start + TILE] += left_NT.T @ left_NT
        for other in range(start + TILE, width, TILE):
            gram_DD[start : start + TILE, other : other + TILE] += left_NT.T @ rows_ND[:, other : other + TILE]


def zero_invalid(features_ND: Float32[np.ndarray, "N D"]) -> None:
    """Set rows that are not valid, which hold NaN, to 0 in place: they add nothing to a Gram matrix or a product."""
    features_ND[~np.isfinite(features_ND).all(1)] = 0


def spectrum(gram_DD: Float64[np.ndarray, "D D"]) -> Spectrum:
    """Eigenvalues, raised to 0 where rounding made them negative, and eigenvectors of a Gram matrix, both float64.

    Raises
    ------
    DataError
        If the Gram matrix is not finite.
    """
    eigenvalues_D, vectors_DD = decomposed(gram_DD, "Gram matrix")
    return Spectrum(eigenvalues=np.maximum(eigenvalues_D, 0), basis=Vectors(vectors_DD))


def decomposed(symmetric_DD: Float64[np.ndarray, "D D"], what: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix.

    Raises
    ------
    DataError
        If it is not finite, naming ``what`` it is.
    """
    refuse_not_finite(symmetric_DD, what)
    eigenvalues_D, vectors_DD = np.linalg.eigh(symmetric_DD)
    return eigenvalues_D, vectors_DD
