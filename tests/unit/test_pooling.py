"""Attention pooling against decimals, cases that are known by hand, its memory, and what it refuses."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch

from gradstore.errors import DataError
from gradstore.numerics.representation import AttentionPools, attention_pool
from tests.oracle.pooling import attention_pooled


def streamed(scores: np.ndarray, masks: np.ndarray, sharpness: float = 1.0) -> np.ndarray:
    pools = AttentionPools(masks, len(scores), sharpness=sharpness)
    pools.add(scores, np.arange(scores.shape[1]))
    return pools.total()


def dense(scores: np.ndarray, masks: np.ndarray) -> np.ndarray:
    found: np.ndarray = attention_pool(torch.from_numpy(scores), torch.from_numpy(masks)).numpy()
    return found


def expected(scores: np.ndarray, masks: np.ndarray) -> np.ndarray:
    return attention_pooled(scores, [np.flatnonzero(mask).tolist() for mask in masks])


def ragged_masks(rows: int, sizes: list[int], *, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(rows) < size for size in sizes])


MASKS = ragged_masks(12, [1, 2, 5, 6, 6, 11, 12])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
def test_a_pool_is_the_mean_of_scores_by_the_softmax_of_their_sizes(size: float, dtype: type) -> None:
    scores: np.ndarray = (size * np.random.default_rng(1).standard_normal((4, 12))).astype(dtype)

    wanted = expected(scores, MASKS)

    assert streamed(scores, MASKS) == pytest.approx(wanted, rel=1e-11, abs=1e-12 * size)
    tolerance = 1e-5 if dtype is np.float32 else 1e-12
    assert dense(scores, MASKS) == pytest.approx(wanted, rel=10 * tolerance, abs=tolerance * size)


@pytest.mark.parametrize("sharpness", [0.01, 5.0, 300.0])
def test_sharpness_multiplies_scores_in_the_attention_alone(sharpness: float) -> None:
    scores = np.random.default_rng(8).standard_normal((4, 12))

    found = streamed(scores, MASKS, sharpness)

    subsets = [np.flatnonzero(mask).tolist() for mask in MASKS]
    assert found == pytest.approx(attention_pooled(scores, subsets, sharpness), rel=1e-11, abs=1e-12)
    # Scores that are so much larger have pools that are, too, and order subsets alike.
    assert sharpness * found == pytest.approx(streamed(sharpness * scores, MASKS), rel=1e-10, abs=1e-11 * sharpness)


def test_a_pool_of_two_scores_is_what_is_written_out_by_hand() -> None:
    scores = np.array([[1.0, -2.0, 0.0]])
    masks = np.array([[True, True, False], [False, True, True]])
    wanted = [
        (math.e - 2 * math.e**2) / (math.e + math.e**2),
        -2 * math.e**2 / (math.e**2 + 1),
    ]

    assert streamed(scores, masks)[0] == pytest.approx(wanted, rel=1e-14)
    assert dense(scores, masks)[0] == pytest.approx(wanted, rel=1e-14)


def test_the_pool_of_a_lone_example_is_its_score() -> None:
    scores = np.array([[1e4, -1e4, 0.0, 0.1, -0.3], [3.0, 1e-300, -7.0, 2.0, 1.0]])
    masks = np.eye(5, dtype=bool)

    assert (streamed(scores, masks) == scores).all()
    assert (dense(scores, masks) == scores).all()


def test_scores_far_below_those_of_another_subset_are_still_told_apart() -> None:
    # Next to 10,000 the exponentials of both other subsets are 0 in float64.
    scores = np.array([[1e4, 2.0, 3.0, -1.0, 0.5]])
    masks = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], bool)

    wanted = expected(scores, masks)

    assert wanted[0, 0] == 1e4
    assert streamed(scores, masks) == pytest.approx(wanted, rel=1e-14)
    assert dense(scores, masks) == pytest.approx(wanted, rel=1e-14)


def test_a_large_score_that_comes_last_takes_over_whatever_its_sign() -> None:
    pools = AttentionPools(np.array([[1, 1, 1, 0], [1, 1, 0, 1]], bool), 1)
    for row, score in enumerate([5.0, -8.0, -1e4, 9e3]):
        pools.add(np.array([[score]]), np.array([row]))

    assert pools.total().tolist() == [[-1e4, 9e3]]


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_equal_scores_give_that_score_and_say_nothing_of_subsets(value: float) -> None:
    scores = np.full((2, 12), value)

    assert dense(scores, MASKS) == pytest.approx(np.full((2, len(MASKS)), value), rel=1e-14)
    # Means of several tenths differ by rounding alone, which would be ranked.
    assert (streamed(scores, MASKS) == 0).all()


def test_pools_that_differ_by_rounding_are_zeros_and_others_as_they_are() -> None:
    rng = np.random.default_rng(3)
    half = rng.standard_normal(40)
    scores = np.stack([np.concatenate([half, rng.permutation(half)])] * 2)
    scores[1, 0] += 1e-9
    pools = AttentionPools(np.stack([np.arange(80) < 40, np.arange(80) >= 40]), 2)
    for rows in np.split(np.arange(80), [7, 33, 41, 60]):
        pools.add(scores[:, rows], rows)

    found = pools.total()

    written_out = [np.average(part, weights=np.exp(np.abs(part))) for part in np.split(scores[0], [40])]
    assert written_out[0] != written_out[1]
    assert found[0].tolist() == [0, 0]
    assert 1e-12 < abs(found[1, 0] - found[1, 1]) < 1e-9
    assert found[1] == pytest.approx(written_out, abs=1e-9)


def test_an_example_of_no_subset_counts_in_none() -> None:
    rng = np.random.default_rng(4)
    scores, masks = rng.standard_normal((2, 12)), MASKS[:5].copy()
    masks[:, 8:] = False
    masks[:, 0] = True
    alone = streamed(scores[:, :8], masks[:, :8])

    scores[:, 8:] = 1e4

    assert streamed(scores, masks) == pytest.approx(alone, rel=1e-14)
    assert dense(scores, masks) == pytest.approx(alone, rel=1e-13)


def test_a_piece_is_worked_on_in_tiles_of_bounded_size() -> None:
    rng = np.random.default_rng(5)
    scores, masks = rng.standard_normal((200, 20_000)), rng.random((30, 20_000)) < 0.5
    pools = AttentionPools(masks, 200)
    rows = np.arange(20_000)

    tracemalloc.start()
    try:
        pools.add(scores, rows)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    # A copy of the piece would be 32 MB, and one of it for each subset 960 MB.
    assert peak < 8e6
    wanted = [np.average(scores[150, mask], weights=np.exp(np.abs(scores[150, mask]))) for mask in masks]
    assert pools.total()[150] == pytest.approx(wanted, abs=1e-13)


def test_a_subset_without_an_example_is_refused() -> None:
    masks = MASKS.copy()
    masks[[3, 5]] = False
    message = r"attention pooling: subset 3 has no example, .*\. Leave such subsets out, or draw larger ones\."

    with pytest.raises(DataError, match=message):
        AttentionPools(masks, 2)
    with pytest.raises(DataError, match=message):
        attention_pool(torch.ones(2, 12), torch.from_numpy(masks))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_refused(value: float) -> None:
    scores = np.ones((2, 12))
    scores[1, [3, 4]] = value

    with pytest.raises(DataError, match=r"pooling: 2 of 24 scores are not finite\. Leave out their queries, or the"):
        streamed(scores, MASKS)


def test_a_total_without_a_score_in_every_subset_is_refused() -> None:
    pools = AttentionPools(np.array([[1, 1, 0, 0], [0, 0, 1, 1]], bool), 2)
    pools.add(np.ones((2, 2)), np.array([0, 1]))
    pools.add(np.ones((1, 1)), np.array([2]))

    with pytest.raises(DataError, match=r"query 1 has no score yet of an example in subset 1\. Add the scores of all"):
        pools.total()

    pools.add(np.ones((1, 1)), np.array([3]), first=1)
    assert pools.total().shape == (2, 2)


@pytest.mark.parametrize("size", [0.5, 5.0])
def test_the_gradient_of_the_pool_is_that_of_finite_differences(size: float) -> None:
    rng = np.random.default_rng(6)
    # No score is near 0, where its size has a kink.
    scores = size * rng.choice([-1, 1], (3, 12)) * rng.uniform(0.2, 1.2, (3, 12))

    assert torch.autograd.gradcheck(
        lambda of: attention_pool(of, torch.from_numpy(MASKS)), torch.from_numpy(scores).requires_grad_()
    )


def test_the_gradient_of_the_pool_is_finite_for_the_largest_scores_and_for_none() -> None:
    scores = torch.tensor([[1e4, -1e4, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    masks = torch.tensor([[True, True, True, False], [False, False, True, True]])

    torch.autograd.backward(attention_pool(scores, masks).sum())

    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    # Of zeros the pool is the mean, and so is its gradient.
    assert scores.grad[1].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3 + 1 / 2, 1 / 2])


def test_a_score_that_is_no_number_spoils_the_pools_of_its_subsets_alone() -> None:
    scores = torch.tensor([[np.nan, 1.0, 2.0]], requires_grad=True)
    masks = torch.tensor([[False, True, False], [True, True, False], [False, True, True]])

    assert torch.isnan(attention_pool(scores, masks)).tolist() == [[False, True, False]]

    # Where no subset has it, the gradient is none of its business either.
    torch.autograd.backward(attention_pool(scores, masks[[0, 2]])[0, 0])
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0, 1, 0]]


def test_pools_of_half_precision_are_made_in_float32() -> None:
    scores = torch.from_numpy(np.random.default_rng(7).standard_normal((2, 12))).to(torch.bfloat16)

    found = attention_pool(scores, torch.from_numpy(MASKS))

    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(expected(scores.double().numpy(), MASKS), abs=1e-5)
