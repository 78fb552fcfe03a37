"""The rows of C that are held in memory, and their scores in float64."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from gradstore.numerics.learner.algorithm import placing_scores, refuse_non_finite
from gradstore.numerics.scores import Transform

# Q queries, N rows asked about, K rows kept of a query, M groups, V vectors of weights.

Piece = tuple[int, Int64[np.ndarray, " N"], Float32[np.ndarray, "Q N M"]]
"""First query, numbers of the rows, and C of some queries from the first on."""

# Rows are turned to float64, or multiplied, in slices of this size.
SLICE_BYTES = 2 * 2**20


class KeptRows:
    """Rows of C kept of every query, in the order of their numbers. Rows are added, never taken away.

    Parameters
    ----------
    rows, c
        For every query the numbers of its rows [K] and these rows of C_q [K, M], as they are stored: any number of rows, or
        none. That they are rows of the C that is read is not checked. Numbers below 0 stand for no row
        (`gradstore.numerics.moments.NO_ROW`).
    num_groups
        M.
    """

    def __init__(
        self, rows: Sequence[Int64[np.ndarray, " _"]], c: Sequence[Float32[np.ndarray, "_ M"]], *, num_groups: int
    ) -> None:
        self._num_groups = num_groups
        self._rows = [np.empty(0, np.int64) for _ in rows]
        self._c = [np.empty((0, num_groups), np.float32) for _ in rows]
        for query, (rows_K, c_KM) in enumerate(zip(rows, c, strict=True)):
            self.add(query, rows_K[rows_K >= 0], c_KM[rows_K >= 0])

    def __len__(self) -> int:
        """Q."""
        return len(self._rows)

    def rows(self, query: int) -> Int64[np.ndarray, " K"]:
        """Numbers of a query's rows, ascending."""
        return self._rows[query]

    def c(self, query: int) -> Float32[np.ndarray, "K M"]:
        """A query's rows, in the order of their numbers."""
        return self._c[query]

    def holds(self, query: int, rows_N: Int64[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
        """Which of some rows of a query are kept."""
        kept_K = self._rows[query]
        if not len(kept_K):
            return np.zeros(len(rows_N), bool)
        places_N = np.minimum(np.searchsorted(kept_K, rows_N), len(kept_K) - 1)
        return np.asarray(kept_K[places_N] == rows_N)

    def add(self, query: int, rows_N: Int64[np.ndarray, " N"], c_NM: Float32[np.ndarray, "N M"]) -> None:
        """Keep more rows of a query; one that is kept already stays as it is."""
        self._rows[query], places_K = np.unique(np.concatenate([self._rows[query], rows_N]), return_index=True)
        self._c[query] = np.concatenate([self._c[query], c_NM])[places_K]

    def fetch(self, read: Callable[[], Iterable[Piece]], wanted: Sequence[Int64[np.ndarray, " _"]]) -> None:
        """Keep some rows of every query, which one read of C finds; those that it does not hold are not kept.

        Raises
        ------
        DataError
            If one holds NaN or infinite values.
        """
        for first, rows_N, c_QNM in read():
            for query, c_NM in enumerate(c_QNM, first):
                found_N = np.isin(rows_N, wanted[query])
                refuse_non_finite(c_NM[found_N], query, rows_N[found_N])
                self.add(query, rows_N[found_N], c_NM[found_N])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row and its number."""
        return 8 + 4 * self._num_groups

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows and their numbers."""
        return sum(rows_K.nbytes + c_KM.nbytes for rows_K, c_KM in zip(self._rows, self._c, strict=True))

    @property
    def most(self) -> int:
        """Rows kept of the query that has most."""
        return max(len(rows_K) for rows_K in self._rows)


def best_rows(
    choices: Iterable[tuple[Int64[np.ndarray, "Q X"], Float32[np.ndarray, "Q X M"]]],
    weights_M: Float64[np.ndarray, " M"],
    *,
    count: int,
    transform: Transform,
) -> KeptRows:
    """Of every query the rows that score best under some weights, from several choices of them; of equal ones the first.

    Parameters
    ----------
    choices
        Numbers of rows, below 0 where there is none, and these rows of C: every row in one choice at most.
    weights_M
        The weights.
    count
        Rows to keep of every query.
    transform
        What scores are ranked by: see `placing_scores`.
    """
    rows: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    for rows_QX, c_QXM in choices:
        for query, (rows_X, c_XM) in enumerate(zip(rows_QX, c_QXM, strict=True)):
            real_X = rows_X >= 0
            if query == len(rows):
                rows.append(np.empty(0, np.int64))
                kept.append(np.empty((0, len(weights_M)), np.float32))
            rows_Y, c_YM = np.concatenate([rows[query], rows_X[real_X]]), np.concatenate([kept[query], c_XM[real_X]])
            score_Y1 = exact_scores(c_YM, weights_M[None])
            best_Y = top_rows(placing_scores(score_Y1, transform), count)[:, 0]
            rows[query], kept[query] = rows_Y[best_Y], c_YM[best_Y]
    return KeptRows(rows, kept, num_groups=len(weights_M))


def exact_scores(
    c_NM: Float32[np.ndarray, "N M"], weights_VM: Float64[np.ndarray, "V M"]
) -> Float64[np.ndarray, "N V"]:
    """C w in float64, of every row and vector of weights."""
    score_NV = np.empty((len(c_NM), len(weights_VM)))
    rows = max(1, SLICE_BYTES // (8 * max(1, c_NM.shape[1])))
    for start in range(0, len(c_NM), rows):
        score_NV[start : start + rows] = c_NM[start : start + rows].astype(np.float64) @ weights_VM.T
    return score_NV


def top_rows(placing_NV: Float64[np.ndarray, "N V"], k: int) -> Bool[np.ndarray, "N V"]:
    """The k largest of every column, of equal ones the first; all where there are no more than k."""
    if len(placing_NV) <= k:
        return np.ones(placing_NV.shape, bool)
    kth_V = np.partition(placing_NV, -k, axis=0)[-k]
    above_NV, equal_NV = placing_NV > kth_V, placing_NV == kth_V
    return np.asarray(above_NV | (equal_NV & (equal_NV.cumsum(0) <= k - above_NV.sum(0))))
