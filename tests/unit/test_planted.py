"""Planted features are the formula's, to the last bit, whoever draws them and in whatever batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.errors import SpecError
from gradstore.numerics.planted import NOISY_SCALE, Planted, Planting, colouring, draws
from tests import oracle

GROUPS = tuple(f"layers.{place}.q_proj" for place in range(5))
SHAPE = (3, 4)
ROWS = {"train": 60, "learn": 5, "eval": 7}
WITH_ASPECTS = {**ROWS, "learn-a": 2, "learn-b": 1}
ASKED = Planting(seed=3, groups=GROUPS, shape=SHAPE, rows=ROWS, topics=4, contributors=4, noisy=0.4)


def planted(**changes: object) -> Planted:
    asked = {name: getattr(ASKED, name) for name in Planting.__slots__} | changes
    return Planted(Planting(**asked))


def features(made: Planted, set_name: str, group: int, rows: np.ndarray) -> np.ndarray:
    return made.features(made.output_gradients(set_name, group, rows))


@pytest.mark.parametrize("set_name", ["train", "learn", "eval", "learn-a", "learn-b"])
def test_features_are_those_of_the_formula(set_name: str) -> None:
    made, count = planted(rows=WITH_ASPECTS, aspects=("learn-a", "learn-b")), 12
    contributes = {
        int(row): (name, query)
        for name, rows_of in made.contributors.items()
        for query, found in enumerate(rows_of)
        for row in found
    }

    for group, name in enumerate(GROUPS):
        found = features(made, set_name, group, np.arange(WITH_ASPECTS[set_name]))
        for row in range(WITH_ASPECTS[set_name]):
            signals: list[tuple[float, np.ndarray]] = []
            if made.good[group] and made.good_of[set_name][group]:
                topic = int(made.topics[set_name][row])
                signals.append((made.topic_strength, oracle.planted_draw(3, name, "topics", topic, count)))
            owner = contributes.get(row) if set_name == "train" else (set_name, row)
            if owner is not None and made.good_of[owner[0]][group]:
                own = oracle.planted_draw(3, name, f"own {owner[0]}", owner[1], count)
                signals.append((made.contributor_strength, own))
            noise = oracle.planted_draw(3, name, f"noise {set_name}", row, count)
            scale = 1.0 if made.good[group] else NOISY_SCALE
            expected = oracle.planted_feature(SHAPE, noise, signals, scale)
            # Equal, not close: every feature is a number that float32 holds.
            np.testing.assert_array_equal(found[row], expected)


@given(st.lists(st.integers(0, 59), min_size=1, max_size=20), st.integers(0, 4))
def test_a_row_has_the_same_bits_in_whatever_batch_it_is_drawn(rows: list[int], group: int) -> None:
    made = planted()

    together = features(made, "train", group, np.array(rows))

    every = features(made, "train", group, np.arange(60))
    np.testing.assert_array_equal(together, every[rows])


def test_a_feature_takes_no_more_than_the_bits_of_float32_at_the_largest_strengths() -> None:
    made = planted(groups=GROUPS[:1], noisy=0.0, shape=(2, 2))
    made.topic_strength = made.contributor_strength = 2 - 1 / 256
    gradients = made.output_gradients("eval", 0, np.arange(7))

    in_float32 = made.features(gradients)

    exact = gradients.astype(np.float64) @ made.inputs.astype(np.float64)
    np.testing.assert_array_equal(in_float32, exact.reshape(7, -1))


def test_draws_have_mean_zero_and_variance_85_by_64_and_do_not_repeat() -> None:
    drawn = draws(17, np.arange(4000), 24)

    assert abs(drawn.mean()) < 0.02
    assert drawn.var() == pytest.approx(85 / 64, rel=0.02)
    assert len(np.unique(drawn, axis=0)) == 4000
    correlation = np.corrcoef(drawn.T) - np.eye(24)
    assert np.abs(correlation).max() < 0.08


def test_every_query_has_contributors_of_its_own_and_of_its_topic() -> None:
    made = planted()

    taken = np.concatenate([rows.reshape(-1) for rows in made.contributors.values()])

    assert len(np.unique(taken)) == len(taken) == 4 * (5 + 7)
    for name, rows_of in made.contributors.items():
        assert rows_of.shape == (ROWS[name], 4)
        np.testing.assert_array_equal(made.topics["train"][rows_of], np.repeat(made.topics[name], 4).reshape(-1, 4))


def test_the_share_of_noisy_groups_is_the_one_asked_for_and_another_seed_chooses_others() -> None:
    names = tuple(f"layers.{place}.q_proj" for place in range(100))

    chosen = [planted(groups=names, noisy=0.3, seed=seed).good for seed in (0, 1)]

    assert [int(good.sum()) for good in chosen] == [70, 70]
    assert (chosen[0] != chosen[1]).any()


def test_inner_products_of_good_groups_tell_contributors_from_topics_and_those_from_others() -> None:
    names = tuple(f"layers.{place}.q_proj" for place in range(12))
    rows = {"train": 500, "eval": 10}
    made = planted(groups=names, shape=(4, 4), rows=rows, topics=8, contributors=5, noisy=0.5)

    def scores(good: bool) -> np.ndarray:
        chosen = np.flatnonzero(made.good == good)
        pairs = [[features(made, name, int(j), np.arange(count)) for name, count in rows.items()] for j in chosen]
        return np.asarray(np.sum([query @ train.T for train, query in pairs], axis=0))

    same_topic = made.topics["eval"][:, None] == made.topics["train"][None]
    contributes = np.zeros_like(same_topic)
    contributes[np.arange(10)[:, None], made.contributors["eval"]] = True
    good, noisy = scores(True), scores(False)
    means = [good[where].mean() for where in (contributes, same_topic & ~contributes, ~same_topic)]
    deviation = good[~same_topic].std()
    assert means[0] > means[1] + 3 * deviation > means[2] + 3.5 * deviation
    assert noisy.std() > 2 * deviation
    assert abs(noisy[contributes].mean()) < noisy.std() / 2


def test_the_covariance_of_noise_is_the_kronecker_product_of_both_colourings() -> None:
    made = planted(rows={"train": 20_000, "eval": 2}, noisy=0.8)
    group = int(np.flatnonzero(~made.good)[0])

    found = features(made, "train", group, np.arange(20_000)).astype(np.float64)

    left, right = (oracle.planted_colouring(size) for size in SHAPE)
    expected = NOISY_SCALE**2 * 85 / 64 * np.kron(left @ left.T, right @ right.T)
    assert np.abs(found.T @ found / 20_000 - expected).max() < 0.04 * expected.max()
    for size in SHAPE:
        np.testing.assert_array_equal(colouring(size), oracle.planted_colouring(size))


def test_covariances_are_sums_over_the_positions_whose_gradient_is_not_zero() -> None:
    made = planted()
    gradients = made.output_gradients("train", 0, np.arange(9))
    gradients[2] = 0
    gradients[5, :, 1] = 0

    left, right, positions = made.covariances(gradients)

    inputs = oracle.planted_colouring(SHAPE[1])
    kept = [(row, t) for row in range(9) for t in range(SHAPE[1]) if row != 2 and (row, t) != (5, 1)]
    assert positions == len(kept)
    np.testing.assert_allclose(left, sum(np.outer(gradients[n, :, t], gradients[n, :, t]) for n, t in kept), rtol=1e-5)
    np.testing.assert_allclose(right, sum(np.outer(inputs[:, t], inputs[:, t]) for _, t in kept), rtol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topics": 0}, "topics: found 0; accepted: 1 to 60, the rows of data.train"),
        ({"topics": 61}, "topics: found 61"),
        ({"contributors": -1}, "contributors: found -1; accepted: 0 or more"),
        ({"contributors": 6}, "12 queries with as many of their own need 72 rows of data.train, which has 60"),
        ({"noisy": 1.0}, "noisy: found 1.0; accepted: a share from 0 to below 1"),
        ({"noisy": 0.95}, "leaves one of the 5 groups good"),
        ({"noisy": -0.1}, "noisy: found -0.1"),
    ],
)
def test_what_cannot_be_planted_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("(", r"\(")):
        planted(**changes)


def test_the_good_groups_of_aspects_follow_one_another_and_all_others_stay_as_they_were() -> None:
    made = planted(noisy=0.6, rows=WITH_ASPECTS, aspects=("learn-a", "learn-b"))

    without = planted(noisy=0.6)
    np.testing.assert_array_equal(made.good, without.good)
    for name in ROWS:
        np.testing.assert_array_equal(made.good_of[name], made.good)
    good = [made.good, made.good_of["learn-a"], made.good_of["learn-b"]]
    assert [int(of.sum()) for of in good] == [2, 2, 2]
    assert not (made.good & made.good_of["learn-a"]).any()
    assert not (made.good_of["learn-a"] & made.good_of["learn-b"]).any()
