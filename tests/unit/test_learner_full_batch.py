"""The full-batch solver ends at a minimum of the loss with the whole of C, whatever rows it began with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gradstore.errors import DataError, SpecError
from gradstore.numerics.learner import (
    Certification,
    FullBatchSettings,
    FullBatchWeights,
    Objective,
    learn_full_batch,
)
from gradstore.numerics.moments import first_guess, kept_rows
from gradstore.numerics.scores import Transform
from tests import oracle
from tests.tensors import contributions, keep, moments, reader

PLENTY = 2**40
POSITIVES = [np.array(rows, np.int64) for rows in ([3], [59, 0], [], [8, 9, 10, 17], [20, 21], [5, 6])]

SETTINGS = [
    FullBatchSettings(k=1),
    FullBatchSettings(k=7, weight_decay=0.3),
    FullBatchSettings(k=20, weight_decay=0.003),
    FullBatchSettings(k=60, weight_decay=1.5),
    FullBatchSettings(k=7, transform="square"),
    FullBatchSettings(k=1, transform="square", weight_decay=0.0),
    FullBatchSettings(k=7, objective="unnormalized", weight_decay=0.1),
    FullBatchSettings(objective="pairs"),
    FullBatchSettings(objective="pairs", transform="square", weight_decay=0.1),
    FullBatchSettings(k=5, start=(0.6, 0.1, 0.1, 0.1, 0.1)),
]


def solve(c: np.ndarray, *settings: FullBatchSettings, rows: list[int] | None = None) -> list[FullBatchWeights]:
    pairs = any(each.objective == "pairs" for each in settings)
    outcome = learn_full_batch(
        moments(c),
        keep(c, rows or []),
        reader(c),
        settings=settings,
        limit_bytes=PLENTY,
        positives=POSITIVES if pairs else None,
    )
    assert outcome.uncertified == {}
    return [outcome.certified[place] for place in range(len(settings))]


def function(c: np.ndarray, settings: FullBatchSettings) -> Callable[[np.ndarray], float]:
    def value(raw: np.ndarray) -> float:
        return oracle.full_batch(
            c,
            raw,
            settings.k,
            settings.weight_decay,
            square=settings.transform == "square",
            objective=settings.objective,
            positives=[rows.tolist() for rows in POSITIVES] if settings.objective == "pairs" else None,
        )

    return value


def slopes(value: Callable[[np.ndarray], float], raw: np.ndarray) -> np.ndarray:
    """Of central differences."""
    steps = 1e-6 * np.eye(len(raw))
    return np.array([(value(raw + step) - value(raw - step)) / 2e-6 for step in steps])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_solver_ends_at_a_minimum_of_the_loss(settings: FullBatchSettings) -> None:
    c = contributions()
    c[4] *= 1e-3

    (found,) = solve(c, settings)

    value, raw = function(c, settings), np.log(found.weights)
    least = value(raw)
    assert found.converged
    assert found.gradient <= settings.tolerance
    np.testing.assert_allclose(slopes(value, raw), 0, atol=1e-6)
    draw = np.random.default_rng(0)
    for size in (1e-4, 1e-3, 1e-2):
        for _ in range(5):
            assert value(raw + size * draw.standard_normal(5)) >= least - 10 * size * settings.tolerance
    assert least < value(np.zeros(5))
    assert found.weights.sum() == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_loss_and_gradient_on_the_way_are_those_of_plain_loops(settings: FullBatchSettings) -> None:
    c = contributions()
    c[3] = 0
    changes: dict[str, Any] = {name: getattr(settings, name) for name in settings.__slots__}

    (found,) = solve(c, FullBatchSettings(**{**changes, "max_iterations": 1, "tolerance": 0.0}))

    assert not found.converged
    assert found.iterations == 1
    value, raw = function(c, settings), np.log(found.weights)
    assert found.gradient == pytest.approx(np.abs(slopes(value, raw)).max(), rel=1e-4)
    if settings.objective == "top":
        square = settings.transform == "square"
        expected = -oracle.judged(c, found.weights, settings.k, [0, 1, 2, 4, 5], square=square)
        assert found.loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rows", [[], [0, 1, 2], list(range(30, 60)), list(range(60))])
def test_whatever_rows_are_kept_first_it_is_a_minimum_with_the_whole_of_c(rows: list[int]) -> None:
    c, settings = contributions(), [SETTINGS[place] for place in (1, 4, 6, 7)]

    for found, each in zip(solve(c, *settings, rows=rows), settings, strict=True):
        np.testing.assert_allclose(slopes(function(c, each), np.log(found.weights)), 0, atol=1e-6)
        assert found.certificate.reads == len(found.certificate.added)
        assert (found.certificate.added[0] > 0) == (len(rows) < 60)


@pytest.mark.parametrize("transform", ["none", "square"])
def test_from_the_best_rows_of_uniform_weights_it_is_the_minimum_of_all_rows_in_any_order(transform: Transform) -> None:
    c = contributions(num_rows=500)
    other = c[:, np.random.default_rng(0).permutation(500)]
    settings = [FullBatchSettings(k=k, weight_decay=0.02, transform=transform) for k in (3, 10)]

    def solved(c: np.ndarray, count: int) -> Certification[FullBatchWeights]:
        second_moments, kept = first_guess(reader(c), np.full(5, 0.2), count=count, transform=transform, num_queries=6)
        return learn_full_batch(second_moments, kept, reader(c), settings=settings, limit_bytes=PLENTY)

    whole, found, permuted = solved(c, 500), solved(c, kept_rows(1)), solved(other, kept_rows(1))

    for place in range(2):
        expected = whole.certified[place].weights
        np.testing.assert_allclose(found.certified[place].weights, expected, atol=1e-5)
        np.testing.assert_allclose(permuted.certified[place].weights, expected, atol=1e-5)
    assert found.certified[1].certificate.added[0] > 0


def test_the_same_input_gives_the_same_bits() -> None:
    c = contributions()

    first, second = (solve(c, *SETTINGS[:2], SETTINGS[6]) for _ in range(2))

    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.weights, other.weights)
        assert one.certificate == other.certificate


def test_a_larger_decay_gives_weights_nearer_to_uniform_whatever_the_scale_of_the_scores() -> None:
    c, decays = contributions(), (0.01, 0.1, 1.0, 100.0)

    cases: list[tuple[float, Objective]] = [(1, "top"), (1, "unnormalized"), (1e-5, "unnormalized")]
    for scale, objective in cases:
        settings = [FullBatchSettings(k=5, weight_decay=decay, objective=objective) for decay in decays]
        spreads = [np.log(each.weights).std() for each in solve(scale * c, *settings)]
        assert spreads == sorted(spreads, reverse=True)
        assert spreads[-1] < 0.01 < spreads[0]


def test_a_query_without_scores_changes_nothing() -> None:
    c = contributions()
    more = np.concatenate([c, np.zeros_like(c[:1])])

    (found,), (expected,) = solve(more, FullBatchSettings(k=4)), solve(c, FullBatchSettings(k=4))

    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-6)
    (nothing,) = solve(np.zeros_like(c), FullBatchSettings(k=4))
    np.testing.assert_allclose(nothing.weights, 0.2)
    assert nothing.converged


def test_past_the_limit_there_are_no_weights_but_a_reason() -> None:
    c = contributions()

    outcome = learn_full_batch(moments(c), keep(c, []), reader(c), settings=[FullBatchSettings(k=30)], limit_bytes=2000)

    assert outcome.certified == {}
    assert "it needs more rows than 2000 bytes hold" in outcome.uncertified[0]


def test_what_cannot_be_solved_is_refused() -> None:
    c = contributions()
    with pytest.raises(SpecError, match=r"learn\.k: found 61; accepted: 1 to 60, the number of training examples"):
        solve(c, FullBatchSettings(k=61))
    with pytest.raises(SpecError, match=r"data\.learn: found 0 queries"):
        solve(c[:0], FullBatchSettings())
    with pytest.raises(SpecError, match=r"learn\.start: found 2 weights; accepted: one for each of 5 groups"):
        solve(c, FullBatchSettings(start=(0.5, 0.5)))
    with pytest.raises(SpecError, match=r'learn\.pairs: found none, for learn\.objective = "pairs"'):
        learn_full_batch(
            moments(c), keep(c, []), reader(c), settings=[FullBatchSettings(objective="pairs")], limit_bytes=PLENTY
        )
    bad = c.copy()
    bad[4, 23, 2] = np.nan
    with pytest.raises(DataError, match="contributions of query 4: training row 23 of group 2 is nan"):
        learn_full_batch(moments(c), keep(c, []), reader(bad), settings=[FullBatchSettings()], limit_bytes=PLENTY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, r"learn\.k: found 0; accepted: at least 1"),
        ({"max_iterations": 0}, r"learn\.max_iterations: found 0"),
        ({"weight_decay": -0.1}, r"learn\.weight_decay: found -0\.1; accepted: at least 0"),
        ({"tolerance": float("nan")}, r"learn\.tolerance: found nan"),
        ({"objective": "gap"}, r"learn\.objective: found 'gap', for the full-batch solver"),
        ({"start": (0.0,)}, r"learn\.start: found weights below 0, not finite, or all 0"),
    ],
)
def test_settings_that_are_not_accepted_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        FullBatchSettings(**settings)
