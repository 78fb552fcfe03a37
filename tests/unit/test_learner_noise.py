"""Noise is normal, of the size that is asked, and the same whatever the pieces of a read are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from gradstore.errors import DataError, SpecError
from gradstore.numerics.learner import (
    KeptRows,
    LearnerSettings,
    deviations,
    learn_certified,
    learn_weights,
    noisy,
    with_noise,
)
from gradstore.numerics.moments import first_guess
from tests.tensors import Reader, reader


def contributions(num_queries: int = 3, num_rows: int = 600, num_groups: int = 5) -> np.ndarray:
    draw = np.random.default_rng(1)
    c = draw.standard_normal((num_queries, num_rows, num_groups)) * [1, 10, 0.1, 1, 3] + [0, 1e4, 0, 1, -7]
    return c.astype(np.float32)


def gathered(read: Reader, shape: tuple[int, ...]) -> np.ndarray:
    found = np.full(shape, np.nan, np.float32)
    for first, rows, c in read():
        found[first : first + len(c), rows] = c
    return found


@pytest.mark.parametrize("rows", [1, 77, 600])
def test_deviations_are_those_of_every_group_over_queries_and_rows(rows: int) -> None:
    c = contributions()

    found = deviations(reader(c, rows, 2))

    np.testing.assert_allclose(found, c.astype(np.float64).reshape(-1, 5).std(0), rtol=1e-12)


def test_blocks_without_valid_rows_measure_nothing() -> None:
    c = contributions()

    def read() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        yield 0, np.empty(0, np.int64), c[:, :0]
        yield from reader(c, 100, 2)()

    np.testing.assert_array_equal(deviations(read), deviations(reader(c, 100, 2)))
    assert gathered(noisy(read, np.ones(5), 0), c.shape).shape == c.shape
    with pytest.raises(SpecError, match=r"data\.learn: found no contributions"):
        deviations(reader(c[:0], 100, 2))


def test_deviations_of_numbers_that_are_not_finite_are_refused() -> None:
    c = contributions()
    c[1, 250, 3] = np.inf
    with pytest.raises(DataError, match="contributions of query 1: training row 250 of group 3 is inf"):
        deviations(reader(c, 100, 2))


@pytest.mark.parametrize(("rows", "queries"), [(1, 1), (77, 3), (600, 2)])
def test_every_read_gives_the_same_noise_whatever_its_pieces(rows: int, queries: int) -> None:
    c, deviation = contributions(), np.array([1, 2, 0, 0.5, 3])

    found = gathered(noisy(reader(c, rows, queries), deviation, 7), c.shape)

    np.testing.assert_array_equal(found, gathered(noisy(reader(c, 100, 2), deviation, 7), c.shape))
    np.testing.assert_array_equal(found[:, :, 2], c[:, :, 2])
    assert (found != gathered(noisy(reader(c, 100, 2), deviation, 8), c.shape))[:, :, 3].mean() > 0.9


def test_rows_with_gaps_and_in_no_order_have_the_noise_of_their_numbers() -> None:
    c, deviation = np.zeros((600, 11), np.float32), np.ones(11)
    rows = np.random.default_rng(0).permutation(600)[:300]

    found = with_noise(c[rows], deviation, query=4, rows_N=rows, seed=0)

    whole = with_noise(c, deviation, query=4, rows_N=np.arange(600), seed=0)
    np.testing.assert_array_equal(found, whole[rows])


def test_noise_is_normal_and_independent() -> None:
    c, rows = np.zeros((3000, 9), np.float32), np.arange(3000)
    noise = np.stack([with_noise(c, np.full(9, 2.0), query=q, rows_N=rows, seed=1) for q in range(4)]) / 2

    count = noise.size
    moments = [noise.mean(), (noise**2).mean(), (noise**3).mean(), (noise**4).mean()]
    for found, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96), strict=True):
        assert abs(found - expected) < 4 * np.sqrt(variance / count)
    assert np.mean(np.abs(noise) > 1.959964) == pytest.approx(0.05, abs=4 * np.sqrt(0.05 * 0.95 / count))
    columns = np.concatenate(
        [noise.transpose(0, 2, 1).reshape(-1, 3000), noise[:, ::-1].transpose(0, 2, 1).reshape(-1, 3000)]
    )
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 5 / np.sqrt(3000)


def test_weights_of_noisy_contributions_are_certified() -> None:
    c, settings = contributions(), LearnerSettings(k=4, epochs=3)
    read = noisy(reader(c, 100, 2), 0.5 * deviations(reader(c, 100, 2)), 3)
    whole = gathered(read, c.shape)

    second_moments, kept = first_guess(read, np.full(5, 0.2), count=20, transform="none", num_queries=3)
    exact = np.stack([each.T @ each for each in whole.astype(np.float64)])
    outcome = learn_certified(exact, kept, read, settings=[settings], limit_bytes=2**30)

    expected = learn_weights(lambda query: [whole[query]], num_queries=3, num_groups=5, settings=settings)
    np.testing.assert_allclose(outcome.certified[0].learned.weights, expected.weights, rtol=1e-12)
    np.testing.assert_allclose(second_moments, exact, rtol=1e-5)
    clean = learn_certified(
        np.stack([each.T @ each for each in c.astype(np.float64)]),
        KeptRows([np.empty(0, np.int64)] * 3, [c[0, :0]] * 3, num_groups=5),
        reader(c, 100, 2),
        settings=[settings],
        limit_bytes=2**30,
    )
    assert (clean.certified[0].learned.weights != expected.weights).all()
