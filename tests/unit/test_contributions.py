"""Products of tiles, A_q and candidate rows on arrays, against the oracle."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from gradstore.numerics.contributions import accumulate, group_products, summed_products
from gradstore.numerics.moments import NO_ROW, Candidates, SecondMoments, kept_rows
from tests import oracle

WIDTHS = {"g3": 4, "g0": 1, "g4": 5}


def drawn(rows: int, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal((rows, width)).astype(np.float32) for name, width in WIDTHS.items()}


def test_products_of_groups_of_different_widths_are_the_oracles_contributions() -> None:
    queries, rows = drawn(3, 0), drawn(7, 1)
    portion, c = np.empty((7, 3, 3), np.float32), np.full((3, 9, 4), np.nan, np.float32)
    factor = np.linspace(-1, 2, 7).astype(np.float32)

    group_products([*queries.values()], [*rows.values()], portion)
    accumulate(portion.copy(), None, c[:, 1:8, 1:], first=True)
    accumulate(portion, factor, c[:, 1:8, 1:], first=False)

    expected = oracle.contributions(queries, rows, [*WIDTHS]) * (1 + factor)[:, None]
    np.testing.assert_allclose(c[:, 1:8, 1:], expected, rtol=1e-5, atol=1e-6)
    assert np.isnan(c[:, [0, 8]]).all()
    assert np.isnan(c[:, :, 0]).all()


def test_summed_products_are_the_oracles_contributions_summed() -> None:
    queries, rows = drawn(3, 0), drawn(7, 1)
    out = np.empty((7, 3), np.float32)

    summed_products([*queries.values()], [*rows.values()], out)

    np.testing.assert_allclose(out.T, oracle.contributions(queries, rows, [*WIDTHS]).sum(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [(0, 5000), (0, 1, 2100, 5000)])
def test_second_moments_are_sums_of_outer_products(cuts: tuple[int, ...]) -> None:
    c = np.random.default_rng(0).standard_normal((2, 5000, 3)).astype(np.float32) + 10
    moments = SecondMoments(num_queries=3, num_groups=3)

    for start, stop in pairwise(cuts):
        moments.add(1, c[:, start:stop])

    expected = [np.sum([np.outer(row, row) for row in of_query.astype(np.float64)], axis=0) for of_query in c]
    np.testing.assert_allclose(moments.total_QMM[1:], expected, rtol=1e-6)
    assert (moments.total_QMM[0] == 0).all()


@pytest.mark.parametrize("transform", ["none", "square"])
@pytest.mark.parametrize("cuts", [(0, 40), (0, 3, 4, 17, 40)])
@pytest.mark.parametrize("kept", [1, 4, 50])
def test_candidates_are_the_oracles_top_rows_whatever_the_blocks(
    transform: str, cuts: tuple[int, ...], kept: int
) -> None:
    # Few different numbers, so that many rows score alike.
    c = np.random.default_rng(1).integers(-2, 3, (2, 40, 3)).astype(np.float32)
    weights = np.array([0.25, 0.25, 0.5])
    found = Candidates(num_queries=2, kept=kept, weights_M=weights, transform=transform)  # type: ignore[arg-type]

    for start, stop in pairwise(cuts):
        found.offer(0, c[:, start:stop], np.arange(start, stop) + 100)

    scores = oracle.scores(c, weights)
    scores = np.abs(scores) if transform == "square" else scores
    for query in range(2):
        best = oracle.top(scores[query], min(kept, 40))
        assert found.rows_QK[query].tolist() == [row + 100 for row in best] + [NO_ROW] * (kept - len(best))
        np.testing.assert_array_equal(found.c_QKM[query, : len(best)], c[query, best])


def test_more_rows_are_kept_than_the_learner_takes() -> None:
    assert [kept_rows(k) for k in (1, 200, 201, 1000)] == [6, 1200, 252, 1250]
