from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.numerics.scores import Ranked, Ranking
from tests import oracle


def rank(c: np.ndarray, w: np.ndarray, k: int, edges: list[int], *, largest: bool = True) -> Ranked:
    ranking = Ranking(num_queries=c.shape[0], num_groups=c.shape[2], k=k)
    for first, last in pairwise(edges):
        ranking.update(c[:, first:last], w, np.arange(first, last))
    return ranking.proponents() if largest else ranking.opponents()


@given(seed=st.integers(0, 1000), k=st.integers(1, 12), cut=st.integers(0, 20))
def test_the_kept_rows_are_those_of_the_dense_sort_whatever_the_blocks(seed: int, k: int, cut: int) -> None:
    rng = np.random.default_rng(seed)
    # Few distinct values make ties common.
    c = rng.integers(-2, 3, (3, 20, 4)).astype(np.float32)
    w = np.array([0.1, 0.2, 0.3, 0.4])
    for largest in (True, False):
        ranked = rank(c, w, k, [0, cut, 20], largest=largest)
        for q in range(3):
            scores = [float(sum(w[j] * float(c[q, n, j]) for j in range(4))) for n in range(20)]
            rounded = [round(score, 9) for score in scores]
            best = sorted(rounded, reverse=largest)[:k]
            assert [round(float(score), 9) for score in ranked.scores[q]] == best
            assert len(set(ranked.rows[q].tolist())) == min(k, 20)
            for i, row in enumerate(ranked.rows[q]):
                assert ranked.scores[q, i] == pytest.approx(scores[row], abs=1e-12)


def test_equal_scores_are_ordered_by_row() -> None:
    c = np.ones((1, 6, 2), np.float32)
    ranked = rank(c, np.array([0.5, 0.5]), 3, [0, 2, 6])
    assert ranked.rows.tolist() == [[0, 1, 2]]


def test_the_parts_of_a_score_sum_to_it() -> None:
    c = np.random.default_rng(0).standard_normal((4, 30, 5)).astype(np.float32)
    w = np.array([0.5, 0.1, 0.1, 0.2, 0.1])
    ranked = rank(c, w, 7, [0, 11, 30])
    np.testing.assert_allclose(ranked.parts.sum(2), ranked.scores, atol=1e-6)


def test_the_order_of_blocks_does_not_matter() -> None:
    c = np.random.default_rng(1).integers(0, 2, (2, 16, 3)).astype(np.float32)
    w = np.full(3, 1 / 3)
    forward = rank(c, w, 5, [0, 4, 16])
    ranking = Ranking(num_queries=2, num_groups=3, k=5)
    for first, last in ((8, 16), (0, 8)):
        ranking.update(c[:, first:last], w, np.arange(first, last))
    assert ranking.proponents().rows.tolist() == forward.rows.tolist()


def test_squared_scores_rank_by_magnitude_and_their_parts_are_those_of_the_linear_score() -> None:
    c = np.random.default_rng(2).standard_normal((3, 20, 4)).astype(np.float32)
    w = np.array([0.1, 0.2, 0.3, 0.4])
    ranking = Ranking(num_queries=3, num_groups=4, k=5, transform="square")
    for first, last in ((0, 7), (7, 20)):
        ranking.update(c[:, first:last], w, np.arange(first, last))

    linear = oracle.scores(c, w)
    for ranked, sign in ((ranking.proponents(), 1), (ranking.opponents(), -1)):
        for q in range(3):
            best = sorted(range(20), key=lambda row: -sign * abs(linear[q, row]))[:5]
            assert ranked.rows[q].tolist() == best
            np.testing.assert_allclose(ranked.scores[q], linear[q, best] ** 2, rtol=1e-12)
            np.testing.assert_allclose(ranked.parts[q], c[q, best] * w, rtol=1e-6)
