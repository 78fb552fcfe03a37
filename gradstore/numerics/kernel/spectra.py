"""The spectrum of one group: eigenvalues, and the basis that they are in. Damping comes when it is applied.

D features of a group, N or Q rows of them; R and S the sides of a part's matrix.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64

from gradstore.errors import DataError
from gradstore.numerics.kernel.damping import Damping

# Where only a number of each row, or a sum over them, is kept: rows that are multiplied with vectors at once, which are read
# each time; and entries of rows whose parts are multiplied with small matrices, which stay in the processor's cache.
ROWS_AT_ONCE = 512
ENTRIES_AT_ONCE = 2**17


@dataclass(frozen=True, slots=True)
class Standard:
    """The features themselves: K is a diagonal matrix."""

    def rotate(self, rows_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """Return the rows as they are."""
        return rows_ND

    def restore(self, coordinates_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """Return the coordinates as they are."""
        return coordinates_ND


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """Orthonormal vectors, one a column."""

    vectors: Float[np.ndarray, "D D"]

    def rotate(self, rows_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """Coordinates Phi V of rows, in the precision of the vectors."""
        return np.asarray(rows_ND.astype(self.vectors.dtype, copy=False) @ self.vectors)

    def restore(self, coordinates_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """The rows whose coordinates these are, in the precision of the vectors."""
        return np.asarray(coordinates_ND.astype(self.vectors.dtype, copy=False) @ self.vectors.T)


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    r"""Kronecker products of two orthonormal bases for each part, whose features are a matrix F, row by row.

    .. math:: (U_G \otimes U_A)^T \mathrm{vec}(F) = \mathrm{vec}(U_G^T F U_A)

    Attributes
    ----------
    parts
        (U_G [R, R], U_A [S, S]) of every part, in the order of their features; vectors in columns.
    """

    parts: tuple[tuple[Float[np.ndarray, "_ _"], Float[np.ndarray, "_ _"]], ...]

    def rotate(self, rows_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """Coordinates U_G^T F U_A of every part of rows, in the precision of the bases."""
        return _between(rows_ND, self.parts)

    def restore(self, coordinates_ND: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
        """The rows U_G C U_A^T whose coordinates these are, in the precision of the bases."""
        return _between(coordinates_ND, tuple((left.T, right.T) for left, right in self.parts))


Basis = Standard | Vectors | Kronecker


def _between(rows_ND: np.ndarray, parts: tuple[tuple[np.ndarray, np.ndarray], ...]) -> np.ndarray:
    """left^T F right of every part of every row."""
    rows, dtype = len(rows_ND), parts[0][0].dtype
    result_ND = np.empty(rows_ND.shape, dtype)
    start = 0
    for left_RR, right_SS in parts:
        r, s = len(left_RR), len(right_SS)
        stop = start + r * s
        matrices_MS = rows_ND[:, start:stop].astype(dtype, copy=False).reshape(-1, s) @ right_SS
        result_ND[:, start:stop] = (left_RR.T @ matrices_MS.reshape(rows, r, s)).reshape(rows, r * s)
        start = stop
    return result_ND


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spectrum:
    r"""A group's kernel but for its damping.

    .. math:: K = V \,\mathrm{diag}\left(\frac{1}{s + \lambda}\right) V^T

    Attributes
    ----------
    eigenvalues
        s, none negative, in the order of the basis.
    basis
        V.
    """

    eigenvalues: Float64[np.ndarray, " D"]
    basis: Basis

    def precondition(self, rows_QD: Float[np.ndarray, "Q D"], damping: Damping) -> Float32[np.ndarray, "Q D"]:
        """Return K psi of every row, in the precision of the basis until the end."""
        # In float64: of very small features the inverse passes the largest float32, its product with them does not.
        coordinates_QD = self.basis.rotate(rows_QD) * damping.inverse(self.eigenvalues)
        return np.asarray(self.basis.restore(coordinates_QD), dtype=np.float32)

    def self_influence(self, rows_ND: Float[np.ndarray, "N D"], damping: Damping) -> Float64[np.ndarray, " N"]:
        r"""Return <K phi, phi> of every row, which no kernel makes negative; NaN of a row that is not finite.

        .. math:: \tau(n, n) = \sum_d \frac{(V^T \phi_n)_d^2}{s_d + \lambda}
        """
        inverse_D = damping.inverse(self.eigenvalues)
        found = [squares_ND @ inverse_D for squares_ND in squared_coordinates(self.basis, rows_ND)]
        return np.concatenate(found) if found else np.zeros(0)


class SquareSum:
    """Sums over rows of their squared coordinates in a basis, in float64: rows come in any number of pieces.

    Parameters
    ----------
    basis
        The basis.
    width
        D.
    """

    def __init__(self, basis: Basis, width: int) -> None:
        self._basis = basis
        self._total_D = np.zeros(width)

    def add(self, rows_ND: Float[np.ndarray, "N D"]) -> None:
        """Take in rows; those that are not valid must be zero."""
        for squares_ND in squared_coordinates(self._basis, rows_ND):
            self._total_D += squares_ND.sum(0)

    def total(self) -> Float64[np.ndarray, " D"]:
        """Return the sums over all rows so far.

        Raises
        ------
        DataError
            If they are not finite.
        """
        refuse_not_finite(self._total_D, "sum of squares")
        return self._total_D


def refuse_not_finite(values: Float64[np.ndarray, "..."], what: str) -> None:
    """Refuse a sum over features that is not finite.

    Raises
    ------
    DataError
        Naming ``what`` it is.
    """
    if not np.isfinite(values).all():
        raise DataError(
            f"{what}: it holds NaN or infinite values, so some row of the features does, or their products pass the largest "
            "float32. Rows that are not valid must be left out before the kernel is built: `gradstore verify` names what is "
            'not as it was written. Of very large features set kernel.spectra = "float64", or scale the output function.'
        )


def squared_coordinates(basis: Basis, rows_ND: np.ndarray) -> Iterator[np.ndarray]:
    """Squared coordinates of rows, float64 [some, D] at a time."""
    at_once = ROWS_AT_ONCE if isinstance(basis, Vectors) else max(ENTRIES_AT_ONCE // rows_ND.shape[1], 1)
    for start in range(0, len(rows_ND), at_once):
        coordinates_ND = basis.rotate(rows_ND[start : start + at_once]).astype(np.float64)
        yield np.square(coordinates_ND, out=coordinates_ND)
