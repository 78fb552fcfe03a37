"""What Algorithm 1 needs of C that can be summed or chosen as C streams by: A_q, and the rows that score best."""

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

from gradstore.numerics.learner import placing_scores
from gradstore.numerics.scores import Transform

# Q queries, N rows of one block, M groups, K rows kept per query.

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
