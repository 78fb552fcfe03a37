"""Ways to weights: a few reads of C that certify them, a read for every epoch, or a formula."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.cluster.tasks import one_thread
from gradstore.errors import ResourceError
from gradstore.plan.combinations import LOWEST_OBJECTIVES
from gradstore.plan.sizes import gigabytes
from gradstore.stages.contributions import Contributions
from gradstore.stages.learn.reading import LearnedFrom, TileReader
from gradstore.stages.learn.settings import Candidate
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import MomentsArtifact
from gradstore.store.backend import Storage

if TYPE_CHECKING:
    from gradstore.numerics.learner import KeptRows, LearnedWeights, LearnerSettings
    from gradstore.numerics.scores import Transform
    from gradstore.spec.learning import LearnSection

# Beside the best rows so far as many are collected before they are chosen anew.
_COLLECTED = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Found:
    """Weights of one candidate.

    Attributes
    ----------
    weights
        w [M].
    steps
        How Algorithm 1 came to them; None of other solvers.
    facts
        What the record says of how they were found.
    """

    weights: np.ndarray
    steps: LearnedWeights | None
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """What weights are to be learned of, and how.

    Attributes
    ----------
    learn
        The table of run.toml.
    candidates
        Settings of every weight vector.
    learned_from
        C of the queries to learn from.
    moments
        A_q and candidate rows of it; None where there are none of this C.
    positives
        Rows that are to score best for each of these queries; None where the objective has none.
    tile
        See `LearnerSettings`.
    transform
        What becomes of scores in the end.
    """

    learn: LearnSection
    candidates: Sequence[Candidate]
    learned_from: LearnedFrom
    moments: MomentsArtifact | None
    positives: Sequence[np.ndarray] | None
    tile: int
    transform: Transform

    @property
    def contributions(self) -> Contributions:
        """C of all queries."""
        return self.learned_from.reads.contributions

    @property
    def num_groups(self) -> int:
        """M."""
        return len(self.contributions.shape.groups)

    @property
    def num_queries(self) -> int:
        """Queries to learn from."""
        return len(self.learned_from.queries)

    @property
    def by_formula(self) -> bool:
        """Whether a formula gives the weights or where they begin, which takes the best rows under uniform weights."""
        return "closed_form" in (self.learn.solver, self.learn.begins_at)

    @property
    def certifies(self) -> bool:
        """Whether weights are to be certified, which the objective allows."""
        return self.learn.method == "certified" and self.learn.objective not in LOWEST_OBJECTIVES


def solve(problem: Problem, progress: Progress) -> list[Found]:
    """Find the weights of every candidate.

    Raises
    ------
    SpecError
        If pairs are of no row that is read.
    DataError
        If C holds NaN or infinite values.
    ResourceError
        If rows of C do not fit ``learn.memory`` and the solver cannot do without them.
    """
    learn, guess = problem.learn, None
    if problem.certifies or problem.by_formula or learn.solver != "algorithm_1":
        # Two threads that wait for each other take longer than one, and sums are in one order.
        with one_thread():
            guess = _first_guess(problem)
    if learn.solver == "algorithm_1":
        return _by_steps(problem, guess, progress)
    with one_thread():
        known = _required(guess)
        return _by_formula(problem, known) if learn.solver == "closed_form" else _full_batch(problem, known, progress)


def moments_of(storage: Storage, kernel: str, set_name: str, contributions: Contributions) -> MomentsArtifact | None:
    """A_q and candidates of C, if they are there, whole, and of this C as it is rounded."""
    moments = MomentsArtifact.find_named(storage, kernel, set_name)
    if moments is None or not moments.is_complete():
        return None
    ours, theirs = contributions.rounding, moments.rounding
    if theirs.dtype != ours.dtype or (theirs.scales != ours.scales).any():
        return None
    of_c = {name: value for name, value in contributions.settings.items() if name != "shape"}
    return moments if all(moments.settings.get(name) == value for name, value in of_c.items()) else None


_Guess = tuple[np.ndarray, "KeptRows"]
"""A_q, float64 [Q, M, M], and rows to begin with."""


def _first_guess(problem: Problem) -> _Guess | str:
    """A_q and the rows that score best at the first weights, or, where a formula asks for it, under uniform ones.

    Of what `contribute` made while it built C; or of a read of C. Or why they cannot be had: they do not fit.
    """
    from gradstore.numerics.learner import initial_weights
    from gradstore.numerics.moments import first_guess, kept_rows, read_best_rows

    groups, limit, moments = problem.num_groups, problem.learn.memory_bytes, problem.moments
    weights_M = np.full(groups, 1 / groups)
    if not problem.by_formula:
        weights_M = initial_weights(groups, seed=problem.candidates[0].seed)
    count = min(kept_rows(max(problem.learn.ks)), len(problem.contributions.valid_rows()))
    if moments is not None and not problem.by_formula:
        return _stored_guess(problem, moments, weights_M, count)
    rows_bytes = _COLLECTED * problem.num_queries * count * (4 * groups + 8)
    taken = rows_bytes + (8 * problem.num_queries * groups**2 if moments is None else 0)
    if taken > limit:
        return f"rows to begin with and A_q take {gigabytes(taken)}, more than learn.memory"
    read, queries, transform = problem.learned_from.read, problem.num_queries, problem.transform
    if moments is None:
        return first_guess(read, weights_M, count=count, transform=transform, num_queries=queries)
    kept = read_best_rows(read, weights_M, count=count, transform=transform, num_queries=queries)
    return _of_queries(moments.read_second_moments(), problem.learned_from.queries), kept


def _stored_guess(problem: Problem, moments: MomentsArtifact, weights_M: np.ndarray, count: int) -> _Guess | str:
    """A_q over all rows, and of the candidates of all spans those that score best."""
    from gradstore.numerics.learner import best_rows

    shape, queries = moments.shape, problem.learned_from.queries
    of_span = shape.queries * shape.candidates * (4 * len(shape.groups) + 8)
    if of_span > problem.learn.memory_bytes:
        return f"{moments.folder} has {gigabytes(of_span)} of rows to begin with in every span, more than learn.memory"
    total_QMM = np.zeros((shape.queries, len(shape.groups), len(shape.groups)))

    def choices() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for span in range(shape.num_spans):
            found = moments.read_span(span)
            np.add(total_QMM, found.second_moments, out=total_QMM)
            yield _of_queries(found.rows, queries), _of_queries(found.candidates, queries)

    kept = best_rows(choices(), weights_M, count=count, transform=problem.transform)
    return _of_queries(total_QMM, queries), kept


def _of_queries(values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return values if len(values) == len(queries) else values[queries]


def _by_steps(problem: Problem, guess: _Guess | str | None, progress: Progress) -> list[Found]:
    """Algorithm 1, certified where that can be done; else streamed, and the reader is told why."""
    starts = {k: _start(problem, guess, k) for k in problem.learn.ks}
    settings = [_steps(problem, candidate, starts[candidate.k]) for candidate in problem.candidates]
    found, reasons = dict[int, Found](), list[str]()
    if not problem.certifies:
        lowest = problem.learn.objective in LOWEST_OBJECTIVES and problem.learn.method == "certified"
        reasons = [f"its objective {problem.learn.objective!r} asks for the lowest scores too"] if lowest else []
    elif isinstance(guess, str):
        reasons = [guess]
    else:
        found, reasons = _certified(problem, _required(guess), settings)
        _tell_certified([*found.values()], len(settings), progress)
    of = f" for each of {len(settings) - len(found)} candidates" if len(settings) > 1 else ""
    for reason in dict.fromkeys(reasons):
        progress.note(f"weights are not certified but streamed, in {problem.learn.epochs} reads of C{of}: {reason}")
    return [found.get(place) or _streamed(problem, each, progress) for place, each in enumerate(settings)]


def _certified(
    problem: Problem, guess: _Guess, settings: Sequence[LearnerSettings]
) -> tuple[dict[int, Found], list[str]]:
    """Those that can be certified, by place, and why others cannot."""
    from gradstore.numerics.learner import learn_certified

    with one_thread():
        outcome = learn_certified(
            *guess,
            problem.learned_from.read,
            settings=settings,
            limit_bytes=problem.learn.memory_bytes,
            positives=problem.positives,
        )
    found = {}
    for place, made in outcome.certified.items():
        facts = {"method": "certified", **asdict(made.certificate)}
        found[place] = Found(weights=made.learned.weights, steps=made.learned, facts=facts)
    return found, [*outcome.uncertified.values()]


def _steps(problem: Problem, candidate: Candidate, start: tuple[float, ...] | None) -> LearnerSettings:
    from gradstore.numerics.learner import LearnerSettings

    return LearnerSettings(
        k=candidate.k,
        epochs=problem.learn.epochs,
        learning_rate=problem.learn.learning_rate,
        weight_decay=candidate.weight_decay,
        seed=candidate.seed,
        tile=problem.tile,
        transform=problem.transform,
        objective=problem.learn.objective,
        start=start,
    )


def _start(problem: Problem, guess: _Guess | str | None, k: int) -> tuple[float, ...] | None:
    """Weights to begin with; None for random ones."""
    if problem.learn.begins_at == "random":
        return None
    if problem.learn.begins_at == "uniform":
        return (1 / problem.num_groups,) * problem.num_groups
    return tuple(_formula(problem, _required(guess), k).tolist())


def _formula(problem: Problem, guess: _Guess, k: int) -> np.ndarray:
    from gradstore.numerics.learner import closed_form_weights

    num_rows = len(problem.contributions.valid_rows())
    return closed_form_weights(*guess, k=k, num_rows=num_rows, transform=problem.transform)


def _by_formula(problem: Problem, guess: _Guess) -> list[Found]:
    return [
        Found(weights=_formula(problem, guess, candidate.k), steps=None, facts={"method": "closed_form", "reads": 1})
        for candidate in problem.candidates
    ]


def _full_batch(problem: Problem, guess: _Guess, progress: Progress) -> list[Found]:
    from gradstore.numerics.learner import FullBatchSettings, initial_weights, learn_full_batch

    starts = {k: _start(problem, guess, k) for k in problem.learn.ks}
    settings = [
        FullBatchSettings(
            k=each.k,
            weight_decay=each.weight_decay,
            transform=problem.transform,
            objective=problem.learn.objective,
            start=starts[each.k] or tuple(initial_weights(problem.num_groups, seed=each.seed).tolist()),
        )
        for each in problem.candidates
    ]
    outcome = learn_full_batch(
        *guess,
        problem.learned_from.read,
        settings=settings,
        limit_bytes=problem.learn.memory_bytes,
        positives=problem.positives,
    )
    for reason in outcome.uncertified.values():
        raise _too_little_memory(reason)
    found = []
    for place in range(len(settings)):
        made = outcome.certified[place]
        if not made.converged:
            progress.note(
                f"the full-batch solver stopped after {made.iterations:,} iterations, where the gradient was "
                f"{made.gradient:.2g}, above its tolerance of {settings[place].tolerance:.2g}"
            )
        facts = {key: getattr(made, key) for key in ("loss", "gradient", "iterations", "converged")}
        facts |= {"method": "certified", **asdict(made.certificate)}
        found.append(Found(weights=made.weights, steps=None, facts=facts))
    _tell_certified(found, len(found), progress)
    return found


def _streamed(problem: Problem, settings: LearnerSettings, progress: Progress) -> Found:
    """Find the weights by a read of C for every epoch."""
    from gradstore.numerics.learner import learn_weights

    with progress.stage("learn, by streaming", settings.epochs * problem.num_queries, "steps") as advance:
        learned = learn_weights(
            TileReader(problem.learned_from, settings.tile, advance).read,
            num_queries=problem.num_queries,
            num_groups=problem.num_groups,
            settings=settings,
            positives=problem.positives,
            rows=problem.contributions.valid_rows(),
        )
    facts = {"method": "streamed", "reads": settings.epochs}
    return Found(weights=learned.weights, steps=learned, facts=facts)


def _tell_certified(found: Sequence[Found], candidates: int, progress: Progress) -> None:
    if not found:
        return
    last = max((each.facts for each in found), key=lambda facts: facts["reads"])
    of = f"{len(found)} of {candidates} candidates " if candidates > 1 else ""
    progress.note(
        f"{of}certified by {last['reads']} reads of C; {last['kept_rows']:,} rows of a query at most were kept, "
        f"{gigabytes(last['kept_bytes'])} in all"
    )


def _required(guess: _Guess | str | None) -> _Guess:
    """What cannot be done without.

    Raises
    ------
    ResourceError
        If it does not fit.
    """
    assert guess is not None, "it was looked for where it is needed"
    if isinstance(guess, str):
        raise _too_little_memory(guess)
    return guess


def _too_little_memory(reason: str) -> ResourceError:
    return ResourceError(
        f'learn.memory: {reason}. Raise it, or lower learn.k or data.learn.rows; or set solver = "algorithm_1" and leave '
        "learn.start out: C is then streamed where its rows do not fit."
    )
