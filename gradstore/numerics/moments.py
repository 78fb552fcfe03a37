"""What Algorithm 1 needs of C that can be summed or chosen as C streams by: A_q, and the rows that score best."""

from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from gradstore.numerics.learner import KeptRows, Piece, placing_scores, refuse_non_finite
from gradstore.numerics.learner.kept import exact_scores, top_rows
from gradstore.numerics.scores import Transform

# Q queries, N rows of one block, M groups, K rows kept per query, H of a block's rows that may be among these.

# Rows of a float32 product; their sums are float64.
ROWS_PER_PRODUCT = 2048
# Where there is no further row.
NO_ROW = -1


def kept_rows(k: int) -> int:
    """Rows to keep of every query for the learner's top k: it finds most of what it will need among them."""
    return 6 * k if k <= 200 else -(-5 * k // 4)


class SecondMoments:
    r"""Sums of the products of contributions to one query, over rows.

    .. math:: A_q = C_q^T C_q, \quad \lVert S_q \rVert^2 = w^T A_q w

    Products of at most 2,048 rows are float32; their sum is float64.

    Parameters
    ----------
    num_queries, num_groups
        Q and M.
    """

    def __init__(self, *, num_queries: int, num_groups: int) -> None:
        self.total_QMM: Float64[np.ndarray, "Q M M"] = np.zeros((num_queries, num_groups, num_groups))

    def add(self, first: int, c_QNM: Float32[np.ndarray, "Q N M"]) -> None:
        """Add the rows of one block, of the queries from ``first`` on."""
        for query, c_NM in enumerate(c_QNM, first):
            for start in range(0, len(c_NM), ROWS_PER_PRODUCT):
                piece_NM = c_NM[start : start + ROWS_PER_PRODUCT]
                # numpy sees that both factors are one array, and computes half of the symmetric product.
                self.total_QMM[query] += piece_NM.T @ piece_NM


class Candidates:
    """Keeps, of every query, the rows with the best scores under given weights; of equal ones the first.

    Parameters
    ----------
    num_queries, kept
        Q and K.
    weights_M
        The weights.
    transform
        What scores are ranked by: see `placing_scores`.
    """

    def __init__(
        self, *, num_queries: int, kept: int, weights_M: Float64[np.ndarray, " M"], transform: Transform
    ) -> None:
        self._weights_M = weights_M.astype(np.float32)
        self._transform = transform
        self._score_QK = np.full((num_queries, kept), -np.inf, np.float32)
        self.rows_QK: Int64[np.ndarray, "Q K"] = np.full((num_queries, kept), NO_ROW)
        self.c_QKM: Float32[np.ndarray, "Q K M"] = np.full((num_queries, kept, len(weights_M)), np.nan, np.float32)

    def offer(self, first: int, c_QNM: Float32[np.ndarray, "Q N M"], rows_N: Int64[np.ndarray, " N"]) -> None:
        """Take in the rows of one block, of the queries from ``first`` on; later rows have higher numbers."""
        score_QN = placing_scores(c_QNM @ self._weights_M, self._transform)
        for query, (score_N, c_NM) in enumerate(zip(score_QN, c_QNM, strict=True), first):
            # A later row must beat the last that is kept, not equal it.
            better_B = np.flatnonzero(score_N > self._score_QK[query, -1])
            if len(better_B):
                self._keep(query, score_N[better_B], c_NM, better_B, rows_N[better_B])

    def _keep(
        self,
        query: int,
        score_B: Float[np.ndarray, " B"],
        c_NM: Float32[np.ndarray, "N M"],
        better_B: Int64[np.ndarray, " B"],
        rows_B: Int64[np.ndarray, " B"],
    ) -> None:
        kept = len(self._score_QK[query])
        score_X = np.concatenate([self._score_QK[query], score_B])
        order_K = _largest(score_X, kept)
        new_K = order_K >= kept
        self._score_QK[query] = score_X[order_K]
        self.rows_QK[query] = np.concatenate([self.rows_QK[query], rows_B])[order_K]
        # Those that stay move among themselves; those that are new come from the block.
        self.c_QKM[query, ~new_K] = self.c_QKM[query, order_K[~new_K]]
        self.c_QKM[query, new_K] = c_NM[better_B[order_K[new_K] - kept]]


def _largest(score_X: Float[np.ndarray, " X"], k: int) -> Int64[np.ndarray, " K"]:
    """Places of the k largest, largest first, of equal ones the first."""
    if len(score_X) > 4 * k:
        # Most are smaller than the k-th, and sorting them would cost more than finding it.
        least = np.partition(score_X, len(score_X) - k)[len(score_X) - k]
        places = np.flatnonzero(score_X >= least)
        return np.asarray(places[np.argsort(-score_X[places], kind="stable")[:k]])
    return np.asarray(np.argsort(-score_X, kind="stable")[:k])


def first_guess(
    read: Callable[[], Iterable[Piece]],
    weights_M: Float64[np.ndarray, " M"],
    *,
    count: int,
    transform: Transform,
    num_queries: int,
) -> tuple[Float64[np.ndarray, "Q M M"], KeptRows]:
    """A_q, and the rows of every query that score best under given weights, from one read of C: see `read_best_rows`.

    Memory is A_q, twice ``count`` rows of every query, and the scores of a piece.
    """
    second_moments = SecondMoments(num_queries=num_queries, num_groups=len(weights_M))

    def pieces() -> Iterable[Piece]:
        for first, rows_N, c_QNM in read():
            second_moments.add(first, c_QNM)
            yield first, rows_N, c_QNM

    kept = read_best_rows(pieces, weights_M, count=count, transform=transform, num_queries=num_queries)
    return second_moments.total_QMM, kept


def read_best_rows(
    read: Callable[[], Iterable[Piece]],
    weights_M: Float64[np.ndarray, " M"],
    *,
    count: int,
    transform: Transform,
    num_queries: int,
) -> KeptRows:
    """Of every query the rows that score best under given weights, from one read of C; of equal ones the first.

    They are chosen by float64 scores, so that no row is missing, whatever the pieces are.

    Parameters
    ----------
    read
        Reads C once: pieces in any order that together hold every valid row of every query once.
    weights_M
        The weights.
    count
        Rows to keep of every query: all, where there are no more.
    transform
        What scores are ranked by: see `placing_scores`.
    num_queries
        Q.

    Raises
    ------
    DataError
        If C holds NaN or infinite values.
    """
    best = [_BestRows(weights_M, count=count, transform=transform) for _ in range(num_queries)]
    for first, rows_N, c_QNM in read():
        for query, c_NM in enumerate(c_QNM, first):
            best[query].offer(query, rows_N, c_NM)
    chosen = [each.choose() for each in best]
    return KeptRows([rows_K for rows_K, _ in chosen], [c_KM for _, c_KM in chosen], num_groups=len(weights_M))


class _BestRows:
    """One query's best rows so far, and those collected since they were last chosen.

    Exact, and in any order of rows, as `Candidates` is not: these choose as C is built, at the speed of float32.
    """

    def __init__(self, weights_M: Float64[np.ndarray, " M"], *, count: int, transform: Transform) -> None:
        self._weights_M = weights_M
        self._count = count
        self._transform: Transform = transform
        self._least = -np.inf
        self._rows = [np.empty(0, np.int64)]
        self._placing = [np.empty(0)]
        self._c = [np.empty((0, len(weights_M)), np.float32)]

    def offer(self, query: int, rows_N: Int64[np.ndarray, " N"], c_NM: Float32[np.ndarray, "N M"]) -> None:
        placing_N = placing_scores(exact_scores(c_NM, self._weights_M[None])[:, 0], self._transform)
        if not np.isfinite(placing_N).all():
            refuse_non_finite(c_NM, query, rows_N)
        # An equal row may have a lower number.
        near_H = np.flatnonzero(placing_N >= self._least)
        self._rows.append(rows_N[near_H])
        self._placing.append(placing_N[near_H])
        self._c.append(c_NM[near_H])
        # Twice as many are held at most, beside a piece.
        if sum(map(len, self._rows)) >= 2 * self._count:
            self.choose()

    def choose(self) -> tuple[Int64[np.ndarray, " K"], Float32[np.ndarray, "K M"]]:
        rows_X = np.concatenate(self._rows)
        order_X = np.argsort(rows_X)
        placing_X = np.concatenate(self._placing)
        best_K = order_X[top_rows(placing_X[order_X, None], self._count)[:, 0]]
        self._rows, self._placing = [rows_X[best_K]], [placing_X[best_K]]
        self._c = [np.concatenate(self._c)[best_K]]
        if len(best_K) == self._count:
            self._least = self._placing[0].min()
        return self._rows[0], self._c[0]
