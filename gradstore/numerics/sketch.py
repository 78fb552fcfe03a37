r"""A few numbers of every row, from which scores are estimated before a few rows are scored exactly (ADR 0021).

Under kernels that act inside a group a score is one inner product of whitened features, of all groups side by side:

.. math:: S[q, n] = \sum_j w_j \langle K_j \psi_{q,j}, \phi_{n,j} \rangle
    = \langle (w_j K_j^{1/2} \psi_{q,j})_j, (K_j^{1/2} \phi_{n,j})_j \rangle

The sketch keeps of the second factor its coordinates in R orthonormal directions U, those in which a sample of rows is largest:
z_n = U^T x_n, x_n the whitened row. Then <a_q, z_n> with a_q = U^T (w_j K_j^{1/2} psi_qj)_j estimates S for any weights, as
these are on the side of the query. U comes from inner products of the sample (Halko, Martinsson and Tropp, arXiv 0909.4061,
section 5.5, of a sample instead of random combinations).

N rows, S rows of the sample, D features of one group, R directions, Q queries, W queries under all weightings.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from jaxtyping import Float32, Float64, Int, Int8

from gradstore.numerics.generator import derive_key, normal
from gradstore.numerics.kernel import Damping, Spectrum

# Entries of levels that are turned to float32 at once: they stay in the processor's cache.
_ENTRIES_AT_ONCE: Final = 2**18
# Eigenvalues this far below the largest are rounding: their directions would be noise.
_NEGLIGIBLE: Final = 1e-6
# Dimensions of the random subspace beyond the rank, and powers of the Gram matrix that it is multiplied by.
_SPARE: Final = 64
_POWERS: Final = 4


def whitened(
    rows_ND: Float32[np.ndarray, "N D"], spectrum: Spectrum | None, damping: Damping | None
) -> Float32[np.ndarray, "N D"]:
    """Coordinates of K^(1/2) phi in the basis of a group's kernel; without a spectrum, of the identity, the rows themselves."""
    if spectrum is None or damping is None:
        return rows_ND
    half_D = np.sqrt(damping.inverse(spectrum.eigenvalues))
    return np.asarray(spectrum.basis.rotate(rows_ND) * half_D, np.float32)


def sample_combinations(gram_SS: Float32[np.ndarray, "S S"], rank: int, seed: int) -> Float64[np.ndarray, "S R"]:
    r"""Return the combinations of a sample's rows that are orthonormal and along which it is largest, largest first.

    .. math:: G = X X^T \approx V \Lambda V^T, \quad A = V_R \Lambda_R^{-1/2}, \quad U = X^T A

    Of a large sample the eigenvectors are those within a random subspace after a few powers of G (algorithms 4.4 and 5.3 of
    Halko et al.): the combinations are orthonormal all the same. Those beyond what the rows span are zero.

    Parameters
    ----------
    gram_SS
        Inner products of the whitened rows.
    rank
        R.
    seed
        That of the run.
    """
    size, width = len(gram_SS), rank + _SPARE
    if 2 * width >= size:
        eigenvalues_S, vectors_SS = np.linalg.eigh(gram_SS.astype(np.float64))
    else:
        basis_SL = normal(derive_key(seed, "sample", "sketch"), size, width).astype(np.float32)
        for _ in range(_POWERS):
            basis_SL = np.linalg.qr(gram_SS @ basis_SL)[0]
        moment_LL = basis_SL.T @ (gram_SS @ basis_SL)
        eigenvalues_S, rotation_LL = np.linalg.eigh(moment_LL.astype(np.float64))
        vectors_SS = basis_SL @ rotation_LL
    largest_R = eigenvalues_S[::-1][:rank]
    kept_R = largest_R > _NEGLIGIBLE * max(float(largest_R[0]), 0.0)
    lengths_R = np.sqrt(np.where(kept_R, largest_R, np.inf))
    return np.asarray(vectors_SS[:, ::-1][:, :rank] / lengths_R)


def directions(
    whitened_SD: Float32[np.ndarray, "S D"],
    combinations_SR: Float64[np.ndarray, "S R"],
    spectrum: Spectrum | None,
    damping: Damping | None,
) -> Float32[np.ndarray, "D R"]:
    """Return K^(1/2) U of one group: with it rows become their sketch, and queries what meets it."""
    coordinates_RD = combinations_SR.T @ whitened_SD
    if spectrum is not None and damping is not None:
        coordinates_RD = spectrum.basis.restore(coordinates_RD * np.sqrt(damping.inverse(spectrum.eigenvalues)))
    return np.ascontiguousarray(coordinates_RD.T, np.float32)


def estimated_scores(
    levels_NR: Int8[np.ndarray, "N R"], scales_N: Float32[np.ndarray, " N"], queries_WR: Float32[np.ndarray, "W R"]
) -> Float32[np.ndarray, "W N"]:
    """Inner products of queries with the rows that levels and their scales stand for; NaN where a scale is NaN."""
    import torch

    rows, width = levels_NR.shape
    size = max(1, _ENTRIES_AT_ONCE // width)
    piece = torch.empty((size, width))
    queries_RW = torch.from_numpy(np.ascontiguousarray(queries_WR.T))
    products_NW = torch.empty((rows, len(queries_WR)))
    levels = torch.from_numpy(levels_NR)
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        torch.mm(piece[: stop - start].copy_(levels[start:stop]), queries_RW, out=products_NW[start:stop])
    return np.ascontiguousarray((products_NW.numpy() * scales_N[:, None]).T)


def candidates(scores_QN: Float32[np.ndarray, "Q N"], largest: int, smallest: int) -> Int[np.ndarray, " X"]:
    """Rows of the ``largest`` largest or the ``smallest`` smallest estimates of some query, ascending; of none that is NaN."""
    (known,) = np.nonzero(np.isfinite(scores_QN).all(0))
    if largest + smallest >= len(known):
        return known
    order_QN = np.argpartition(scores_QN[:, known], (smallest - 1, len(known) - largest), axis=1)
    return np.asarray(
        known[np.unique(np.concatenate([order_QN[:, :smallest], order_QN[:, len(known) - largest :]], 1))]
    )


def needed_candidates(
    scores_WN: Float32[np.ndarray, "W N"], wanted_WK: Int[np.ndarray, "W K"], *, largest: bool
) -> Int[np.ndarray, "W K"]:
    """How many of the best estimates must be looked at until each of the wanted rows is among them."""
    sign = np.float32(1 if largest else -1)
    with np.errstate(invalid="ignore"):
        found = [
            [int((sign * scores_N >= sign * scores_N[row]).sum()) for row in wanted_K]
            for scores_N, wanted_K in zip(scores_WN, wanted_WK, strict=True)
        ]
    return np.array(found, np.int64).reshape(wanted_WK.shape)


def recalls(needed_WK: Int[np.ndarray, "W K"], k: int, ladder: Sequence[int]) -> list[float]:
    """Mean share of the best k rows that are found among some numbers of candidates; best first in ``needed_WK``."""
    return [float((needed_WK[:, :k] <= count).mean()) for count in ladder]
