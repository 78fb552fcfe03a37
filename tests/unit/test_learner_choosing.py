"""Weights by a formula, rows that are best at given weights, and weights judged by queries that they were not learned from."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from gradstore.errors import DataError, SpecError
from gradstore.numerics.learner import KeptRows, closed_form_weights, gain, judge
from gradstore.numerics.moments import first_guess, read_best_rows
from gradstore.numerics.scores import Transform
from tests import oracle
from tests.tensors import moments, reader

TRANSFORMS: list[Transform] = ["none", "square"]


def contributions(num_queries: int = 6, num_rows: int = 60, num_groups: int = 5, seed: int = 1) -> np.ndarray:
    draw = np.random.default_rng(seed)
    signal = draw.standard_normal((num_queries, num_rows, 1)) ** 3 * (draw.random(num_groups) - 0.2)
    noise = draw.standard_normal((num_queries, num_rows, num_groups)) * (0.5 + 3 * draw.random(num_groups))
    return (signal + noise).astype(np.float32)


def whole(c: np.ndarray) -> KeptRows:
    return KeptRows([np.arange(c.shape[1])] * len(c), list(c), num_groups=c.shape[2])


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("k", [1, 7, 60])
def test_the_closed_form_is_signal_over_noise_of_every_group(transform: Transform, k: int) -> None:
    c = contributions()
    c[2] = 0

    found = closed_form_weights(moments(c), whole(c), k=k, num_rows=60, transform=transform)

    np.testing.assert_allclose(found, oracle.closed_form(c, k, square=transform == "square"), rtol=1e-10)
    assert len(set(found)) > 2


def test_of_independent_noise_and_one_signal_the_closed_form_nearly_minimises_the_loss() -> None:
    draw = np.random.default_rng(0)
    alpha, sigma = np.array([0.5, 1, 1, 2]), np.array([1, 1, 2, 0.5])
    influence = np.zeros((1, 4000, 1))
    influence[0, :20] = 20
    c = (alpha * influence + sigma * draw.standard_normal((1, 4000, 4))).astype(np.float32)

    found = closed_form_weights(moments(c), whole(c), k=20, num_rows=4000, transform="none")

    # The signal's own square is part of what is taken for noise.
    variance = sigma**2 + alpha**2 * 20**2 * 20 / 4000
    np.testing.assert_allclose(found, alpha / variance / (alpha / variance).sum(), rtol=0.1)
    best = oracle.judged(c, found, 20, [0])
    assert best > oracle.judged(c, np.full(4, 0.25), 20, [0])


def test_a_group_of_negative_signal_weighs_nothing_and_where_none_has_a_signal_all_weigh_the_same() -> None:
    c = contributions()
    c[:, :, 1] = -np.abs(c[:, :, 1]) * 1e-3
    c[:, :, 3] = 0

    found = closed_form_weights(moments(c), whole(c), k=3, num_rows=60, transform="none")

    assert found[1] == found[3] == 0
    assert found.sum() == pytest.approx(1)
    for nothing in (np.zeros_like(c), -np.abs(c)):
        same = closed_form_weights(moments(nothing), whole(nothing), k=60, num_rows=60, transform="none")
        np.testing.assert_array_equal(same, np.full(5, 0.2))


def test_the_scale_of_a_query_has_no_say_in_the_closed_form() -> None:
    c = contributions()
    other = c * np.array([1, 2**-20, 2**20, 4, 1, 1], np.float32)[:, None, None]

    found, expected = (
        closed_form_weights(moments(each), whole(each), k=3, num_rows=60, transform="none") for each in (other, c)
    )

    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_closed_form_of_more_rows_than_there_are_is_refused() -> None:
    c = contributions()
    with pytest.raises(SpecError, match=r"learn\.k: found 61; accepted: 1 to 60, the number of training examples"):
        closed_form_weights(moments(c), whole(c), k=61, num_rows=60, transform="none")
    with pytest.raises(SpecError, match=r"data\.learn: found 0 queries"):
        closed_form_weights(moments(c[:0]), whole(c[:0]), k=3, num_rows=60, transform="none")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("rows", "queries", "count"), [(1, 1, 4), (7, 4, 1), (60, 6, 20), (16, 2, 60), (16, 2, 99)])
def test_best_rows_are_those_of_exact_scores_whatever_the_pieces(
    transform: Transform, rows: int, queries: int, count: int
) -> None:
    c, w = contributions(), np.array([0.1, 0.3, 0.2, 0.25, 0.15])
    c[1, 20:40] = c[1, 3]  # ties, of which the first are taken
    c[3] = np.round(c[3])

    second_moments, kept = first_guess(
        reader(c, rows, queries, seed=count), w, count=count, transform=transform, num_queries=6
    )

    alone = read_best_rows(reader(c, rows, queries, seed=0), w, count=count, transform=transform, num_queries=6)
    scores = oracle.scores(c, w)
    for query in range(6):
        placing = np.abs(scores[query]) if transform == "square" else scores[query]
        assert kept.rows(query).tolist() == alone.rows(query).tolist() == sorted(oracle.top(placing, count))
        np.testing.assert_array_equal(kept.c(query), c[query, kept.rows(query)])
    np.testing.assert_allclose(second_moments, moments(c), rtol=1e-5, atol=1e-3)


def test_with_best_rows_of_uniform_weights_the_closed_form_is_that_of_all_rows() -> None:
    c = contributions(num_rows=500)

    kept = read_best_rows(reader(c, 33, 4, 0), np.full(5, 0.2), count=8, transform="none", num_queries=6)
    found = closed_form_weights(moments(c), kept, k=8, num_rows=500, transform="none")

    assert kept.most == 8
    expected = closed_form_weights(moments(c), whole(c), k=8, num_rows=500, transform="none")
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("rows", [1, 13, 2000])
def test_weights_are_judged_by_the_mean_of_the_top_scores_over_the_norm(transform: Transform, rows: int) -> None:
    c, ks, queries = contributions(num_queries=4, num_rows=1700, num_groups=3), [1, 12, 1500], np.array([3, 0])
    weights = np.random.default_rng(0).dirichlet(np.ones(3), 4)

    found = judge(reader(c, rows, 3, 0), weights, ks, queries=queries, transform=transform)

    expected = [[oracle.judged(c, each, k, [0, 3], square=transform == "square") for k in ks] for each in weights]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_query_without_scores_is_judged_0() -> None:
    c = contributions()
    c[1] = 0

    found = judge(reader(c, 16, 4, 0), np.full((1, 5), 0.2), [4], queries=np.array([1, 2]), transform="none")

    assert found[0, 0] == pytest.approx(oracle.judged(c, np.full(5, 0.2), 4, [2]) / 2)


def test_memory_does_not_grow_with_rows() -> None:
    weights, peaks = np.random.default_rng(0).dirichlet(np.ones(8), 20), []
    for num_rows in (10_000, 40_000):
        c = np.random.default_rng(0).standard_normal((2, num_rows, 8)).astype(np.float32)
        tracemalloc.start()
        judge(reader(c, 1000, 4, 0), weights, [50], queries=np.arange(2), transform="none")
        read_best_rows(reader(c, 1000, 4, 0), weights[0], count=50, transform="none", num_queries=2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert peaks[1] < peaks[0] + 2**18


def test_what_cannot_be_judged_is_refused() -> None:
    c, uniform = contributions(), np.full((1, 5), 0.2)
    with pytest.raises(SpecError, match=r"learn\.k: found 61; accepted: 1 to 60"):
        judge(reader(c, 16, 4, 0), uniform, [3, 61], queries=np.array([2]), transform="none")
    with pytest.raises(SpecError, match=r"data\.learn: found 0 queries"):
        judge(reader(c, 16, 4, 0), uniform, [3], queries=np.array([], np.int64), transform="none")
    c[4, 23, 2] = np.nan
    with pytest.raises(DataError, match="contributions of query 4: training row 23 of group 2 is nan"):
        judge(reader(c, 16, 4, 0), uniform, [3], queries=np.array([4]), transform="none")
    with pytest.raises(DataError, match="contributions of query 4: training row 23 of group 2 is nan"):
        read_best_rows(reader(c, 16, 4, 0), uniform[0], count=3, transform="none", num_queries=6)


def test_gain_is_the_mean_ratio_to_uniform_weights() -> None:
    judged, uniform = np.array([[0.4, 0.01], [0.2, 0.03]]), np.array([0.2, 0.01])

    np.testing.assert_allclose(gain(judged, uniform), [(2 + 1) / 2, (1 + 3) / 2])


def test_gain_grows_where_uniform_weights_are_judged_below_0_too() -> None:
    found = gain(np.array([[-0.1], [-0.2], [0.1]]), np.array([-0.2]))

    np.testing.assert_allclose(found, [1.5, 1, 2.5])


def test_no_gain_over_nothing() -> None:
    with pytest.raises(DataError, match="contributions of the held-out queries: all scores are zero"):
        gain(np.array([[0.1, 0.2]]), np.array([0.0, 0.1]))
