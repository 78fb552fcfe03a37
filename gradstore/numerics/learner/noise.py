"""Contributions with noise, to see what the weights that are learned from them owe to chance (arXiv 2506.05647, C.3)."""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import numpy as np
from jaxtyping import Float32, Float64, Int64

from gradstore.errors import SpecError
from gradstore.numerics.generator import derive_key, stretches
from gradstore.numerics.learner.algorithm import refuse_non_finite
from gradstore.numerics.learner.kept import Piece

# Q queries, N rows of a piece, M groups, P pairs of numbers.

# Of a counter of the generator, which gives four words of 64 bits.
NUMBERS_PER_COUNTER = 8
# What becomes of so many rows fits in a core's cache.
ROWS_AT_ONCE = 256


def deviations(read: Callable[[], Iterable[Piece]]) -> Float64[np.ndarray, " M"]:
    """Standard deviation sigma_j of every group's contributions over all queries and rows, in one read of C.

    Means and squares around them are float64, and of slices that are joined, so that nothing cancels.

    Raises
    ------
    SpecError
        If there is no query or no row.
    DataError
        If C holds NaN or infinite values.
    """
    count, mean_M, squares_M = 0, np.zeros(()), np.zeros(())
    for first, rows_N, c_QNM in read():
        for query, c_NM in enumerate(c_QNM, first):
            for start in range(0, len(c_NM), ROWS_AT_ONCE):
                apart_NM = c_NM[start : start + ROWS_AT_ONCE].astype(np.float64)
                slice_mean_M = apart_NM.mean(0)
                if not np.isfinite(slice_mean_M).all():
                    refuse_non_finite(c_NM, query, rows_N)
                apart_NM -= slice_mean_M
                # Chan, Golub and LeVeque, The American Statistician 37 (1983), eq. 2.1.
                between_M, total = slice_mean_M - mean_M, count + len(apart_NM)
                squares_M = squares_M + np.einsum("nm,nm->m", apart_NM, apart_NM)
                squares_M += between_M**2 * (count * len(apart_NM) / total)
                mean_M = mean_M + between_M * (len(apart_NM) / total)
                count = total
    if not count:
        raise SpecError("data.learn: found no contributions; noise is measured by at least 1 query and 1 training row.")
    return np.asarray(np.sqrt(squares_M / count))


def noisy(
    read: Callable[[], Iterable[Piece]], deviation_M: Float64[np.ndarray, " M"], seed: int
) -> Callable[[], Iterator[Piece]]:
    """A reader of C + noise, the same at each read: see `with_noise`. Its pieces are of one query each.

    Parameters
    ----------
    read
        Reads C once.
    deviation_M
        Standard deviation of each group's noise: s sigma_j in the paper.
    seed
        Of the noise.
    """

    def noisy_read() -> Iterator[Piece]:
        for first, rows_N, c_QNM in read():
            for query, c_NM in enumerate(c_QNM, first):
                yield query, rows_N, with_noise(c_NM, deviation_M, query=query, rows_N=rows_N, seed=seed)[None]

    return noisy_read


def with_noise(
    c_NM: Float32[np.ndarray, "N M"],
    deviation_M: Float64[np.ndarray, " M"],
    *,
    query: int,
    rows_N: Int64[np.ndarray, " N"],
    seed: int,
) -> Float32[np.ndarray, "N M"]:
    """Some rows of C_q + independent normal numbers, which follow from seed, query, row and group alone.

    Numbers have 32 random bits each, so that none is farther than 6.8 deviations from 0, and are float32: the same wherever
    logarithm, sine and cosine are.
    """
    noisy_NM = np.empty_like(c_NM)
    counters = -(-c_NM.shape[1] // NUMBERS_PER_COUNTER)
    scale_M = deviation_M.astype(np.float32)
    gaps = np.flatnonzero(np.diff(rows_N, prepend=-2) != 1).tolist()
    pieces = [
        (place, min(place + ROWS_AT_ONCE, stop))
        for start, stop in pairwise([*gaps, len(rows_N)])
        for place in range(start, stop, ROWS_AT_ONCE)
    ]
    spans = [(int(rows_N[start]) * counters, (int(rows_N[start]) + stop - start) * counters) for start, stop in pieces]
    words = stretches(derive_key(seed, "learner", f"noise of query {query}"), spans)
    for (start, stop), words_W in zip(pieces, words, strict=True):
        standard_NM = _normal(words_W.astype("<u8", copy=False).view("<u4")).reshape(stop - start, -1)
        np.multiply(standard_NM[:, : c_NM.shape[1]], scale_M, out=noisy_NM[start:stop])
    noisy_NM += c_NM
    return noisy_NM


def _normal(words_W: np.ndarray) -> Float32[np.ndarray, " _"]:
    """Standard normal numbers (Box-Muller), one for every 32 random bits."""
    words_P2 = words_W.reshape(-1, 2).astype(np.float32)
    # Half a step above 0, so that the logarithm is finite.
    radius_P = np.sqrt(-2 * np.log((words_P2[:, 0] + np.float32(0.5)) * np.float32(2.0**-32)))
    angle_P = words_P2[:, 1] * np.float32(2 * np.pi * 2.0**-32)
    normal_P2 = np.stack([radius_P * np.cos(angle_P), radius_P * np.sin(angle_P)], axis=1)
    return np.asarray(normal_P2.reshape(-1))
