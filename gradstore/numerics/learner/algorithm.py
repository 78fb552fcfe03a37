"""Algorithm 1 of arXiv 2506.05647: one weight per parameter group, learned without labels from the contributions.

Every visit to a query needs its whole C_q, which is streamed in pieces of rows and never held. This is the reference
that any faster route must equal.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64

from gradstore.errors import DataError, SpecError
from gradstore.numerics.generator import derive_key, normal, permutation, words
from gradstore.numerics.learner.positives import given_positives, refuse_missing
from gradstore.numerics.learner.settings import ENDS, LearnerSettings
from gradstore.numerics.scores import Transform

# Q queries, N rows of a piece, M groups, K rows raised.

INITIAL_DEVIATION = 0.01
# Of AdamW, for the mean of gradients and of their squares, and what is added to the root of the latter: torch's defaults.
ADAM_DECAYS = 0.9, 0.999
ADAM_EPSILON = 1e-8
# Weights to begin with are at least this part of their mean: w_raw of 0 would be infinite.
LEAST_START = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearnedWeights:
    """The result of Algorithm 1.

    Attributes
    ----------
    weights
        w [M] = softmax(w_raw): positive, summing to 1.
    weights_per_epoch
        [E, M], w at the end of each epoch.
    losses
        [E * Q], the loss that each visit met; NaN where no step was taken.
    visits
        (epoch, query) of each visit.
    """

    weights: Float64[np.ndarray, " M"]
    weights_per_epoch: Float64[np.ndarray, "E M"]
    losses: Float64[np.ndarray, " visits"]
    visits: tuple[tuple[int, int], ...]


class Visit(NamedTuple):
    """What one query's contributions say at one w; enough for the loss and its gradient."""

    raised: Float64[np.ndarray, " M"]
    """a, whose product with w the objective raises: the mean of the k rows of C_q with the highest scores, less that of those
    with the lowest, or one of the two, or the mean of given rows; where rows are placed by |S|, rows count sign(S) times."""
    response: Float64[np.ndarray, " M"]
    """C_q^T S_q = A_q w, with A_q = C_q^T C_q."""
    norm: float
    """Norm of the scores, ||S_q||_2."""


def learn_weights(
    read: Callable[[int], Iterable[Float[np.ndarray, "_ M"]]],
    *,
    num_queries: int,
    num_groups: int,
    settings: LearnerSettings,
    positives: Sequence[Int64[np.ndarray, " _"]] | None = None,
    rows: Int64[np.ndarray, " N"] | None = None,
) -> LearnedWeights:
    r"""Fit the group weights by Algorithm 1.

    .. math:: L_q(w) = - \frac{\operatorname{mean}(\text{top-}k \text{ of } S_q)}{\lVert S_q \rVert_2},
              \quad S_q = C_q w, \quad w = \operatorname{softmax}(w_{raw})

    (arXiv 2506.05647, eq. 6-7) or another objective of its table 10: ``bottom``, the mean of the k lowest scores over the
    norm; ``gap``, the sum of the two; ``unnormalized``, the first without its norm, which there is unstable; or ``pairs``,
    which has the mean score of given rows in place of the top k. One AdamW step per visit, E visits to every query. Scores are
    float64. Of rows with equal scores at the k-th place the first is taken. A query whose scores are all zero, or which has no
    given rows, takes no step, but counts for the learning rate. Where scores are squared in the end (DAS), the top k are those
    of the largest abs(S), and their mean, or that of given rows, is that of abs(S); the norm is the same.

    Parameters
    ----------
    read
        C_q of a query, in consecutive pieces of rows [rows, M] that together hold every training row; called once per
        visit.
    num_queries, num_groups
        Q and M.
    settings
        See `LearnerSettings`.
    positives
        For ``pairs``, and for nothing else, the numbers of the rows that are to score best for each query: any number, each
        counted once.
    rows
        Numbers of the rows that are read, in their order; from 0 up where they are not given.

    Raises
    ------
    SpecError
        If there is no query, k is above the number of training rows, or positives are missing, of no use, or of no such row.
    DataError
        If C holds NaN or infinite values.
    """
    refuse_no_query(num_queries)
    wanted = given_positives([settings.objective], positives, num_queries)
    descent = Descent(num_queries=num_queries, num_groups=num_groups, settings=settings)
    visits = visit_order(num_queries, settings)
    losses, weights_per_epoch = [], []
    for step, (_, query) in enumerate(visits, start=1):
        rows_K = None if wanted is None else wanted[query]
        visit = None
        if rows_K is None or len(rows_K):
            visit = visit_query(read(query), descent.weights, settings, query=query, positives=rows_K, rows=rows)
        losses.append(descent.step(visit))
        if step % num_queries == 0:
            weights_per_epoch.append(descent.weights)
    return LearnedWeights(
        weights=descent.weights,
        weights_per_epoch=np.stack(weights_per_epoch),
        losses=np.array(losses),
        visits=tuple(visits),
    )


def initial_raw_weights(num_groups: int, *, seed: int) -> Float64[np.ndarray, " M"]:
    """w_raw at the start: independent normal numbers with deviation 0.01."""
    standard_1M = normal(derive_key(seed, "learner", "w_raw"), 1, num_groups)
    return np.asarray(INITIAL_DEVIATION * standard_1M[0])


def initial_weights(num_groups: int, *, seed: int) -> Float64[np.ndarray, " M"]:
    """Weights at the start, softmax(w_raw)."""
    return softmax(initial_raw_weights(num_groups, seed=seed))


def softmax(raw_M: Float64[np.ndarray, " M"]) -> Float64[np.ndarray, " M"]:
    """Positive numbers that sum to 1, in the ratios of exp(w_raw)."""
    weights_M = np.exp(raw_M - raw_M.max())
    return np.asarray(weights_M / weights_M.sum())


def raw_weights(weights_M: Float64[np.ndarray, " _"], num_groups: int) -> Float64[np.ndarray, " M"]:
    """w_raw of mean 0 whose softmax is w, but for weights below a thousandth of their mean, which are raised to that.

    Raises
    ------
    SpecError
        If there is not one weight for each group.
    """
    if len(weights_M) != num_groups:
        raise SpecError(f"learn.start: found {len(weights_M)} weights; accepted: one for each of {num_groups} groups.")
    log_M = np.log(np.maximum(weights_M / weights_M.mean(), LEAST_START))
    return np.asarray(log_M - log_M.mean())


def visit_order(num_queries: int, settings: LearnerSettings) -> list[tuple[int, int]]:
    """(epoch, query) of all E * Q visits: each epoch permutes the tiles of queries, then the queries inside a tile."""
    visits = []
    for epoch in range(settings.epochs):
        stream = words(derive_key(settings.seed, "learner", f"epoch {epoch}"), 2 * num_queries)
        starts = np.arange(0, num_queries, settings.tile)
        for start in starts[permutation(stream[num_queries : num_queries + len(starts)])]:
            order = permutation(stream[start : min(start + settings.tile, num_queries)])
            visits += [(epoch, int(start + place)) for place in order]
    return visits


def placing_scores(scores: Float[np.ndarray, "*X"], transform: Transform) -> Float[np.ndarray, "*X"]:
    """What the top k of Algorithm 1 are the largest of: S, or its magnitude where scores are squared in the end."""
    return np.abs(scores) if transform == "square" else scores


def visit_query(
    pieces: Iterable[Float[np.ndarray, "_ M"]],
    weights_M: Float64[np.ndarray, " M"],
    settings: LearnerSettings,
    *,
    query: int,
    positives: Int64[np.ndarray, " K"] | None = None,
    rows: Int64[np.ndarray, " N"] | None = None,
) -> Visit:
    """Read one query's contributions once; see `learn_weights` for the arguments, of one query here, and errors."""
    raised: list[_Best | _Given] = [_Best(settings, len(weights_M), sign=sign) for sign in ENDS[settings.objective]]
    if positives is not None:
        raised = [_Given(settings, len(weights_M), positives=positives, query=query)]
    response_M, squares, num_rows = np.zeros_like(weights_M), 0.0, 0
    for piece in pieces:
        piece_NM = piece.astype(np.float64)
        score_N = piece_NM @ weights_M
        stop = num_rows + len(piece_NM)
        rows_N = np.arange(num_rows, stop) if rows is None else rows[num_rows:stop]
        if not np.isfinite(score_N).all():
            refuse_non_finite(piece_NM, query, rows_N)
        for part in raised:
            part.offer(rows_N, score_N, piece_NM)
        response_M += score_N @ piece_NM
        squares += float(score_N @ score_N)
        num_rows = stop
    if ENDS[settings.objective]:
        refuse_k_above(num_rows, settings.k)
    raised_M = np.sum([part.mean() for part in raised], axis=0)
    return Visit(raised_M, response_M, math.sqrt(squares))


def loss_and_gradient(
    visit: Visit, weights_M: Float64[np.ndarray, " M"], *, normalized: bool = True
) -> tuple[float, Float64[np.ndarray, " M"]]:
    r"""L_q and its gradient with respect to w_raw.

    With a the mean of the rows that are raised, so that their mean score is a.w, and the norm's gradient A_q w / ||S||:

    .. math:: \nabla_w L = - \frac{a}{\lVert S \rVert} + \frac{(a \cdot w) A_q w}{\lVert S \rVert^3},
              \quad \nabla_{w_{raw}} L = w \odot (\nabla_w L - w \cdot \nabla_w L)

    Not normalized, L is -a.w, and its gradient with respect to w is -a.
    """
    mean, norm = float(visit.raised @ weights_M), 1.0
    gradient_M = -visit.raised
    if normalized:
        norm = visit.norm
        gradient_M = (mean / norm**2 * visit.response - visit.raised) / norm
    return -mean / norm, weights_M * (gradient_M - weights_M @ gradient_M)


class Descent:
    """The state of Algorithm 1 between visits: w_raw, AdamW's moments, and the place on the cosine.

    Parameters
    ----------
    num_queries, num_groups
        Q and M.
    settings
        See `LearnerSettings`.

    Attributes
    ----------
    weights
        The current w = softmax(w_raw).
    """

    def __init__(self, *, num_queries: int, num_groups: int, settings: LearnerSettings) -> None:
        raw_M = (
            initial_raw_weights(num_groups, seed=settings.seed)
            if settings.start is None
            else raw_weights(np.array(settings.start), num_groups)
        )
        self._raw_M = raw_M
        self._mean_M, self._square_M = np.zeros(num_groups), np.zeros(num_groups)
        self._settings = settings
        self._normalized = settings.objective != "unnormalized"
        self._total_visits = settings.epochs * num_queries
        self._visits, self._steps = 0, 0
        self.weights = softmax(raw_M)

    def step(self, visit: Visit | None) -> float:
        """Take one step, unless there is nothing to raise or the scores are all zero, and return the loss that was met."""
        cosine = math.cos(math.pi * self._visits / self._total_visits)
        self._visits += 1
        if visit is None or visit.norm == 0:
            return math.nan
        loss, gradient_M = loss_and_gradient(visit, self.weights, normalized=self._normalized)
        self._move(gradient_M, self._settings.learning_rate * (1 + cosine) / 2)
        return loss

    def _move(self, gradient_M: Float64[np.ndarray, " M"], rate: float) -> None:
        """One step of AdamW (arXiv 1711.05101, algorithm 2) as torch has it, whose own takes longer than all else of a visit."""
        self._steps += 1
        of_mean, of_square = ADAM_DECAYS
        self._mean_M = of_mean * self._mean_M + (1 - of_mean) * gradient_M
        self._square_M = of_square * self._square_M + (1 - of_square) * np.square(gradient_M)
        size_M = np.sqrt(self._square_M / (1 - of_square**self._steps)) + ADAM_EPSILON
        decayed_M = (1 - rate * self._settings.weight_decay) * self._raw_M
        self._raw_M = decayed_M - rate / (1 - of_mean**self._steps) * self._mean_M / size_M
        self.weights = softmax(self._raw_M)


class _Best:
    """The k rows with the highest scores so far, best first, earlier rows first among equals; of |S| rows times sign(S).

    With ``sign`` -1 those with the lowest, and rows times -1.
    """

    def __init__(self, settings: LearnerSettings, num_groups: int, *, sign: int) -> None:
        self._k = settings.k
        self._transform = settings.transform
        self._sign = sign
        self._score_K = np.empty(0)
        self._c_KM = np.empty((0, num_groups))

    def offer(
        self, rows_N: Int64[np.ndarray, " N"], score_N: Float64[np.ndarray, " N"], piece_NM: Float64[np.ndarray, "N M"]
    ) -> None:
        del rows_N  # rows come in order
        placing_N = placing_scores(self._sign * score_N, self._transform)
        if len(self._score_K) == self._k:
            # A later row must beat the k-th, not equal it.
            better_N = placing_N > self._score_K[-1]
            if not better_N.any():
                return
            placing_N, score_N, piece_NM = placing_N[better_N], score_N[better_N], piece_NM[better_N]
        if self._transform == "square":
            piece_NM = np.sign(score_N)[:, None] * piece_NM
        elif self._sign < 0:
            piece_NM = -piece_NM
        score_S = np.concatenate([self._score_K, placing_N])
        order_K = np.argsort(-score_S, kind="stable")[: self._k]
        self._score_K = score_S[order_K]
        self._c_KM = np.concatenate([self._c_KM, piece_NM])[order_K]

    def mean(self) -> Float64[np.ndarray, " M"]:
        return np.asarray(self._c_KM.mean(0))


class _Given:
    """The given rows of one query; of |S| rows times sign(S)."""

    def __init__(
        self, settings: LearnerSettings, num_groups: int, *, positives: Int64[np.ndarray, " K"], query: int
    ) -> None:
        self._transform = settings.transform
        self._positives = positives
        self._query = query
        self._rows = np.empty(0, np.int64)
        self._total_M = np.zeros(num_groups)

    def offer(
        self, rows_N: Int64[np.ndarray, " N"], score_N: Float64[np.ndarray, " N"], piece_NM: Float64[np.ndarray, "N M"]
    ) -> None:
        given_N = np.isin(rows_N, self._positives)
        signs_K = np.sign(score_N[given_N]) if self._transform == "square" else np.ones(given_N.sum())
        self._total_M += signs_K @ piece_NM[given_N]
        self._rows = np.concatenate([self._rows, rows_N[given_N]])

    def mean(self) -> Float64[np.ndarray, " M"]:
        refuse_missing(self._positives[~np.isin(self._positives, self._rows)], self._query)
        return self._total_M / len(self._positives)


def refuse_no_query(num_queries: int) -> None:
    """Raise the error of an empty set of queries."""
    if num_queries < 1:
        raise SpecError("data.learn: found 0 queries; the weights need at least 1.")


def refuse_k_above(num_rows: int, k: int) -> None:
    """Raise the error of a top k of fewer rows."""
    if k > num_rows:
        raise SpecError(f"learn.k: found {k}; accepted: 1 to {num_rows}, the number of training examples.")


def refuse_non_finite(c_NM: Float[np.ndarray, "N M"], query: int, rows_N: Int64[np.ndarray, " N"]) -> None:
    """Raise the error of the first NaN or infinite contribution to a query, if there is one; rows are named as numbered."""
    for row, group in np.argwhere(~np.isfinite(c_NM))[:1]:
        raise DataError(
            f"contributions of query {query}: training row {rows_N[row]} of group {group} is {c_NM[row, group]}. "
            "Such rows must be left out, or the features computed anew."
        )
