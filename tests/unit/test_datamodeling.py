"""LDS against loops and scipy, its intervals against what many draws do, and scores that say nothing."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from gradstore.errors import DataError
from gradstore.numerics.metrics import (
    DatamodelingScore,
    SubsetSums,
    compare_datamodeling,
    linear_datamodeling_score,
    subset_mask,
)
from gradstore.numerics.metrics.ranks import Ranks, correlations
from tests import oracle


def predicted(scores: np.ndarray, masks: np.ndarray) -> np.ndarray:
    sums = SubsetSums(masks, len(scores))
    sums.add(scores, np.arange(scores.shape[1]))
    return sums.total()


def lds(scores: np.ndarray, masks: np.ndarray, actual: np.ndarray) -> DatamodelingScore:
    return linear_datamodeling_score(predicted(scores, masks), actual)


def half_subsets(count: int, rows: int, *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(rows) < rows // 2 for _ in range(count)])


@pytest.mark.parametrize("values", ["continuous", "with ties"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lds_is_the_rank_correlation_of_summed_scores_and_outputs(values: str, dtype: type) -> None:
    rng = np.random.default_rng(1)
    masks = half_subsets(24, 30)
    scores = rng.standard_normal((5, 30))
    actual = masks @ scores.T + 2 * rng.standard_normal((24, 5))
    if values == "with ties":
        scores, actual = np.round(scores), np.round(actual / 2)

    mean, correlations = lds(scores.astype(dtype), masks, actual.astype(dtype))

    subsets = [np.flatnonzero(mask).tolist() for mask in masks]
    expected = oracle.linear_datamodeling_scores(scores.astype(dtype), subsets, actual.astype(dtype))
    assert correlations == pytest.approx(expected, abs=1e-12)
    assert mean == pytest.approx(np.mean(expected))
    assert 0.2 < mean < 0.99


def test_lds_of_scores_that_order_the_outputs_is_one_and_of_their_negatives_minus_one() -> None:
    masks = half_subsets(16, 20)
    scores = np.random.default_rng(0).standard_normal((3, 20))
    actual = np.exp(masks @ scores.T)

    assert lds(scores, masks, actual).mean == pytest.approx(1)
    assert lds(-scores, masks, actual).mean == pytest.approx(-1)


def test_lds_of_a_query_whose_outputs_or_predictions_do_not_vary_is_nan_and_so_is_the_mean() -> None:
    masks = half_subsets(16, 20)
    scores = np.random.default_rng(0).standard_normal((4, 20))
    actual = masks @ scores.T
    actual[:, 1] = 3.0
    scores[2] = 0
    # Sums of ten tenths, which differ by rounding alone.
    scores[3] = 0.1

    mean, correlations = lds(scores, masks, actual)

    assert correlations[0] == pytest.approx(1)
    assert np.isnan(correlations).tolist() == [False, True, True, True]
    assert np.isnan(mean)


def test_lds_refuses_what_has_no_correlation() -> None:
    masks, scores = half_subsets(4, 6), np.ones((2, 6))

    with pytest.raises(DataError, match="found 1 subsets and 2 queries; it needs at least 2 subsets"):
        lds(scores, masks[:1], np.ones((1, 2)))
    with pytest.raises(DataError, match="found 4 subsets and 0 queries"):
        lds(scores[:0], masks, np.ones((4, 0)))
    with pytest.raises(DataError, match=r"2 of 8 actual outputs are not finite\. Leave out their queries"):
        lds(scores, masks, np.array([[1, np.nan], [1, 2], [np.inf, 2], [1, 2]]))
    with pytest.raises(DataError, match="1 of 12 scores are not finite"):
        lds(np.where(np.arange(12) == 5, np.nan, 1.0).reshape(2, 6), masks, np.ones((4, 2)))


def test_sums_over_subsets_are_the_same_in_whatever_pieces_scores_come() -> None:
    rng, masks = np.random.default_rng(2), half_subsets(6, 20)
    scores = rng.standard_normal((5, 20))
    sums = SubsetSums(masks, 5)
    for rows in np.split(rng.permutation(20), [3, 11]):
        sums.add(scores[:2, rows], rows)
        sums.add(scores[2:, rows], rows, first=2)

    assert sums.total() == pytest.approx(np.array([[row[mask].sum() for mask in masks] for row in scores]), abs=1e-12)


def test_a_subset_is_drawn_by_its_number_alone_and_has_its_share() -> None:
    drawn = [subset_mask(number, 101, share=0.5, seed=3) for number in range(40)]

    assert {int(mask.sum()) for mask in drawn} == {50}
    assert (subset_mask(7, 101, share=0.5, seed=3) == drawn[7]).all()
    assert (subset_mask(7, 101, share=0.5, seed=4) != drawn[7]).any()
    # Each example is in about half of them, and pairs are in no other share than chance has.
    shares = np.mean(drawn, axis=0)
    assert 0.2 < shares.min() < shares.max() < 0.8
    assert np.corrcoef(np.array(drawn).T)[np.triu_indices(101, 1)].mean() == pytest.approx(-0.01, abs=0.01)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.001])
def test_a_subset_of_none_or_all_is_refused(share: float) -> None:
    with pytest.raises(DataError, match=f"a share of {share} of 20 examples is"):
        subset_mask(0, 20, share=share, seed=0)


def test_ranks_of_a_resample_are_those_of_the_values_written_out() -> None:
    rng = np.random.default_rng(4)
    first, second = np.round(rng.standard_normal((2, 6, 15)), 1)
    drawn = rng.integers(15, size=(3, 15))
    counts = np.stack([np.bincount(places, minlength=15) for places in drawn])

    found = correlations(Ranks(first).centred(counts), Ranks(second).centred(counts), counts)

    written_out = [
        [spearmanr(one[places], other[places]).statistic for one, other in zip(first, second, strict=True)]
        for places in drawn
    ]
    assert found == pytest.approx(np.array(written_out), abs=1e-12)


def simulated(queries: int, subsets: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks, and outputs of models that are sums of true effects, with noise; and the effects."""
    rng = np.random.default_rng(seed)
    masks, effects = half_subsets(subsets, 40, seed=seed), rng.standard_normal((queries, 40))
    return masks, masks @ effects.T + noise * rng.standard_normal((subsets, queries)), effects


def test_intervals_hold_the_value_that_many_draws_have_on_average() -> None:
    drawn = [simulated(30, 32, 3.0, seed) for seed in range(60)]
    truth = np.mean([lds(effects, masks, actual).mean for masks, actual, effects in drawn])

    held: list[bool] = []
    for seed, (masks, actual, effects) in enumerate(drawn[:6]):
        found = compare_datamodeling({"effects": predicted(effects, masks)}, actual, seed=seed)["effects"].interval
        held.append(bool(found.low <= truth <= found.high))

    # Of six at 95 %, fewer than four have a chance of 1 in 400.
    assert sum(held) >= 4


def test_an_interval_is_wider_by_both_ways_than_by_queries_alone() -> None:
    masks, actual, effects = simulated(200, 16, 3.0, 0)
    found = compare_datamodeling({"effects": predicted(effects, masks)}, actual, seed=0)["effects"]
    alone = np.std(lds(effects, masks, actual).correlations) / np.sqrt(200) * 2 * 1.96

    assert found.difference is None
    assert found.interval.mean == pytest.approx(lds(effects, masks, actual).mean)
    assert found.interval.high - found.interval.low > 1.5 * alone


def test_differences_are_paired() -> None:
    masks, actual, effects = simulated(40, 24, 3.0, 0)
    better, worse = effects, effects + 0.5 * np.random.default_rng(1).standard_normal(effects.shape)

    found = compare_datamodeling(
        {"worse": predicted(worse, masks), "better": predicted(better, masks), "same": predicted(worse, masks)},
        actual,
        against="worse",
        seed=0,
    )

    assert found["worse"].difference is None
    same = found["same"].difference
    assert same is not None
    assert tuple(same) == (0, 0, 0)
    difference = found["better"].difference
    assert difference is not None
    assert difference.mean == pytest.approx(found["better"].interval.mean - found["worse"].interval.mean)
    assert 0 < difference.low < difference.mean < difference.high
    # They move together, so that the difference is surer than either.
    assert difference.high - difference.low < found["better"].interval.high - found["better"].interval.low


def test_scores_of_nothing_have_an_lds_of_zero_within_the_interval() -> None:
    masks, actual, effects = simulated(60, 32, 1.0, 0)
    rng = np.random.default_rng(5)
    shuffled = np.stack([rng.permutation(row) for row in effects])

    found = compare_datamodeling(
        {"effects": predicted(effects, masks), "shuffled": predicted(shuffled, masks)}, actual, seed=0
    )

    assert found["shuffled"].interval.low < 0 < found["shuffled"].interval.high
    assert found["effects"].interval.low > 0.5


def test_a_query_of_which_scores_say_nothing_counts_as_zero_and_one_without_outputs_is_refused() -> None:
    masks, actual, effects = simulated(3, 8, 1.0, 0)
    known = lds(effects, masks, actual).correlations[[0, 2]]
    effects[1] = 0

    found = compare_datamodeling({"effects": predicted(effects, masks)}, actual, seed=0)["effects"].interval

    assert found.mean == pytest.approx(known.sum() / 3)
    actual[:, 1] = 2.0
    with pytest.raises(DataError, match=r"LDS: the outputs of the queries \[1\] do not vary\. Leave them out"):
        compare_datamodeling({"effects": predicted(effects, masks)}, actual, seed=0)
