"""Scores S[q, n] = sum_j w_j C[q, n, j], and the rows that score best and worst, as C streams by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

# Q queries, N rows of one block, M groups, K rows kept per query.


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """The K rows kept of every query, best first: their row numbers, scores and parts w_j C[q, n, j]."""

    rows: Int[np.ndarray, "Q K"]
    scores: Float[np.ndarray, "Q K"]
    parts: Float[np.ndarray, "Q K M"]


class Ranking:
    """Keeps, for every query, the ``k`` rows of the largest (or smallest) score seen so far.

    Memory is Q k (M + 2) numbers whatever the number of rows. Equal scores are ordered by row number, so the result does
    not depend on the order or the size of the blocks.

    Parameters
    ----------
    num_queries, num_groups
        Q and M.
    k
        Rows kept per query.
    largest
        True for proponents, False for opponents.
    """

    def __init__(self, *, num_queries: int, num_groups: int, k: int, largest: bool) -> None:
        self._k = k
        self._sign = 1.0 if largest else -1.0
        self._best = Ranked(
            rows=np.empty((num_queries, 0), np.int64),
            scores=np.empty((num_queries, 0), np.float64),
            parts=np.empty((num_queries, 0, num_groups), np.float32),
        )

    def update(
        self,
        contributions_QNM: Float[np.ndarray, "Q N M"],
        weights_M: Float[np.ndarray, " M"],
        rows_N: Int[np.ndarray, " N"],
    ) -> None:
        """Take in one block of C; rows are numbered by ``rows_N``."""
        scores_QN = contributions_QNM.astype(np.float64) @ weights_M
        chosen_QK = self._order(scores_QN, np.broadcast_to(rows_N, scores_QN.shape))
        parts = np.take_along_axis(contributions_QNM, chosen_QK[:, :, None], 1) * weights_M
        rows = np.concatenate([self._best.rows, rows_N[chosen_QK]], 1)
        scores = np.concatenate([self._best.scores, np.take_along_axis(scores_QN, chosen_QK, 1)], 1)
        parts = np.concatenate([self._best.parts, parts.astype(np.float32)], 1)
        keep = self._order(scores, rows)
        self._best = Ranked(
            rows=np.take_along_axis(rows, keep, 1),
            scores=np.take_along_axis(scores, keep, 1),
            parts=np.take_along_axis(parts, keep[:, :, None], 1),
        )

    def result(self) -> Ranked:
        """The rows kept so far, best first."""
        return self._best

    def _order(self, scores_QN: Float[np.ndarray, "Q N"], rows_QN: Int[np.ndarray, "Q N"]) -> Int[np.ndarray, "Q K"]:
        """Columns of the k best scores of every query, best first; rows of equal score in ascending order."""
        order = np.lexsort((rows_QN, -self._sign * scores_QN), axis=1)
        return order[:, : self._k]
