"""The learner is Algorithm 1, whatever C looks like, and refuses what has no answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.errors import DataError, SpecError
from gradstore.numerics.learner import (
    LearnedWeights,
    LearnerSettings,
    initial_raw_weights,
    learn_weights,
    loss_and_gradient,
    visit_order,
    visit_query,
)
from gradstore.numerics.scores import Transform
from tests import oracle


def contributions(num_queries: int = 6, num_rows: int = 40, num_groups: int = 5) -> np.ndarray:
    draw = np.random.default_rng(1)
    signal = draw.standard_normal((num_queries, num_rows, 1)) ** 3 * draw.random(num_groups)
    noise = draw.standard_normal((num_queries, num_rows, num_groups)) * (0.5 + 3 * draw.random(num_groups))
    return (signal + noise).astype(np.float32)


def learn(
    c: np.ndarray,
    settings: LearnerSettings,
    rows: int = 9,
    *,
    positives: list[np.ndarray] | None = None,
    rows_N: np.ndarray | None = None,
) -> LearnedWeights:
    def read(query: int) -> Iterator[np.ndarray]:
        for start in range(0, c.shape[1], rows):
            yield c[query, start : start + rows]

    return learn_weights(
        read, num_queries=len(c), num_groups=c.shape[2], settings=settings, positives=positives, rows=rows_N
    )


def expected(c: np.ndarray, settings: LearnerSettings) -> tuple[np.ndarray, list[float]]:
    return oracle.learn(
        c,
        initial_raw_weights(c.shape[2], seed=settings.seed),
        visit_order(len(c), settings),
        k=settings.k,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        square=settings.transform == "square",
        objective=settings.objective,
    )


@pytest.mark.parametrize(
    "settings",
    [
        LearnerSettings(k=1),
        LearnerSettings(k=7, weight_decay=1.5, seed=3, tile=4),
        LearnerSettings(k=40, epochs=2, learning_rate=0.2, weight_decay=0.0),
        LearnerSettings(k=1, transform="square"),
        LearnerSettings(k=7, epochs=3, learning_rate=0.2, transform="square"),
        LearnerSettings(k=40, epochs=2, transform="square"),
        LearnerSettings(k=7, objective="bottom"),
        LearnerSettings(k=1, objective="gap", learning_rate=0.2),
        LearnerSettings(k=30, objective="gap", epochs=3),
        LearnerSettings(k=7, objective="unnormalized", epochs=3),
        LearnerSettings(k=7, objective="unnormalized", transform="square"),
    ],
    ids=str,
)
def test_weights_and_losses_are_those_of_autograd_and_torchs_optimizer(settings: LearnerSettings) -> None:
    c = contributions()

    learned = learn(c, settings)

    weights, losses = expected(c, settings)
    np.testing.assert_allclose(learned.weights, weights, rtol=1e-10)
    np.testing.assert_allclose(learned.losses, losses, rtol=1e-10)
    np.testing.assert_array_equal(learned.weights_per_epoch[-1], learned.weights)
    assert learned.weights_per_epoch.shape == (settings.epochs, 5)
    assert learned.weights.sum() == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("transform", ["none", "square"])
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_pairs_raise_the_scores_of_given_rows(transform: Transform, rows: int) -> None:
    c, settings = contributions(), LearnerSettings(objective="pairs", epochs=3, learning_rate=0.2, transform=transform)
    positives = [[3], [39, 0], [], [8, 9, 10, 17], [20], list(range(40))]
    given = [np.array([*each, *each[:1]], np.int64) for each in positives]  # a pair that is named twice counts once

    learned = learn(c, settings, rows, positives=given)

    raw, visits = initial_raw_weights(5, seed=0), visit_order(6, settings)
    weights, losses = oracle.learn(
        c,
        raw,
        visits,
        k=1,
        learning_rate=0.2,
        weight_decay=0.1,
        square=transform == "square",
        objective="pairs",
        positives=positives,
    )
    np.testing.assert_allclose(learned.weights, weights, rtol=1e-10)
    np.testing.assert_allclose(learned.losses, losses, rtol=1e-10)
    assert np.isnan(losses).sum() == 3


def test_rows_may_have_numbers_with_gaps() -> None:
    c, settings = contributions(), LearnerSettings(objective="pairs", epochs=2)
    numbers = np.flatnonzero(np.arange(80) % 2)
    places = [np.array([query, 39 - query]) for query in range(6)]

    learned = learn(c, settings, positives=[numbers[each] for each in places], rows_N=numbers)

    np.testing.assert_array_equal(learned.weights, learn(c, settings, positives=places).weights)
    with pytest.raises(SpecError, match=r"learn\.pairs: row 6, a positive of query 2, is not among the training rows"):
        learn(c, settings, positives=[np.array([7, 6 + (query != 2)]) for query in range(6)], rows_N=numbers)
    c[1, 7, 2] = np.nan
    with pytest.raises(DataError, match="contributions of query 1: training row 15 of group 2 is nan"):
        learn(c, LearnerSettings(), rows_N=numbers)


def test_pairs_are_given_where_they_are_needed_and_nowhere_else() -> None:
    c, positives = contributions(), [np.array([0])] * 6
    with pytest.raises(SpecError, match=r'learn\.pairs: found none, for learn\.objective = "pairs"'):
        learn(c, LearnerSettings(objective="pairs"))
    with pytest.raises(SpecError, match=r"learn\.pairs: found pairs, for learn\.objective = 'top', which has no use"):
        learn(c, LearnerSettings(), positives=positives)
    with pytest.raises(
        SpecError, match=r"learn\.pairs: row 40, a positive of query [0-5], is not among the training rows"
    ):
        learn(c, LearnerSettings(objective="pairs"), positives=[np.array([3, 40])] * 6)


def test_learning_may_start_at_given_weights() -> None:
    c, start = contributions(), np.array([0.5, 0.1, 0.2, 0.1, 0.1])
    settings = LearnerSettings(k=4, start=tuple(start.tolist()))

    learned = learn(c, settings)

    raw = np.log(start) - np.log(start).mean()
    weights, losses = oracle.learn(c, raw, visit_order(6, settings), k=4, learning_rate=0.01, weight_decay=0.1)
    np.testing.assert_allclose(learned.weights, weights, rtol=1e-10)
    np.testing.assert_allclose(learned.losses, losses, rtol=1e-10)
    twice = LearnerSettings(k=4, start=tuple((2 * start).tolist()))
    np.testing.assert_allclose(learn(c, twice).weights, learned.weights, rtol=1e-12)


def test_a_start_of_zero_is_a_thousandth_of_the_mean() -> None:
    c, start = contributions(), (1.0, 0.0, 0.5, 0.5, 0.5)

    learned = learn(c, LearnerSettings(k=4, start=start, epochs=1, learning_rate=1e-12, weight_decay=0.0))

    np.testing.assert_allclose(learned.weights, np.maximum(start, 5e-4) / np.maximum(start, 5e-4).sum(), rtol=1e-9)


@pytest.mark.parametrize("start", [(), (0.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_a_start_that_is_no_weights_is_refused(start: tuple[float, ...]) -> None:
    with pytest.raises(SpecError, match=r"learn\.start: found weights below 0, not finite, or all 0"):
        LearnerSettings(start=start)


def test_a_start_of_other_groups_is_refused() -> None:
    with pytest.raises(SpecError, match=r"learn\.start: found 3 weights; accepted: one for each of 5 groups"):
        learn(contributions(), LearnerSettings(start=(1.0, 1.0, 1.0)))


def test_the_learning_rate_falls_as_torchs_cosine_schedule() -> None:
    settings = LearnerSettings(k=3, epochs=4, learning_rate=0.1)
    c = contributions()
    raw = torch.nn.Parameter(torch.from_numpy(initial_raw_weights(5, seed=0)))
    optimizer = torch.optim.AdamW([raw], lr=0.1, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4 * 6)
    for _, query in visit_order(6, settings):
        optimizer.zero_grad()
        torch.autograd.backward(oracle.loss(torch.from_numpy(c[query]).double(), raw, 3))
        optimizer.step()
        schedule.step()

    learned = learn(c, settings)

    np.testing.assert_allclose(learned.weights, torch.softmax(raw.detach(), 0).numpy(), rtol=1e-10)


def test_the_gradient_is_that_of_autograd() -> None:
    c_nm = contributions()[0]
    raw = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.softmax(raw.detach(), 0).numpy()

    loss, gradient = loss_and_gradient(visit_query([c_nm], weights, LearnerSettings(k=4), query=0), weights)

    dense = oracle.loss(torch.from_numpy(c_nm).double(), raw, 4)
    (exact,) = torch.autograd.grad(dense, raw)
    assert loss == pytest.approx(dense.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, exact.numpy(), rtol=1e-10, atol=1e-14)


def test_of_squared_scores_the_gradient_is_that_of_autograd_and_the_sign_of_c_does_not_matter() -> None:
    c_nm = contributions()[0]
    raw = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.softmax(raw.detach(), 0).numpy()

    pieces = [c_nm[:11], c_nm[11:]]
    visit = visit_query(pieces, weights, LearnerSettings(k=4, transform="square"), query=0)
    loss, gradient = loss_and_gradient(visit, weights)

    (exact,) = torch.autograd.grad(oracle.loss(torch.from_numpy(c_nm).double(), raw, 4, square=True), raw)
    np.testing.assert_allclose(gradient, exact.numpy(), rtol=1e-10, atol=1e-14)
    flipped = c_nm * np.random.default_rng(0).choice([-1, 1], (len(c_nm), 1)).astype(np.float32)
    other = visit_query([flipped], weights, LearnerSettings(k=4, transform="square"), query=0)
    assert loss_and_gradient(other, weights)[0] == pytest.approx(loss, rel=1e-12)
    assert loss_and_gradient(visit_query([c_nm], weights, LearnerSettings(k=4), query=0), weights)[0] > loss


def test_learning_lowers_the_loss_and_prefers_the_group_with_the_signal() -> None:
    draw = np.random.default_rng(0)
    c = draw.standard_normal((8, 200, 3)).astype(np.float32)
    c[:, :5, 1] += 30  # a few rows stand out in one group alone

    learned = learn(c, LearnerSettings(k=5, learning_rate=0.05, weight_decay=0.0))

    assert learned.weights.argmax() == 1
    assert learned.losses[-8:].mean() < learned.losses[:8].mean()


def test_bottom_is_top_of_minus_c_and_gap_raises_both_ends() -> None:
    c_nm, weights = contributions()[0], np.full(5, 0.2)
    top, bottom, gap = (
        visit_query([c_nm], weights, LearnerSettings(k=3, objective=objective), query=0).raised
        for objective in ("top", "bottom", "gap")
    )

    of_minus_c = visit_query([-c_nm], weights, LearnerSettings(k=3), query=0).raised
    np.testing.assert_array_equal(bottom, of_minus_c)
    np.testing.assert_allclose(gap, top + bottom, rtol=1e-12)


@pytest.mark.parametrize("objective", ["bottom", "gap"])
def test_squared_scores_have_no_lowest(objective: Any) -> None:
    with pytest.raises(SpecError, match=rf"learn\.objective: found '{objective}', for scores that are squared"):
        LearnerSettings(transform="square", objective=objective)


def test_the_scale_of_a_query_does_not_matter() -> None:
    c = contributions()
    scaled = c * np.array([1, 1e-6, 1e6, 3, 1, 1], np.float32)[:, None, None]

    np.testing.assert_allclose(learn(scaled, LearnerSettings()).weights, learn(c, LearnerSettings()).weights, rtol=1e-5)


def test_the_order_of_rows_does_not_matter() -> None:
    c = contributions()

    found = learn(c[:, np.random.default_rng(0).permutation(40)], LearnerSettings())

    np.testing.assert_allclose(found.weights, learn(c, LearnerSettings()).weights, rtol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 12])
def test_of_rows_with_equal_scores_the_first_is_taken_whatever_the_pieces(rows: int) -> None:
    c = np.zeros((1, 12, 2), np.float32)
    c[0, :, 0] = 1
    c[0, :, 1] = np.tile([1, 1 + 2**-20], 6)
    c[0, 3:9, 1] = 1
    c[0, 0] = [2, 0]  # scores as row 2 does at equal weights, with other parts

    pieces = [c[0, start : start + rows] for start in range(0, 12, rows)]
    visit = visit_query(pieces, np.full(2, 0.5), LearnerSettings(k=6), query=0)

    best = oracle.top(oracle.scores(c, np.full(2, 0.5))[0], 6)
    assert best == [1, 9, 11, 0, 2, 3]
    np.testing.assert_allclose(visit.raised, c[0, best].astype(np.float64).mean(0), rtol=1e-15)


def test_a_query_of_zero_norm_takes_no_step() -> None:
    c = contributions()
    c[2] = 0
    settings = LearnerSettings(k=3, epochs=3)

    learned = learn(c, settings)

    weights, losses = expected(c, settings)
    np.testing.assert_allclose(learned.weights, weights, rtol=1e-10)
    np.testing.assert_allclose(learned.losses, losses, rtol=1e-10)
    assert np.isnan(learned.losses).sum() == 3


def test_every_epoch_visits_tiles_as_a_whole_and_every_query_once() -> None:
    visits = visit_order(10, LearnerSettings(epochs=3, tile=4, seed=1))

    epochs = [[query for epoch, query in visits if epoch == wanted] for wanted in range(3)]
    assert [epoch for epoch, _ in visits] == sorted(epoch for epoch, _ in visits)
    for order in epochs:
        assert sorted(order) == list(range(10))
        tiles = [query // 4 for query in order]
        assert len([tile for place, tile in enumerate(tiles) if place == 0 or tiles[place - 1] != tile]) == 3
    assert epochs[0] != epochs[1]
    assert visits == visit_order(10, LearnerSettings(epochs=3, tile=4, seed=1))
    assert visits != visit_order(10, LearnerSettings(epochs=3, tile=4, seed=2))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_contributions_that_are_not_finite_are_refused_by_row_and_group(value: float) -> None:
    c = contributions()
    c[4, 23, 2] = value

    with pytest.raises(DataError, match=r"contributions of query 4: training row 23 of group 2 is (nan|inf)"):
        learn(c, LearnerSettings())


def test_k_above_the_number_of_rows_is_refused() -> None:
    with pytest.raises(SpecError, match=r"learn\.k: found 41; accepted: 1 to 40, the number of training examples"):
        learn(contributions(), LearnerSettings(k=41))


def test_an_empty_query_set_is_refused() -> None:
    with pytest.raises(SpecError, match=r"data\.learn: found 0 queries"):
        learn(contributions(num_queries=0), LearnerSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "learn.k: found 0; accepted: at least 1"),
        ({"epochs": 0}, "learn.epochs: found 0"),
        ({"tile": 0}, "learn.tile: found 0"),
        ({"weight_decay": -0.1}, "learn.weight_decay: found -0.1; accepted: at least 0"),
        ({"weight_decay": float("inf")}, "learn.weight_decay: found inf"),
        ({"learning_rate": 0.0}, "learn.learning_rate: found 0.0; accepted: above 0"),
        ({"learning_rate": float("nan")}, "learn.learning_rate: found nan"),
    ],
)
def test_settings_that_are_not_accepted_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        LearnerSettings(**settings)
