"""AUC, recall@k and reciprocal ranks: by hand, and against scikit-learn, sorting and loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from gradstore.errors import DataError
from gradstore.numerics.metrics import (
    RankSearch,
    area_under_curve,
    compare_detection,
    precision_of_ranks,
    recall_at_k,
    reciprocal_rank,
)


def test_auc_by_hand() -> None:
    wanted = np.array([True, False, True, False])

    assert area_under_curve(np.array([4.0, 1.0, 3.0, 2.0]), wanted) == 1
    assert area_under_curve(np.array([1.0, 4.0, 2.0, 3.0]), wanted) == 0
    # Of four pairs one is in order, two are equal, one is not.
    assert area_under_curve(np.array([2.0, 2.0, 3.0, 3.0]), wanted) == 0.5
    assert area_under_curve(np.array([2.0, 1.0, 2.0, 3.0]), wanted) == 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auc_is_scikit_learns_also_with_ties(dtype: type) -> None:
    rng = np.random.default_rng(0)
    wanted = rng.random(200) < 0.1
    scores: np.ndarray = np.round(rng.standard_normal(200) + 0.5 * wanted, 1).astype(dtype)

    assert area_under_curve(scores, wanted) == pytest.approx(roc_auc_score(wanted, scores), abs=1e-12)


def test_the_interval_of_an_auc_is_as_wide_as_draws_are_apart_and_chance_is_in_that_of_shuffled_scores() -> None:
    rng = np.random.default_rng(0)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        wanted = np.arange(300) < 60
        return rng.standard_normal(300) + wanted, wanted

    spread = np.std([area_under_curve(*draw()) for _ in range(400)])
    scores, wanted = draw()

    found = compare_detection(
        {"scores": scores, "shuffled": rng.permutation(scores)}, wanted, against="shuffled", seed=0
    )

    mean, low, high = found["scores"].interval
    assert mean == area_under_curve(scores, wanted)
    assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.2)
    assert found["shuffled"].interval.low < 0.5 < found["shuffled"].interval.high
    assert found["shuffled"].difference is None
    difference = found["scores"].difference
    assert difference is not None
    assert 0 < difference.low < difference.mean == mean - found["shuffled"].interval.mean < difference.high


def test_an_auc_without_both_kinds_or_of_what_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match="AUC: 3 of 3 examples are to be found; it needs some of both"):
        area_under_curve(np.ones(3), np.ones(3, bool))
    with pytest.raises(DataError, match="AUC: 0 of 3 examples"):
        compare_detection({"a": np.ones(3)}, np.zeros(3, bool), seed=0)
    with pytest.raises(DataError, match="AUC: 1 of 3 scores are not finite"):
        area_under_curve(np.array([1, np.nan, 2]), np.array([True, False, False]))


def searched(scores: np.ndarray, wanted: list[np.ndarray], pieces: list[np.ndarray]) -> list[np.ndarray]:
    search = RankSearch(wanted)
    for step in (search.find, search.count):
        for rows in pieces:
            step(scores[:1][:, rows], rows)
            step(scores[1:][:, rows], rows, first=1)
    return search.ranks()


@pytest.mark.parametrize("digits", [None, 1, 0], ids=["different", "some equal", "most equal"])
def test_ranks_are_those_of_a_stable_sort_in_whatever_pieces_scores_come(digits: int | None) -> None:
    rng = np.random.default_rng(3)
    scores = rng.standard_normal((4, 50))
    if digits is not None:
        scores = np.round(scores, digits)
    wanted = [np.array([0, 7, 49]), np.array([], np.int64), np.array([12]), np.arange(50)]

    for pieces in ([np.arange(50)], np.array_split(np.arange(50), 7)):
        found = searched(scores, wanted, pieces)

        for row, asked, ranks in zip(scores, wanted, found, strict=True):
            order = np.argsort(-row, kind="stable").tolist()
            assert ranks.tolist() == [order.index(example) + 1 for example in asked]


def test_an_example_that_never_came_by_is_told() -> None:
    with pytest.raises(DataError, match=r"recall: query 0: the examples \[5\] have no score"):
        searched(np.ones((1, 4)), [np.array([2, 5])], [np.arange(4)])


def test_recall_precision_and_reciprocal_rank_by_hand() -> None:
    ranks = np.array([9, 2, 30, 4])

    assert [recall_at_k(ranks, k=k) for k in (1, 2, 4, 9, 30)] == [0, 0.25, 0.5, 0.75, 1]
    assert [precision_of_ranks(ranks, k=k) for k in (1, 2, 4, 10, 30)] == [0, 0.5, 0.5, 0.3, 4 / 30]
    assert reciprocal_rank(ranks) == 0.5
    for measure in (
        reciprocal_rank,
        lambda ranks: recall_at_k(ranks, k=1),
        lambda ranks: precision_of_ranks(ranks, k=1),
    ):
        with pytest.raises(DataError, match="without known contributors"):
            measure(np.array([], np.int64))
