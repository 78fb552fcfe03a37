"""Algorithm 1 on kept rows, in memory: the w that meets every visit, and which scores its top k must hold against."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64

from gradstore.numerics.learner.algorithm import Descent, LearnedWeights, Visit, placing_scores, visit_order
from gradstore.numerics.learner.kept import KeptRows, top_rows
from gradstore.numerics.learner.settings import LearnerSettings

# Q queries, M groups, K rows kept of a query, S settings, T visits of a setting, E visits of a query.

# Placing scores that differ by less than this times sum_j w_j |C_j| are equal: float64 cannot tell them apart.
TIE = 1e-12


class Trajectory:
    """The visits of one setting, as they went on the rows that were kept when they ran.

    Attributes
    ----------
    settings
        The setting.
    positives
        The rows that each query's visits raise, where they are given and not the top k; all are kept.
    visits
        (epoch, query) of each.
    weights_TM
        w that meets each visit, and after the last visit the result: [T + 1, M].
    norms_T
        sqrt(w^T A_q w).
    kth_T, slack_T
        The placing score at the k-th place and TIE sum_j w_j |C_j| of that row; -inf and 0 where fewer than k rows are kept;
        inf and 0 where no other row matters: the norm is zero, or rows are given.
    tied_T
        Whether another row ties with the k-th.
    norm_errors_T
        Relative difference between ||S|| by A_q and by the scores of the read that verified the visit, beyond what these
        lose in float32.
    settled
        How many visits from the first on are verified. They are not run again, but replayed.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        *,
        num_queries: int,
        num_groups: int,
        positives: Sequence[Int64[np.ndarray, " _"]] | None = None,
    ) -> None:
        self.settings = settings
        self.positives = positives if settings.objective == "pairs" else None
        self.visits = visit_order(num_queries, settings)
        self._query_T = np.array([query for _, query in self.visits])
        total = len(self.visits)
        self.weights_TM: Float64[np.ndarray, "T+1 M"] = np.empty((total + 1, num_groups))
        self.top_means_TM: Float64[np.ndarray, "T M"] = np.empty((total, num_groups))
        self.norms_T: Float64[np.ndarray, " T"] = np.empty(total)
        self.kth_T: Float64[np.ndarray, " T"] = np.empty(total)
        self.slack_T: Float64[np.ndarray, " T"] = np.empty(total)
        self.tied_T: Bool[np.ndarray, " T"] = np.zeros(total, bool)
        self.norm_errors_T: Float64[np.ndarray, " T"] = np.zeros(total)
        self.losses_T: Float64[np.ndarray, " T"] = np.empty(total)
        self.settled = 0

    def open_visits(self, query: int) -> Int64[np.ndarray, " E"]:
        """The visits of a query that are not settled."""
        return np.flatnonzero(self._query_T[self.settled :] == query) + self.settled

    def learned(self) -> LearnedWeights:
        """The result, true where all visits are settled."""
        num_queries = len(self.visits) // self.settings.epochs
        return LearnedWeights(
            weights=self.weights_TM[-1].copy(),
            weights_per_epoch=self.weights_TM[num_queries::num_queries].copy(),
            losses=self.losses_T,
            visits=tuple(self.visits),
        )


class Chosen(NamedTuple):
    """The kept rows that are raised at one visit: the top k, or those given."""

    signs: Float64[np.ndarray, " K"]
    """1 for each row that is raised, 0 for the others; where rows are placed by |S|, sign(S) and 0."""
    size: int
    """k, or the number of rows kept where that is less; or the number of those given."""
    kth: float
    slack: float
    tied: bool


def run_visits(
    trajectories: Sequence[Trajectory], second_moments_QMM: Float64[np.ndarray, "Q M M"], kept: KeptRows
) -> None:
    r"""Run Algorithm 1 on the kept rows, for settings whose visits come in the same order; settled visits are replayed.

    .. math:: C_q^T S_q = A_q w, \quad \lVert S_q \rVert = \sqrt{w^T A_q w}

    A top k of fewer than k kept rows is a guess that verification will reject: the mean is then that of all kept rows, or
    0 where there is none.
    """
    num_queries, num_groups, _ = second_moments_QMM.shape
    descents = [
        Descent(num_queries=num_queries, num_groups=num_groups, settings=trajectory.settings)
        for trajectory in trajectories
    ]
    for step in range(len(trajectories[0].visits)):
        weights_SM = np.stack([descent.weights for descent in descents])
        visits = meet(trajectories, weights_SM, step, second_moments_QMM, kept)
        for trajectory, descent, visit in zip(trajectories, descents, visits, strict=True):
            trajectory.losses_T[step] = descent.step(visit)
    for trajectory, descent in zip(trajectories, descents, strict=True):
        trajectory.weights_TM[-1] = descent.weights


def meet(
    trajectories: Sequence[Trajectory],
    weights_SM: Float64[np.ndarray, "S M"],
    step: int,
    second_moments_QMM: Float64[np.ndarray, "Q M M"],
    kept: KeptRows,
) -> list[Visit | None]:
    """Make one visit of each setting at its weights, on the kept rows; None where the query has no row to be raised.

    Settings have visits to the same query here. A visit that is settled is not chosen for anew: its weights are the same.
    """
    _, query = trajectories[0].visits[step]
    # One by one: a replay must give the same bits, whatever settings run beside.
    response_SM = np.stack([second_moments_QMM[query] @ weights_M for weights_M in weights_SM])
    norm_S = np.sqrt(np.maximum(0, np.vecdot(weights_SM, response_SM)))
    for trajectory, weights_M, norm in zip(trajectories, weights_SM, norm_S, strict=True):
        trajectory.weights_TM[step] = weights_M
        trajectory.norms_T[step] = norm
    _choose_top([trajectory for trajectory in trajectories if trajectory.settled <= step], step, kept, query)
    return [
        Visit(trajectory.top_means_TM[step], response_M, float(norm))
        if trajectory.positives is None or len(trajectory.positives[query])
        else None
        for trajectory, response_M, norm in zip(trajectories, response_SM, norm_S, strict=True)
    ]


def _choose_top(trajectories: list[Trajectory], step: int, kept: KeptRows, query: int) -> None:
    """Fill in the means of the top k of one visit, and what they must hold against."""
    if not trajectories:
        return
    c_KM = kept.c(query).astype(np.float64)
    weights_SM = np.stack([trajectory.weights_TM[step] for trajectory in trajectories])
    score_KS = c_KM @ weights_SM.T
    chosen = [
        _top(score_KS[:, place], c_KM, trajectory.weights_TM[step], trajectory.settings)
        if trajectory.positives is None
        else _given(score_KS[:, place], np.isin(kept.rows(query), trajectory.positives[query]), trajectory.settings)
        for place, trajectory in enumerate(trajectories)
    ]
    means_SM = np.stack([top.signs for top in chosen]) @ c_KM / [[max(1, top.size)] for top in chosen]
    for trajectory, top, mean_M in zip(trajectories, chosen, means_SM, strict=True):
        trajectory.top_means_TM[step] = mean_M
        if trajectory.norms_T[step] > 0:
            trajectory.kth_T[step], trajectory.slack_T[step], trajectory.tied_T[step] = top.kth, top.slack, top.tied
        else:
            trajectory.kth_T[step], trajectory.slack_T[step], trajectory.tied_T[step] = math.inf, 0, False


def _top(
    score_K: Float64[np.ndarray, " K"],
    c_KM: Float64[np.ndarray, "K M"],
    weights_M: Float64[np.ndarray, " M"],
    settings: LearnerSettings,
) -> Chosen:
    placing_K = placing_scores(score_K, settings.transform)
    # Rows are in the order of their numbers, so that of equal ones the first is taken.
    top_K = top_rows(placing_K[:, None], settings.k)[:, 0]
    signs_K = np.where(top_K, np.sign(score_K) if settings.transform == "square" else 1.0, 0.0)
    if len(score_K) < settings.k:
        return Chosen(signs_K, len(score_K), kth=-math.inf, slack=0.0, tied=False)
    last = np.where(top_K, placing_K, np.inf).argmin()
    following = np.where(top_K, -np.inf, placing_K).argmax()
    slack, slack_after = TIE * (np.abs(c_KM[[last, following]]) @ weights_M)
    tied = len(score_K) > settings.k and placing_K[last] - placing_K[following] <= max(slack, slack_after)
    return Chosen(signs_K, settings.k, kth=float(placing_K[last]), slack=float(slack), tied=bool(tied))


def _given(score_K: Float64[np.ndarray, " K"], given_K: Bool[np.ndarray, " K"], settings: LearnerSettings) -> Chosen:
    signs_K = np.where(given_K, np.sign(score_K) if settings.transform == "square" else 1.0, 0.0)
    return Chosen(signs_K, int(given_K.sum()), kth=math.inf, slack=0.0, tied=False)
