"""The numerics of sketches against the oracle: directions, whitened rows, estimates, and candidates of these."""

from __future__ import annotations

import numpy as np
import pytest

from gradstore.numerics.kernel import Damping, GramSum, spectrum
from gradstore.numerics.sketch import (
    candidates,
    directions,
    estimated_scores,
    needed_candidates,
    recalls,
    sample_combinations,
    whitened,
)
from tests import oracle


@pytest.mark.parametrize("size", [40, 300])
def test_directions_are_orthonormal_and_those_of_the_largest_singular_values(size: int) -> None:
    draw = np.random.default_rng(size)
    rows = (draw.standard_normal((size, 60)) * np.linspace(4, 0.1, 60)).astype(np.float32)
    combinations = sample_combinations(rows @ rows.T, 5, 0)
    basis = directions(rows, combinations, None, None)
    np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-4)
    singular = np.linalg.svd(rows.astype(np.float64), compute_uv=False)[:5]
    np.testing.assert_allclose(np.linalg.norm(rows @ basis, axis=0), singular, rtol=1e-3)


def test_directions_beyond_what_the_sample_spans_are_zero() -> None:
    rows = np.zeros((6, 4), np.float32)
    rows[:, 1] = 2
    combinations = sample_combinations(rows @ rows.T, 3, 0)
    basis = directions(rows, combinations, None, None)
    np.testing.assert_allclose(np.abs(basis), [[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]], atol=1e-6)


def test_whitened_rows_have_the_inner_products_that_the_kernel_gives() -> None:
    draw, damping = np.random.default_rng(1), Damping(value=0.1)
    rows = draw.standard_normal((20, 6), np.float32)
    gram = GramSum(6)
    gram.add(rows)
    kernel = spectrum(gram.total())
    x = whitened(rows, kernel, damping)
    expected = oracle.precondition(rows, rows, kind="block", damping=0.1, mode="relative") @ rows.T.astype(np.float64)
    np.testing.assert_allclose(x @ x.T, expected, atol=1e-4)


def test_estimates_are_inner_products_with_levels_times_scales() -> None:
    draw = np.random.default_rng(2)
    levels = draw.integers(-127, 128, (700, 400)).astype(np.int8)
    scales = draw.random(700, np.float32)
    scales[5] = np.nan
    queries = draw.standard_normal((3, 400), np.float32)
    expected = queries.astype(np.float64) @ (levels * scales.astype(np.float64)[:, None]).T
    np.testing.assert_allclose(estimated_scores(levels, scales, queries), expected, rtol=1e-3, atol=1e-2)


def test_candidates_are_the_largest_and_the_smallest_of_any_query_and_none_without_a_number() -> None:
    scores = np.array([[5, 1, np.nan, -9, 0, 2], [1, 2, np.nan, 3, 8, -7]], np.float32)
    np.testing.assert_array_equal(candidates(scores, 1, 1), [0, 3, 4, 5])
    np.testing.assert_array_equal(candidates(scores, 3, 2), [0, 1, 3, 4, 5])


def test_needed_candidates_are_counted_until_the_wanted_row_is_among_them() -> None:
    estimates = np.array([[0.1, 0.9, np.nan, 0.5, -1.0]], np.float32)
    np.testing.assert_array_equal(needed_candidates(estimates, np.array([[1, 0]]), largest=True), [[1, 3]])
    np.testing.assert_array_equal(needed_candidates(estimates, np.array([[4, 3]]), largest=False), [[1, 3]])
    assert recalls(np.array([[1, 3], [2, 9]]), 2, [1, 3, 9]) == [0.25, 0.75, 1.0]
