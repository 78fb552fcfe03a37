"""The certified learner gives what the streamed one gives, whatever C, the first guess, the settings and the reads look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.errors import DataError
from gradstore.numerics.learner import (
    Certification,
    CertifiedWeights,
    Descent,
    KeptRows,
    LearnedWeights,
    LearnerSettings,
    learn_certified,
    learn_weights,
    visit_order,
    visit_query,
)
from gradstore.numerics.scores import Transform
from tests.tensors import moments, reader

PLENTY = 2**40
KINDS = ["normal", "ties", "heavy tails", "scales", "zero queries", "copies"]
GUESSES = ["none", "best", "worst", "random", "all"]


def drawn(kind: str, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """C [Q, N, M] of several kinds."""
    draw = np.random.default_rng(seed)
    if kind == "ties":
        return draw.integers(-2, 3, shape).astype(np.float32)
    c = draw.standard_normal(shape)
    if kind == "heavy tails":
        c = c**5
    if kind == "scales":
        c = c * 10.0 ** draw.integers(-9, 9, (shape[0], 1, 1)) * 10.0 ** draw.integers(-3, 3, shape[2])
    if kind == "zero queries":
        c[draw.random(shape[0]) < 0.5] = 0
    if kind == "copies":
        c = c[:, draw.integers(0, max(1, shape[1] // 3), shape[1])]
    return c.astype(np.float32)


def first_guess(c: np.ndarray, kind: str, seed: int, size: int) -> KeptRows:
    draw = np.random.default_rng(seed)
    rows = []
    for c_nm in c:
        order = np.argsort(-c_nm.astype(np.float64).mean(1), kind="stable")
        chosen = {
            "none": order[:0],
            "best": order[:size],
            "worst": order[::-1][:size],
            "random": draw.permutation(len(order))[: draw.integers(0, len(order) + 1)],
            "all": order,
        }[kind]
        rows.append(chosen)
    return KeptRows(rows, [c_nm[chosen] for c_nm, chosen in zip(c, rows, strict=True)], num_groups=c.shape[2])


def positives(shape: tuple[int, int, int], learners: Sequence[LearnerSettings]) -> list[np.ndarray] | None:
    """Rows that pairs raise: of some queries none, of others all."""
    if not any(learner.objective == "pairs" for learner in learners):
        return None
    draw = np.random.default_rng(shape)
    return [draw.permutation(shape[1])[: draw.integers(0, shape[1] + 1)] for _ in range(shape[0])]


def streamed(c: np.ndarray, learner: LearnerSettings) -> LearnedWeights:
    num_queries, _, num_groups = c.shape
    return learn_weights(
        lambda query: [c[query]],
        num_queries=num_queries,
        num_groups=num_groups,
        settings=learner,
        positives=positives(c.shape, [learner]),
    )


def certify(
    c: np.ndarray, kept: KeptRows, *learners: LearnerSettings, **changes: Any
) -> Certification[CertifiedWeights]:
    arguments = {
        "read": reader(c, 7, 2, 0),
        "limit_bytes": PLENTY,
        "positives": positives(c.shape, learners),
        **changes,
    }
    return learn_certified(moments(c), kept, settings=learners, **arguments)


def by_moments(c: np.ndarray, learner: LearnerSettings, noise: float) -> dict[str, np.ndarray]:
    """The streamed learner, but with response and norm from A_q, whose numbers have a relative error of ``noise``."""
    error = np.random.default_rng(0).uniform(-noise, noise, (c.shape[2], c.shape[2]))
    a = moments(c) * (1 + error + error.T)
    descent = Descent(num_queries=len(c), num_groups=c.shape[2], settings=learner)
    losses, weights = [], []
    given = positives(c.shape, [learner])
    for _, query in visit_order(len(c), learner):
        w, visit = descent.weights, None
        if given is None or len(given[query]):
            visit = visit_query([c[query]], w, learner, query=query, positives=None if given is None else given[query])
            norm = np.sqrt(max(0.0, w @ a[query] @ w))
            visit = visit._replace(response=a[query] @ w, norm=float(norm))
        losses.append(descent.step(visit))
        weights.append(descent.weights)
    return {
        "weights": weights[-1],
        "weights_per_epoch": np.array(weights[len(c) - 1 :: len(c)]),
        "losses": np.array(losses),
    }


def assert_equal(found: LearnedWeights, c: np.ndarray, learner: LearnerSettings) -> None:
    """To 1e-12, or to 100 times what an error of 1e-14 in A_q makes where that is more.

    Errors of A_q grow where groups cancel. And Adam divides a gradient by its own size: where it is zero, as for a single
    row, a step is made of rounding.
    """
    expected = streamed(c, learner)
    for name, near in by_moments(c, learner, 1e-14).items():
        wanted = getattr(expected, name)
        slack = 1e-12 + 100 * np.nanmax(np.abs(near - wanted), initial=0)
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=0, atol=slack, err_msg=name)
    assert found.visits == expected.visits


@dataclass
class Case:
    """What a test is drawn from; made in the test, because checks of types draw random numbers that hypothesis must not see."""

    shape: tuple[int, int, int]
    kind: str
    seed: int
    guess: str
    size: int
    settings: list[dict[str, Any]]

    @property
    def learners(self) -> list[LearnerSettings]:
        return [LearnerSettings(**each) for each in self.settings]

    def c(self) -> np.ndarray:
        return drawn(self.kind, self.shape, self.seed)

    def kept(self) -> KeptRows:
        return first_guess(self.c(), self.guess, self.seed, self.size)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(st.integers(1, 30))
    transform: Transform = draw(st.sampled_from(["none", "square"]))
    learner = st.fixed_dictionaries(
        {
            "k": st.integers(1, rows) | st.just(rows),
            "epochs": st.integers(1, 4),
            "learning_rate": st.sampled_from([0.01, 0.3]),
            "weight_decay": st.sampled_from([0.0, 0.1, 1.5]),
            "seed": st.integers(0, 2),
            "tile": st.integers(1, 3),
            "transform": st.just(transform),
            "objective": st.sampled_from(["top", "unnormalized", "pairs"]),
        }
    )
    return Case(
        shape=(draw(st.integers(1, 4)), rows, draw(st.integers(1, 6))),
        kind=draw(st.sampled_from(KINDS)),
        seed=draw(st.integers(0, 2**16)),
        guess=draw(st.sampled_from(GUESSES)),
        size=draw(st.integers(1, 8)),
        settings=draw(st.lists(learner, min_size=1, max_size=4)),
    )


@settings(max_examples=60)
@given(case=cases(), queries=st.integers(1, 4), rows=st.integers(1, 30), seed=st.integers(0, 3))
def test_certified_is_streamed(case: Case, queries: int, rows: int, seed: int) -> None:
    c, seen = case.c(), list[int]()

    def read() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        seen.append(1)
        return reader(c, queries=queries, rows=rows, seed=seed + len(seen))()

    outcome = certify(c, case.kept(), *case.learners, read=read)

    assert outcome.uncertified == {}
    for place, learner in enumerate(case.learners):
        assert_equal(outcome.certified[place].learned, c, learner)
    assert len(seen) == max(certified.certificate.reads for certified in outcome.certified.values())


@pytest.mark.parametrize("transform", ["none", "square"])
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_certified_is_streamed_for_every_k_in_one_grid(kind: str, transform: Transform) -> None:
    c = drawn(kind, (3, 24, 4), seed=5)
    learners = [LearnerSettings(k=k, epochs=3, learning_rate=0.1, transform=transform) for k in range(1, 25)]

    outcome = certify(c, first_guess(c, "best", 0, 4), *learners)

    assert outcome.uncertified == {}
    for place, learner in enumerate(learners):
        assert_equal(outcome.certified[place].learned, c, learner)


@settings(max_examples=8)
@given(
    guess=st.sampled_from(GUESSES),
    ascending=st.booleans(),
    rows=st.sampled_from([20, 64, 500, 800]),
    k=st.sampled_from([1, 20, 300, 800]),
    transform=st.sampled_from(["none", "square"]),
)
def test_certified_is_streamed_where_many_rows_are_found_and_dropped_again(
    guess: str, ascending: bool, rows: int, k: int, transform: Transform
) -> None:
    c = drawn("normal", (2, 800, 5), seed=1)
    if ascending:  # so that each row is better than all before it
        c = np.take_along_axis(c, np.argsort(c.mean(2), axis=1)[:, :, None], 1)
    learners = [LearnerSettings(k=k, epochs=epochs, learning_rate=0.2, transform=transform) for epochs in (1, 3)]
    kept = first_guess(c, guess, 0, 10)

    outcome = certify(c, kept, *learners, read=reader(c, rows=rows, queries=2))

    assert outcome.uncertified == {}
    for place, learner in enumerate(learners):
        assert_equal(outcome.certified[place].learned, c, learner)
    # A row is kept only if it is in the top k of a visit of one of the runs.
    reads = max(certified.certificate.reads for certified in outcome.certified.values())
    assert kept.most <= min(800, 10 + 4 * k * reads) or guess in ("all", "random")


@settings(max_examples=25)
@given(case=cases(), queries=st.integers(1, 4), rows=st.integers(1, 30), seed=st.integers(0, 3))
def test_pieces_and_their_order_never_change_a_bit(case: Case, queries: int, rows: int, seed: int) -> None:
    # No ties: of rows that are equal, the one that is met first may be kept.
    c = drawn("normal", case.shape, case.seed)
    whole_kept, kept = (first_guess(c, case.guess, case.seed, case.size) for _ in range(2))

    whole = certify(c, whole_kept, *case.learners, read=reader(c, queries=4, rows=30))
    found = certify(c, kept, *case.learners, read=reader(c, queries=queries, rows=rows, seed=seed))

    for place in range(len(case.learners)):
        expected, other = whole.certified[place], found.certified[place]
        np.testing.assert_array_equal(other.learned.weights, expected.learned.weights)
        np.testing.assert_array_equal(other.learned.losses, expected.learned.losses)
        assert changed(other.certificate, norm_error=0.0) == changed(expected.certificate, norm_error=0.0)


@settings(max_examples=25)
@given(seed=st.integers(0, 100), guess=st.sampled_from(GUESSES), k=st.integers(1, 20))
def test_the_order_of_rows_never_changes_certified_weights(seed: int, guess: str, k: int) -> None:
    c, learner = drawn("normal", (3, 20, 4), seed), LearnerSettings(k=k, epochs=3, learning_rate=0.1)
    other = c[:, np.random.default_rng(seed).permutation(20)]

    found = certify(other, first_guess(other, guess, seed, 3), learner).certified[0].learned

    expected = certify(c, first_guess(c, guess, seed, 3), learner).certified[0].learned
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-10)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-10)


@settings(max_examples=25)
@given(case=cases(), share=st.floats(0, 1.2))
def test_within_any_limit_a_setting_is_certified_or_named(case: Case, share: float) -> None:
    c, kept = case.c(), case.kept()
    limit = int(share * (c.nbytes + 8 * c.shape[0] * c.shape[1]))
    first_bytes = kept.num_bytes

    outcome = certify(c, kept, *case.learners, limit_bytes=limit)

    assert sorted([*outcome.certified, *outcome.uncertified]) == list(range(len(case.learners)))
    assert kept.num_bytes <= max(limit, first_bytes)
    for place, certified in outcome.certified.items():
        assert_equal(certified.learned, c, case.learners[place])
    assert all(f"more rows than {limit} bytes" in reason for reason in outcome.uncertified.values())
    assert not outcome.uncertified or share < 1


@settings(max_examples=25)
@given(case=cases(), place=st.integers(0, 10**6), value=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_numbers_that_are_not_finite_are_refused_as_by_the_streamed_learner(
    case: Case, place: int, value: float
) -> None:
    c = case.c()
    c.flat[place % c.size] = value
    # A query without pairs is not read where C is streamed.
    learners = [changed(learner, objective="top") for learner in case.learners]
    with pytest.raises(DataError) as expected:
        streamed(c, learners[0])
    good = np.where(np.isfinite(c), c, 0)

    for second_moments in (moments(good), np.full((*c.shape[::2], c.shape[2]), np.nan)):
        for kept in (first_guess(c, "none", 0, 0), first_guess(c, "all", 0, 0)):
            with pytest.raises(DataError) as found:
                learn_certified(second_moments, kept, reader(c, 7, 2, 0), settings=learners, limit_bytes=PLENTY)
            assert str(found.value) == str(expected.value)
