"""Scores S[q, n] = sum_j w_j C[q, n, j], and the rows that score best and worst, as C streams by."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

# Q queries, N rows of one block, M groups, K rows kept per query.

Transform = Literal["none", "square"]
"""What becomes of a linear score in the end: nothing, or its square (DAS, arXiv 2506.05647, eq. 16)."""

LARGEST, SMALLEST = 1.0, -1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """The K rows kept of every query, best first: their row numbers, scores and parts w_j C[q, n, j]."""

    rows: Int[np.ndarray, "Q K"]
    scores: Float[np.ndarray, "Q K"]
    parts: Float[np.ndarray, "Q K M"]


def transformed(scores: Float[np.ndarray, "*X"], transform: Transform) -> Float[np.ndarray, "*X"]:
    """The scores that linear ones stand for."""
    return np.square(scores) if transform == "square" else scores


def scores_of(
    contributions_QNM: Float[np.ndarray, "Q N M"], weights_M: Float[np.ndarray, " M"], transform: Transform
) -> Float[np.ndarray, "Q N"]:
    """Return S[q, n] = sum_j w_j C[q, n, j] in float64, and what that stands for."""
    return transformed(contributions_QNM.astype(np.float64) @ weights_M, transform)


class Ranking:
    """Keeps, for every query, the ``k`` rows of the largest and the ``k`` of the smallest scores seen so far.

    Memory is 2 Q k (M + 2) numbers whatever the number of rows. Equal scores are ordered by row number, so the result does
    not depend on the order or the size of the blocks.

    Parameters
    ----------
    num_queries, num_groups
        Q and M.
    k
        Rows kept per query and side.
    transform
        What becomes of sum_j w_j C: rows are ranked by that, and their parts are of the sum before it. Of squares none is
        below 0, so that the smallest are of rows that matter least.
    """

    def __init__(self, *, num_queries: int, num_groups: int, k: int, transform: Transform = "none") -> None:
        self._k = k
        self._transform: Transform = transform
        nothing = Ranked(
            rows=np.empty((num_queries, 0), np.int64),
            scores=np.empty((num_queries, 0), np.float64),
            parts=np.empty((num_queries, 0, num_groups), np.float32),
        )
        self._best = {LARGEST: nothing, SMALLEST: nothing}

    def update(
        self,
        contributions_QNM: Float[np.ndarray, "Q N M"],
        weights_M: Float[np.ndarray, " M"],
        rows_N: Int[np.ndarray, " N"],
    ) -> None:
        """Take in one block of C; rows are numbered by ``rows_N``."""
        scores_QN = scores_of(contributions_QNM, weights_M, self._transform)
        for sign, best in self._best.items():
            chosen_QK = _order(sign * scores_QN, np.broadcast_to(rows_N, scores_QN.shape), self._k)
            parts = np.take_along_axis(contributions_QNM, chosen_QK[:, :, None], 1) * weights_M
            rows = np.concatenate([best.rows, rows_N[chosen_QK]], 1)
            scores = np.concatenate([best.scores, np.take_along_axis(scores_QN, chosen_QK, 1)], 1)
            parts = np.concatenate([best.parts, parts.astype(np.float32)], 1)
            keep = _order(sign * scores, rows, self._k)
            self._best[sign] = Ranked(
                rows=np.take_along_axis(rows, keep, 1),
                scores=np.take_along_axis(scores, keep, 1),
                parts=np.take_along_axis(parts, keep[:, :, None], 1),
            )

    def proponents(self) -> Ranked:
        """The rows of the largest scores so far, largest first."""
        return self._best[LARGEST]

    def opponents(self) -> Ranked:
        """The rows of the smallest scores so far, smallest first."""
        return self._best[SMALLEST]


def _order(scores_QN: Float[np.ndarray, "Q N"], rows_QN: Int[np.ndarray, "Q N"], k: int) -> Int[np.ndarray, "Q K"]:
    """Columns of the k largest scores of every query, largest first; rows of equal score in ascending order."""
    return np.lexsort((rows_QN, -scores_QN), axis=1)[:, :k]
