"""Subset-ranking accuracy in cases written out by hand, and its intervals by resamples that are written out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from gradstore.errors import DataError
from gradstore.numerics.metrics import (
    Comparison,
    compare_datamodeling,
    compare_ranking,
    ranking_accuracy,
    subset_ranking,
)
from gradstore.numerics.metrics.intervals import resamples


@pytest.mark.parametrize(
    ("predicted", "outcomes", "wanted"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 21.0], 1.0),
        ([3.0, 2.0, 1.0], [10.0, 20.0, 21.0], 0.0),
        # Of (0, 1), (0, 2) and (1, 2) the last is wrong.
        ([1.0, 3.0, 2.0], [10.0, 20.0, 21.0], 2 / 3),
        # (0, 1) is a tie of predictions, the others are right.
        ([1.0, 1.0, 2.0], [10.0, 20.0, 21.0], 2.5 / 3),
        # (0, 1) is a tie of outcomes and does not count; (0, 2) is right, (1, 2) wrong.
        ([1.0, 3.0, 2.0], [5.0, 5.0, 6.0], 1 / 2),
        ([4.0, 4.0, 4.0], [1.0, 2.0, 3.0], 1 / 2),
    ],
)
def test_accuracy_is_the_share_that_is_counted_by_hand(
    predicted: list[float], outcomes: list[float], wanted: float
) -> None:
    found = ranking_accuracy(np.array([predicted]), np.array([outcomes]))

    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx([wanted])


def test_accuracy_is_of_each_query_and_none_where_outcomes_do_not_vary() -> None:
    predicted = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]], np.float32)
    outcomes = np.array([[0.0, 1.0], [3.0, 3.0], [1.0, 0.0], [1.0, 0.0]], np.float32)

    found = ranking_accuracy(predicted, outcomes)

    assert found == pytest.approx([1, math.nan, 0, 0.5], nan_ok=True)


def test_accuracy_of_what_is_not_finite_is_refused() -> None:
    outcomes = np.array([[1.0, math.nan, 2.0], [math.inf, 1.0, 2.0]])

    with pytest.raises(DataError, match=r"ranking: 2 of 6 outcomes are not finite\. Leave out their queries"):
        ranking_accuracy(np.zeros((2, 3)), outcomes)
    with pytest.raises(DataError, match=r"ranking: 1 of 3 predictions are not finite\. Leave out"):
        ranking_accuracy(np.array([[0.0, -np.inf, 1.0]]), np.zeros((1, 3)))


def accuracy_of_pairs(predicted: Sequence[float], outcomes: Sequence[float]) -> float | None:
    """By a loop over every two places; None where no two outcomes differ."""
    right, pairs = 0.0, 0
    for one, first in enumerate(outcomes):
        for other, second in enumerate(outcomes):
            if first > second:
                pairs += 1
                if predicted[one] == predicted[other]:
                    right += 0.5
                elif predicted[one] > predicted[other]:
                    right += 1
    return right / pairs if pairs else None


def means_written_out(predicted: np.ndarray, actual: np.ndarray, seed: int) -> list[float]:
    """Means of every resample: of queries that are drawn so often, and subsets that stand there as often as they are drawn."""
    subsets, queries = actual.shape
    drawn_subsets = resamples(subsets, what="subsets", seed=seed)
    drawn_queries = resamples(queries, what="queries", seed=seed)
    means = []
    for places, draw in zip(drawn_subsets, drawn_queries, strict=True):
        found = [accuracy_of_pairs([*predicted[query, places]], [*actual[places, query]]) for query in draw]
        kept = [value for value in found if value is not None]
        means.append(sum(kept) / len(kept) if kept else math.nan)
    return means


def assert_as_written_out(
    found: Mapping[str, Comparison], predicted: Mapping[str, np.ndarray], actual: np.ndarray, seed: int
) -> None:
    """Every mean and difference to "first", with its interval, is that of the loops."""
    own = {
        name: np.mean([accuracy_of_pairs([*of[query]], [*actual[:, query]]) for query in range(actual.shape[1])])
        for name, of in predicted.items()
    }
    written = {name: np.array(means_written_out(of, actual, seed)) for name, of in predicted.items()}
    for name, comparison in found.items():
        quantiles = np.nanquantile(written[name], [0.025, 0.975])
        assert tuple(comparison.interval) == pytest.approx((own[name], *quantiles), abs=1e-12)
        if name == "first":
            assert comparison.difference is None
            continue
        assert comparison.difference is not None
        quantiles = np.nanquantile(written[name] - written["first"], [0.025, 0.975])
        assert tuple(comparison.difference) == pytest.approx((own[name] - own["first"], *quantiles), abs=1e-12)


def numbers(comparison: Comparison) -> tuple[tuple[float, ...], tuple[float, ...] | None]:
    """Mean and interval, and those of the difference."""
    difference = comparison.difference
    return tuple(comparison.interval), None if difference is None else tuple(difference)


def drawn(queries: int, subsets: int, *, values: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Predictions that get worse, and outcomes [S, Q]."""
    rng = np.random.default_rng(queries)
    actual = rng.standard_normal((subsets, queries))
    predicted = {
        name: actual.T + noise * rng.standard_normal((queries, subsets))
        for name, noise in (("first", 0.5), ("second", 2.0))
    }
    if values == "with ties":
        # So coarse that some resamples have no two outcomes of a query that differ.
        actual = np.sign(actual) + np.eye(subsets, queries)
        predicted = {name: np.round(of) for name, of in predicted.items()}
    return predicted, actual


@pytest.mark.parametrize("values", ["continuous", "with ties"])
@pytest.mark.parametrize(("queries", "subsets"), [(5, 4), (3, 7), (1, 2)])
def test_means_and_intervals_are_those_of_resamples_that_are_written_out(
    queries: int, subsets: int, values: str
) -> None:
    predicted, actual = drawn(queries, subsets, values=values)

    found = compare_ranking(predicted, actual, against="first", seed=3)

    assert [*found] == ["first", "second"]
    assert_as_written_out(found, predicted, actual, 3)


def test_tiles_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    predicted, actual = drawn(9, 11, values="with ties")
    whole = compare_ranking(predicted, actual, against="first", seed=0)

    for resampled, rows, pairs in ((300, 6, 7), (7, 1, 55), (2000, 512, 1)):
        monkeypatch.setattr(subset_ranking, "_RESAMPLES", resampled)
        monkeypatch.setattr(subset_ranking, "_ROWS", rows)
        monkeypatch.setattr(subset_ranking, "_PAIRS", pairs)
        found = compare_ranking(predicted, actual, against="first", seed=0)
        for name, comparison in whole.items():
            assert found[name].interval == pytest.approx(comparison.interval, abs=1e-14)
            assert found[name].difference == (
                None if name == "first" else pytest.approx(comparison.difference, abs=1e-14)
            )


def test_the_right_order_its_reverse_and_none_are_worth_one_nothing_and_a_half_in_every_resample() -> None:
    _, actual = drawn(4, 6, values="with ties")

    found = compare_ranking(
        {"none": np.zeros((4, 6)), "right": np.exp(actual.T), "reversed": -actual.T}, actual, against="none", seed=0
    )

    assert numbers(found["none"]) == ((0.5, 0.5, 0.5), None)
    assert numbers(found["right"]) == ((1, 1, 1), (0.5, 0.5, 0.5))
    assert numbers(found["reversed"]) == ((0, 0, 0), (-0.5, -0.5, -0.5))


def test_one_query_of_three_subsets_has_the_interval_that_is_counted_by_hand() -> None:
    # Of the pairs (0, 1), (0, 2) and (1, 2) the last is wrong. Of the 27 resamples 6 are of all three subsets, and have 2 / 3;
    # 6 of each pair alone, and have 1, 1 or 0; 3 of one subset, and have none.
    found = compare_ranking({"a": np.array([[1.0, 3.0, 2.0]])}, np.array([[10.0], [20.0], [21.0]]), seed=0)["a"]

    assert found.difference is None
    assert tuple(found.interval) == pytest.approx((2 / 3, 0, 1))


def test_subsets_and_queries_are_both_resampled_as_those_of_lds_are() -> None:
    # Of one query the interval is of subsets alone, of two that are opposites in all, of the queries alone.
    predicted, actual = drawn(1, 12, values="continuous")
    of_subsets = compare_ranking(predicted, actual, seed=0)["second"].interval
    opposites = {"a": np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])}
    actual_of_two = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    found = compare_ranking(opposites, actual_of_two, seed=0)["a"].interval
    of_lds = compare_datamodeling(opposites, actual_of_two, seed=0)["a"].interval

    assert of_subsets.low < of_subsets.mean < of_subsets.high
    assert tuple(found) == (0.5, 0, 1)
    # A resample has an LDS of 1, 0 or -1 where it has an accuracy of 1, 0.5 or 0.
    assert tuple(of_lds) == pytest.approx([2 * value - 1 for value in found])


def test_what_is_the_same_differs_by_nothing_and_what_is_nearly_the_same_is_surer_than_either() -> None:
    predicted, actual = drawn(40, 20, values="continuous")
    predicted |= {"same": predicted["second"], "similar": predicted["second"] + 0.1 * predicted["first"]}

    found = compare_ranking(predicted, actual, against="second", seed=0)

    assert numbers(found["same"])[1] == (0, 0, 0)
    difference, interval = found["similar"].difference, found["similar"].interval
    assert difference is not None
    assert 0 < difference.low < difference.mean < difference.high
    assert difference.mean == pytest.approx(interval.mean - found["second"].interval.mean)
    assert difference.high - difference.low < (interval.high - interval.low) / 2


def test_outcomes_and_predictions_of_any_size_are_compared() -> None:
    # Differences of these are beyond what float64 holds, or vanish beside them.
    actual = np.array([[-1.7e308, 5e-324], [1.7e308, 0.0], [0.0, 1e300]])
    predicted = {"a": actual.T.copy(), "b": -actual.T}

    found = compare_ranking(predicted, actual, against="b", seed=0)

    assert numbers(found["a"]) == ((1, 1, 1), (1, 1, 1))


def test_what_has_no_accuracy_is_not_compared() -> None:
    predicted, actual = drawn(2, 4, values="continuous")

    with pytest.raises(
        DataError, match=r"ranking: found 1 subsets and 2 queries; it needs at least 2 subsets and a query"
    ):
        compare_ranking({name: of[:, :1] for name, of in predicted.items()}, actual[:1], seed=0)
    with pytest.raises(DataError, match="ranking: found 4 subsets and 0 queries"):
        compare_ranking({name: of[:0] for name, of in predicted.items()}, actual[:, :0], seed=0)
    with pytest.raises(DataError, match=r"ranking: 1 of 8 outcomes are not finite\. Leave out their queries"):
        compare_ranking(predicted, np.where(np.arange(8).reshape(4, 2) == 5, np.nan, actual), seed=0)
    predicted["second"][1, 2] = np.inf
    with pytest.raises(DataError, match=r"ranking: 1 of 8 predictions are not finite"):
        compare_ranking(predicted, actual, seed=0)
    actual[:, 1] = 2.0
    with pytest.raises(DataError, match=r"ranking: the outcomes of the queries \[1\] do not vary\. Leave them out"):
        compare_ranking(predicted, actual, seed=0)
