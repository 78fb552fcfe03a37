r"""A full-batch solver beside Algorithm 1: the same loss of all queries at once, minimised to a tolerance.

.. math:: F(w_{raw}) = \frac{\sum_q L_q(w)}{\lvert \sum_q L_q(u) \rvert} + \frac{\lambda}{2} \operatorname{Var}_j(\log w_j),
          \quad w = \operatorname{softmax}(w_{raw})

with u the uniform weights. Where their losses are 0, nothing is divided by them. Dividing by the loss of uniform weights makes a weight decay lambda mean the same for any k,
number of rows and scale of the scores, as AdamW's does. Var(log w), the mean square of w_raw less its mean, pulls towards
uniform weights as the decay of w_raw does, and does not change when a number is added to all of w_raw, which w does not see.

The mean of the top k scores is the largest of the means of any k rows, so L_q is the smallest of smooth functions, one for
each choice of rows. Where it has a local minimum, every choice that is as good has one there too. So kinks are
no places to get stuck at, a minimum has the gradient 0, and L-BFGS with a line search, made for smooth functions, finds one. Which
one, where there are several, depends on the start and on the rows that are kept on the way.

As in `gradstore.numerics.learner.certified`, it runs on kept rows with A_q, and a read of C verifies the top k at the result and
at u. Missing rows are added, and it runs again from the start, until none is missing: what was found is then a minimum with
the whole of C.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from gradstore.errors import SpecError
from gradstore.numerics.learner.algorithm import loss_and_gradient, raw_weights, refuse_no_query, softmax
from gradstore.numerics.learner.certificate import Certificate, Certification, certify
from gradstore.numerics.learner.kept import KeptRows, Piece
from gradstore.numerics.learner.positives import given_positives
from gradstore.numerics.learner.settings import ENDS, LearnerSettings, Objective, refuse_start
from gradstore.numerics.learner.trajectory import Trajectory, meet
from gradstore.numerics.scores import Transform

# Q queries, M groups.

# Curvature is taken from so many steps.
HISTORY = 20
# F is about 1 in size, and float64 tells no smaller differences apart.
LEAST_CHANGE = 1e-15
# Evaluations of F that a line search may take.
EVALUATIONS = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class FullBatchSettings:
    """Settings of the full-batch solver.

    Attributes
    ----------
    k
        Number of best-scored rows whose mean score is raised; pairs have no use for it.
    weight_decay
        lambda.
    tolerance
        The solver ends where no element of the gradient with respect to w_raw is larger.
    max_iterations
        Or after so many steps.
    transform, objective
        See `LearnerSettings`. What asks for the lowest scores is not to be had.
    start
        w to begin with, one for each group, of which only ratios matter; else uniform weights.
    """

    k: int = 10
    weight_decay: float = 0.01
    tolerance: float = 1e-7
    max_iterations: int = 1000
    transform: Transform = "none"
    objective: Objective = "top"
    start: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, low in {"k": 1, "max_iterations": 1, "weight_decay": 0, "tolerance": 0}.items():
            if not low <= getattr(self, name) < math.inf:
                raise SpecError(f"learn.{name}: found {getattr(self, name)}; accepted: at least {low}, and finite.")
        if -1 in ENDS[self.objective]:
            raise SpecError(
                f"learn.objective: found {self.objective!r}, for the full-batch solver, which verifies the highest scores alone. "
                'Accepted: "top", "unnormalized", "pairs".'
            )
        refuse_start(self.start)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FullBatchWeights:
    """Weights that minimise the loss.

    Attributes
    ----------
    weights
        w [M]: positive, summing to 1.
    loss
        L(w), mean over the queries that have one.
    gradient
        Largest element of F's gradient with respect to w_raw, at w.
    iterations
        Steps of the last run.
    converged
        Whether the gradient is within the tolerance.
    certificate
        What it took until the top k at w were those of the whole of C.
    """

    weights: Float64[np.ndarray, " M"]
    loss: float
    gradient: float
    iterations: int
    converged: bool
    certificate: Certificate


def learn_full_batch(
    second_moments_QMM: Float64[np.ndarray, "Q M M"],
    kept: KeptRows,
    read: Callable[[], Iterable[Piece]],
    *,
    settings: Sequence[FullBatchSettings],
    limit_bytes: int,
    positives: Sequence[Int64[np.ndarray, " _"]] | None = None,
) -> Certification[FullBatchWeights]:
    """Minimise the loss of Algorithm 1 over all queries at once, for one or more settings, reading C a few times in all.

    See the module for what is minimised, `learn_certified` for the arguments, and `learn_weights` for what the losses are.
    The same input gives the same weights. Memory is the kept rows and A_q.

    Raises
    ------
    SpecError
        If there is no query, k is above the number of rows, a start is of other groups, or positives are missing, of no use, or
        of no such row.
    DataError
        If C holds NaN or infinite values, or A_q does though C does not.
    """
    num_queries, num_groups, _ = second_moments_QMM.shape
    refuse_no_query(num_queries)
    wanted = given_positives([each.objective for each in settings], positives, num_queries)
    trajectories = {
        place: Trajectory(_two_visits(each), num_queries=num_queries, num_groups=num_groups, positives=wanted)
        for place, each in enumerate(settings)
    }
    minima: dict[int, _Minimum] = {}

    def run(pending: Mapping[int, Trajectory]) -> None:
        for place, trajectory in pending.items():
            # Uniform weights stay as they are, and the others are found anew.
            trajectory.settled = min(trajectory.settled, num_queries)
            function = _Function(settings[place], trajectory, second_moments_QMM, kept)
            minima[place] = _minimise(settings[place], function, num_groups)

    found = certify(trajectories, run, read, second_moments_QMM=second_moments_QMM, kept=kept, limit_bytes=limit_bytes)
    certified = {}
    for place, certificate in found.certified.items():
        minimum = minima[place]
        certified[place] = FullBatchWeights(
            weights=minimum.weights,
            loss=minimum.loss,
            gradient=minimum.gradient,
            iterations=minimum.iterations,
            converged=minimum.gradient <= settings[place].tolerance,
            certificate=certificate,
        )
    return Certification(certified=certified, uncertified=found.uncertified)


def _two_visits(settings: FullBatchSettings) -> LearnerSettings:
    """Of every query one visit at uniform weights and one at the result."""
    return LearnerSettings(k=settings.k, epochs=2, transform=settings.transform, objective=settings.objective)


class _Minimum(NamedTuple):
    weights: Float64[np.ndarray, " M"]
    loss: float
    gradient: float
    iterations: int


class _Function:
    """F on the kept rows; the trajectory holds the visits that it met last."""

    def __init__(
        self,
        settings: FullBatchSettings,
        trajectory: Trajectory,
        second_moments_QMM: Float64[np.ndarray, "Q M M"],
        kept: KeptRows,
    ) -> None:
        self._settings = settings
        self._trajectory = trajectory
        self._second_moments_QMM = second_moments_QMM
        self._kept = kept
        num_groups = second_moments_QMM.shape[2]
        self._scale = abs(self.loss(np.full(num_groups, 1 / num_groups), epoch=0)[0]) or 1.0

    def loss(self, weights_M: Float64[np.ndarray, " M"], *, epoch: int) -> tuple[float, Float64[np.ndarray, " M"]]:
        """Mean loss of the queries that have one, and its gradient with respect to w_raw."""
        num_queries = len(self._second_moments_QMM)
        losses, gradient_M = list[float](), np.zeros_like(weights_M)
        for step in range(epoch * num_queries, (epoch + 1) * num_queries):
            (visit,) = meet([self._trajectory], weights_M[None], step, self._second_moments_QMM, self._kept)
            if visit is not None and visit.norm > 0:
                normalized = self._settings.objective != "unnormalized"
                loss, of_query_M = loss_and_gradient(visit, weights_M, normalized=normalized)
                losses.append(loss)
                gradient_M += of_query_M
        count = max(1, len(losses))
        return math.fsum(losses) / count, gradient_M / count

    def __call__(self, raw_M: Float64[np.ndarray, " M"]) -> tuple[float, Float64[np.ndarray, " M"]]:
        """F and its gradient."""
        loss, gradient_M = self.loss(softmax(raw_M), epoch=1)
        apart_M, decay = raw_M - raw_M.mean(), self._settings.weight_decay
        value = loss / self._scale + decay / 2 * float(np.square(apart_M).mean())
        return value, gradient_M / self._scale + decay * apart_M / len(raw_M)


def _minimise(settings: FullBatchSettings, function: _Function, num_groups: int) -> _Minimum:
    import torch

    start_M = np.ones(num_groups) if settings.start is None else np.array(settings.start)
    raw = torch.nn.Parameter(torch.from_numpy(raw_weights(start_M, num_groups)))

    def evaluate() -> torch.Tensor:
        value, gradient_M = function(raw.detach().numpy())
        raw.grad = torch.from_numpy(gradient_M)
        return torch.tensor(value, dtype=torch.float64)

    iterations, least = 0, math.inf
    while True:
        left = settings.max_iterations - iterations
        optimizer = torch.optim.LBFGS(
            [raw],
            max_iter=left,
            max_eval=EVALUATIONS * left,
            tolerance_grad=settings.tolerance,
            tolerance_change=LEAST_CHANGE,
            history_size=HISTORY,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(evaluate)  # type: ignore[no-untyped-call]
        iterations += optimizer.state[raw]["n_iter"]
        value, gradient_M = function(raw.detach().numpy())
        gradient = float(np.abs(gradient_M).max())
        # Curvature of another choice of rows may lead nowhere: a new start forgets it.
        if gradient <= settings.tolerance or iterations >= settings.max_iterations or not value < least:
            break
        least = value
    weights_M = softmax(raw.detach().numpy())
    return _Minimum(weights_M, function.loss(weights_M, epoch=1)[0], gradient, iterations)
