r"""The kernel across all groups (TRAK): what is left of it, per group, once it has met the queries.

Whatever its route, contributions are

.. math:: C[q, n, j] = a \langle \psi_{qj}, \phi_{nj} \rangle + \sum_p L[q, j, p] R[n, p]

with coefficients L of the query and coordinates R of the row (ADR 0016). Here are a, L and what of the kernel's own they
come from: eigenvalues of Phi^T Phi or, which are the same but for zeros, of Phi Phi^T.

Shapes: Q queries, N examples, M groups, D features of all groups together, d of one, P coordinates, R eigenvectors.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float64

from gradstore.errors import SpecError
from gradstore.numerics.kernel.damping import DampedKernel, Damping
from gradstore.numerics.kernel.gram import ROWS_PER_PRODUCT
from gradstore.numerics.kernel.protocol import BasisName

# Rows and columns that are mirrored at once.
_TILE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(DampedKernel):
    r"""Inverse of the damped Gram matrix of all groups' features side by side (TRAK, arXiv 2303.14186).

    .. math:: K = (\Phi^T \Phi + \lambda I)^{-1}, \quad C_j = \Psi_j [K \Phi^T]_j

    K mixes groups, so that C is split after the product. Relative damping is a ratio to the mean of all D eigenvalues.

    Attributes
    ----------
    spectra
        Stored type of what the kernel is made of but for eigenvalues, which are float64; and of the products that it comes
        from, which are of few rows each and summed in float64.
    route
        ``primal`` (eigenvectors of Phi^T Phi [D, D]) and ``dual`` (of Phi Phi^T [N, N]) are exact, ``low_rank`` (those of
        the largest eigenvalues of Phi^T Phi, from a random subspace) is so at full rank; ``auto`` is the first that fits.
    rank, iterations, oversample
        Of ``low_rank``: eigenvectors that are kept, power iterations, and dimensions of the subspace beyond the rank.
    """

    needs_spectra: ClassVar[bool] = True
    across_groups: ClassVar[bool] = True
    basis: ClassVar[BasisName | None] = None
    spectra: Literal["float32", "float64"] = "float32"
    route: Literal["auto", "primal", "dual", "low_rank"] = "auto"
    rank: int = 512
    iterations: int = 2
    oversample: int = 16

    def __post_init__(self) -> None:
        DampedKernel.__post_init__(self)
        for name, least in (("rank", 1), ("iterations", 1), ("oversample", 0)):
            if getattr(self, name) < least:
                raise SpecError(f"kernel.{name}: found {getattr(self, name)}; accepted: {least} or more.")


class Coefficients(NamedTuple):
    """What the kernel makes of queries."""

    scale: float
    """a."""
    values: Float64[np.ndarray, "Q M P"]
    """L."""
    selves: Float64[np.ndarray, "Q M"]
    """Contribution of every query, as if it were an example too, to its own attribution: its self-influence."""


def add_row_gram(
    gram_NN: Float64[np.ndarray, "N1 N2"], first_ND: Float[np.ndarray, "N1 D"], second_ND: Float[np.ndarray, "N2 D"]
) -> None:
    """Add the inner products of two lots of rows in place: products of few features in their type, summed in float64."""
    for start in range(0, first_ND.shape[1], ROWS_PER_PRODUCT):
        piece = slice(start, start + ROWS_PER_PRODUCT)
        gram_NN += first_ND[:, piece] @ second_ND[:, piece].T


def mirror(symmetric_NN: Float64[np.ndarray, "N N"]) -> None:
    """Fill what is below the diagonal with what is above it, in place."""
    for start in range(0, len(symmetric_NN), _TILE):
        stop = start + _TILE
        tile = symmetric_NN[start:stop, start:stop]
        tile[...] = np.triu(tile) + np.triu(tile, 1).T
        symmetric_NN[stop:, start:stop] = symmetric_NN[start:stop, stop:].T


def primal_coefficients(
    query_QD: Float[np.ndarray, "Q D"],
    edges: Sequence[int],
    vectors_DD: Float64[np.ndarray, "D D"],
    inverse_D: Float64[np.ndarray, " D"],
    kernel_DD: Float64[np.ndarray, "D D"],
) -> Coefficients:
    """Return a = 0 and L[q, j] = K psi_q with all but group j of psi_q zero; the coordinates of a row are its features.

    Parameters
    ----------
    query_QD, edges
        psi_q; group j is of the features from ``edges[j]`` up to ``edges[j + 1]``.
    vectors_DD, inverse_D
        V, and 1 / (s + lambda), of all eigenvectors: queries need not be in the span of the rows.
    kernel_DD
        K as far as it meets rows: what `kernel_matrix` makes.
    """
    query_QD = query_QD.astype(np.float64, copy=False)
    values_QMD = np.stack([query_QD[:, first:last] @ kernel_DD[first:last] for first, last in pairwise(edges)], 1)
    answer_QD = (query_QD @ vectors_DD) * inverse_D
    own = [
        np.einsum("qd,qd->q", query_QD[:, first:last] @ vectors_DD[first:last], answer_QD)
        for first, last in pairwise(edges)
    ]
    return Coefficients(0.0, values_QMD, np.stack(own, 1))


def kernel_matrix(
    vectors_DR: Float64[np.ndarray, "D R"], inverse_R: Float64[np.ndarray, " R"]
) -> Float64[np.ndarray, "D D"]:
    """K = V diag(1 / (s + lambda)) V^T: of all eigenvectors, or of those that `hold_rows`."""
    result: np.ndarray = (vectors_DR * inverse_R) @ vectors_DR.T
    return result


def hold_rows(eigenvalues_R: Float64[np.ndarray, " R"], num_rows: int, shift: float) -> bool:
    r"""Whether K is to leave out, where it meets a row that it is built from, all but the largest ``num_rows`` eigenvectors.

    The rows are in their span, so that the others count nothing, and 1 / lambda times a product that is zero but for rounding
    is what is lost by taking them. What is lost by leaving them out is what rounding has mixed with them of the last
    that is taken. With eps the rounding of a product, these are, relative to C,

    .. math:: \epsilon \frac{s_{max}}{\lambda} \quad \text{and} \quad
        \epsilon \sqrt{\frac{s_{max}}{s_{min}}} \frac{s_{max}}{s_{min} + \lambda}

    Parameters
    ----------
    eigenvalues_R
        s, the largest or all, in any order.
    num_rows
        Rows that the kernel is built from; of more than there are features the number of these.
    shift
        lambda.
    """
    if not 0 < num_rows <= len(eigenvalues_R):
        return False
    descending_R = np.sort(eigenvalues_R)[::-1]
    most, least = float(descending_R[0]), float(descending_R[num_rows - 1])
    return least > 0 and shift * math.sqrt(most / least) <= least + shift


def low_rank_coefficients(
    rotated_QMR: Float64[np.ndarray, "Q M R"],
    squares_QM: Float64[np.ndarray, "Q M"],
    eigenvalues_R: Float64[np.ndarray, " R"],
    shift: float,
    *,
    held: int | None = None,
) -> Coefficients:
    r"""Return a = 1 / lambda and L[q, j] = -(s / (s + lambda)) psi_qj V_j / lambda; coordinates of a row are phi V.

    .. math:: K = \frac{1}{\lambda} \left( I - V \operatorname{diag}\left(\frac{s}{s + \lambda}\right) V^T \right)

    Where the largest eigenvectors hold the rows, a is 0 and L[q, j] = psi_qj V_j / (s + lambda) of these: what they do not
    capture of a row is nothing.

    Parameters
    ----------
    rotated_QMR
        psi_qj V_j, with the rows of the eigenvectors V that are group j's.
    squares_QM
        Squared norms of psi_qj.
    eigenvalues_R
        s, descending.
    shift
        lambda.
    held
        How many of the eigenvectors `hold_rows`; None if they do not.
    """
    if shift == 0:
        return Coefficients(0.0, np.zeros_like(rotated_QMR), np.zeros_like(squares_QM))
    values_QMR = rotated_QMR * (-eigenvalues_R / (eigenvalues_R + shift) / shift)
    selves_QM = squares_QM / shift + np.einsum("qmr,qr->qm", values_QMR, rotated_QMR.sum(1))
    if held is not None:
        rotated_QMR = np.where(np.arange(len(eigenvalues_R)) < held, rotated_QMR, 0)
        return Coefficients(0.0, rotated_QMR / (eigenvalues_R + shift), selves_QM)
    return Coefficients(1 / shift, values_QMR, selves_QM)


def dual_coefficients(
    rotated_QMR: Float64[np.ndarray, "Q M R"],
    squares_QM: Float64[np.ndarray, "Q M"],
    eigenvalues_R: Float64[np.ndarray, " R"],
    mean: float,
    damping: Damping,
) -> Coefficients:
    r"""Return a = 0 and L[q, j] = psi_qj Phi_j^T U / (g + lambda); coordinates of a row are its row of U.

    .. math:: K \Phi^T = \Phi^T (\Phi \Phi^T + \lambda I)^{-1} = \Phi^T U \operatorname{diag}\left(\frac{1}{g + \lambda}\right) U^T

    Nothing is divided by g alone, so that eigenvalues of zero do no harm.

    Parameters
    ----------
    rotated_QMR
        psi_qj Phi_j^T U, with the eigenvectors U of Phi Phi^T.
    squares_QM
        Squared norms of psi_qj.
    eigenvalues_R, mean
        g, and the mean of all D eigenvalues of Phi^T Phi: its trace by D.
    damping
        lambda, or its ratio to the mean.
    """
    shift = damping.shift(eigenvalues_R, mean)
    if shift == 0:
        return Coefficients(0.0, np.zeros_like(rotated_QMR), np.zeros_like(squares_QM))
    values_QMR = rotated_QMR / (eigenvalues_R + shift)
    own_QM = np.einsum("qmr,qr->qm", values_QMR, rotated_QMR.sum(1))
    return Coefficients(0.0, values_QMR, (squares_QM - own_QM) / shift)


def primal_self_influence(
    features_ND: Float[np.ndarray, "N D"],
    edges: Sequence[int],
    vectors_DR: Float[np.ndarray, "D R"],
    inverse_R: Float64[np.ndarray, " R"],
) -> Float64[np.ndarray, "N M"]:
    """Self-influence tau_j(n, n) = <phi_nj, (K phi_n)_j> of rows, per group, with K = V diag(inverse) V^T: see `hold_rows`."""
    own_ND = ((features_ND @ vectors_DR) * inverse_R) @ vectors_DR.T * features_ND
    return np.stack([own_ND[:, first:last].sum(1) for first, last in pairwise(edges)], 1)


def low_rank_self_influence(
    squares_N: Float64[np.ndarray, " N"],
    products_NR: Float64[np.ndarray, "N R"],
    eigenvalues_R: Float64[np.ndarray, " R"],
    shift: float,
    *,
    held: int | None = None,
) -> Float64[np.ndarray, " N"]:
    r"""Self-influence of rows in one group.

    .. math:: \tau_j(n, n) = \frac{1}{\lambda} \left( |\phi_{nj}|^2 - \sum_r \frac{s_r}{s_r + \lambda} (\phi_{nj} V_j)_r (\phi_n V)_r \right)

    Parameters
    ----------
    squares_N
        Squared norms of phi_nj.
    products_NR
        phi_nj V_j times phi_n V, entry by entry.
    eigenvalues_R
        s, descending.
    shift
        lambda; where it is 0, as of features that are all zero, so is the result.
    held
        How many of the eigenvectors `hold_rows`; None if they do not. Nothing is left of the squares beside these.
    """
    if shift == 0:
        return np.zeros_like(squares_N)
    if held is not None:
        return np.asarray(products_NR[:, :held] @ (1 / (eigenvalues_R[:held] + shift)))
    return np.asarray((squares_N - products_NR @ (eigenvalues_R / (eigenvalues_R + shift))) / shift)
