"""How much weights raise the top scores of queries that they were not learned from."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int64

from gradstore.errors import DataError
from gradstore.numerics.learner.algorithm import placing_scores, refuse_k_above, refuse_no_query, refuse_non_finite
from gradstore.numerics.learner.kept import Piece, exact_scores
from gradstore.numerics.scores import Transform

# Q queries, N rows of a piece, M groups, V vectors of weights, K numbers of rows, B best scores.

# Scores that are collected before the best are chosen anew.
LEAST_COLLECTED = 1024


def judge(
    read: Callable[[], Iterable[Piece]],
    weights_VM: Float64[np.ndarray, "V M"],
    ks: Sequence[int],
    *,
    queries: Int64[np.ndarray, " _"],
    transform: Transform,
) -> Float64[np.ndarray, "V K"]:
    r"""Minus the loss of Algorithm 1, mean over some queries, of several vectors of weights and several k, in one read of C.

    .. math:: \frac{1}{|Q|} \sum_q \frac{\operatorname{mean}(\text{top-}k \text{ of } C_q w_v)}{\lVert C_q w_v \rVert_2}

    A query whose scores are all zero counts as 0. Scores are float64. Memory is that of at most 2 max(k, 1024) scores for every
    query and vector, of the scores of one query in one piece, and of a slice of 2 MiB.

    Parameters
    ----------
    read
        Reads C once: pieces in any order that together hold every valid row of these queries once; others are passed over.
    weights_VM
        The weights.
    ks
        Numbers of rows.
    queries
        Numbers of the queries to judge by: for a choice among weights, none that one of them was learned from.
    transform
        What becomes of scores in the end: where that is their square, abs(S) takes the place of S.

    Raises
    ------
    SpecError
        If there is no query, or a k is above the number of rows.
    DataError
        If C of these queries holds NaN or infinite values.
    """
    refuse_no_query(len(queries))
    judged = {int(query): _Judged(weights_VM, most=max(ks), transform=transform) for query in queries}
    for first, rows_N, c_QNM in read():
        for query, c_NM in enumerate(c_QNM, first):
            if query in judged:
                judged[query].offer(query, rows_N, c_NM)
    refuse_k_above(min(each.num_rows for each in judged.values()), max(ks))
    return np.asarray(np.mean([each.values(ks) for each in judged.values()], axis=0))


def gain(judged_VK: Float64[np.ndarray, "V K"], uniform_K: Float64[np.ndarray, " K"]) -> Float64[np.ndarray, " V"]:
    r"""By what factor weights raise what `judge` finds, mean over several k: 1 is no better than uniform weights.

    .. math:: \frac{1}{|K|} \sum_k \left(1 + \frac{v_k - u_k}{|u_k|}\right)

    which is the mean of v_k / u_k where uniform weights have u_k > 0. Weights that were learned for different k are chosen among
    by all of these k: each k alone favours the weights that were learned for it, and a mean of the v_k themselves favours the
    smallest k, at which the top k have the highest mean. Of a ratio no k has more than its share.

    Parameters
    ----------
    judged_VK
        What `judge` finds of each vector of weights.
    uniform_K
        What it finds of uniform weights.

    Raises
    ------
    DataError
        If uniform weights are judged 0 at some k, as where all scores are zero.
    """
    if not uniform_K.all():
        raise DataError(
            "contributions of the held-out queries: all scores are zero, so that no weights are better than others. "
            "Choose other queries, or learn.held_out = 0."
        )
    return np.asarray((1 + (judged_VK - uniform_K) / np.abs(uniform_K)).mean(1))


class _Judged:
    """One query's highest scores under each vector of weights, and the sum of the squares of all."""

    def __init__(self, weights_VM: Float64[np.ndarray, "V M"], *, most: int, transform: Transform) -> None:
        self._weights_VM = weights_VM
        self._most = most
        self._transform: Transform = transform
        self._squares_V = np.zeros(len(weights_VM))
        self._best_BV = np.empty((0, len(weights_VM)))
        self._collected: list[np.ndarray] = []
        self.num_rows = 0

    def offer(self, query: int, rows_N: Int64[np.ndarray, " N"], c_NM: Float32[np.ndarray, "N M"]) -> None:
        score_NV = exact_scores(c_NM, self._weights_VM)
        if not np.isfinite(score_NV).all():
            refuse_non_finite(c_NM, query, rows_N)
        self._squares_V += np.einsum("nv,nv->v", score_NV, score_NV)
        self.num_rows += len(c_NM)
        score_NV = placing_scores(score_NV, self._transform)
        if len(self._best_BV) == self._most:
            score_NV = score_NV[(score_NV > self._best_BV.min(0)).any(1)]
        self._collected.append(score_NV)
        if sum(map(len, self._collected)) >= max(self._most, LEAST_COLLECTED):
            self._choose()

    def _choose(self) -> None:
        score_BV = np.concatenate([self._best_BV, *self._collected])
        self._collected = []
        if len(score_BV) > self._most:
            score_BV = np.partition(score_BV, -self._most, axis=0)[-self._most :]
        self._best_BV = score_BV

    def values(self, ks: Sequence[int]) -> Float64[np.ndarray, "V K"]:
        self._choose()
        norm_V = np.sqrt(self._squares_V)
        best_BV = np.sort(self._best_BV, axis=0)[::-1]
        mean_VK = np.stack([best_BV[:k].mean(0) for k in ks], axis=1)
        return np.asarray(np.divide(mean_VK, norm_V[:, None], out=np.zeros(mean_VK.shape), where=norm_V[:, None] > 0))
