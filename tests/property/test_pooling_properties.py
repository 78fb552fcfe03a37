"""Pieces and their order never change pools, which are those of the decimals, whatever scores and subsets look like."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradstore.numerics.representation import AttentionPools, attention_pool
from gradstore.numerics.representation import pooling as implementation
from tests.oracle.pooling import attention_pooled

ROWS, QUERIES = 24, 5
KINDS = ["small", "normal", "extreme", "ties", "one giant", "zeros"]


def drawn(kind: str, seed: int) -> np.ndarray:
    """Scores [Q, N] of several kinds, in float32 if the seed is odd."""
    draw = np.random.default_rng(seed)
    scores = draw.standard_normal((QUERIES, ROWS))
    if kind == "small":
        scores *= 1e-6
    if kind == "extreme":
        scores = draw.uniform(-1e4, 1e4, scores.shape)
    if kind == "ties":
        scores = draw.integers(-2, 3, scores.shape).astype(np.float64)
    if kind == "one giant":
        scores[np.arange(QUERIES), draw.integers(ROWS, size=QUERIES)] = draw.choice([-1e4, 1e4], QUERIES)
    if kind == "zeros":
        scores[draw.random(scores.shape) < 0.6] = 0
    return scores.astype(np.float32 if seed % 2 else np.float64)


def drawn_masks(seed: int, subsets: int = 6) -> np.ndarray:
    """Subsets of 1 example to all of them."""
    draw = np.random.default_rng([seed, 1])
    return np.stack([draw.permutation(ROWS) < draw.integers(1, ROWS + 1) for _ in range(subsets)])


def pooled(scores: np.ndarray, masks: np.ndarray, sharpness: float = 1.0) -> np.ndarray:
    pools = AttentionPools(masks, len(scores), sharpness=sharpness)
    pools.add(scores, np.arange(scores.shape[1]))
    return pools.total()


def assert_close(found: np.ndarray, wanted: np.ndarray, scores: np.ndarray, tolerance: float = 1e-12) -> None:
    """Within a part of a query's largest score."""
    largest = np.abs(scores).max(1, keepdims=True).astype(np.float64)
    assert (np.abs(found - wanted) <= tolerance * largest).all()


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 1000),
    order=st.permutations(range(ROWS)),
    cuts=st.lists(st.integers(0, ROWS), max_size=6),
    cut=st.integers(0, QUERIES),
    sharpness=st.sampled_from([1.0, 0.1, 7.0]),
)
def test_pieces_and_their_order_never_change_pools(
    kind: str, seed: int, order: list[int], cuts: list[int], cut: int, sharpness: float
) -> None:
    scores, masks = drawn(kind, seed), drawn_masks(seed)
    pieces = [
        (np.array(order[start:stop], np.int64), first, last)
        for start, stop in pairwise([0, *sorted(cuts), ROWS])
        for first, last in [(0, cut), (cut, QUERIES)]
    ]
    pools = AttentionPools(masks, QUERIES, sharpness=sharpness)
    for place in np.random.default_rng(seed).permutation(len(pieces)):
        rows, first, last = pieces[place]
        pools.add(scores[first:last, rows], rows, first)

    assert_close(pools.total(), pooled(scores, masks, sharpness), scores)


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000), tile=st.integers(1, 1000))
def test_the_size_of_tiles_never_changes_pools(kind: str, seed: int, tile: int) -> None:
    scores, masks = drawn(kind, seed), drawn_masks(seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(implementation, "TILE_BYTES", tile)
        found = pooled(scores, masks)

    assert_close(found, pooled(scores, masks), scores, 1e-15)


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
def test_pools_are_those_of_the_decimals(kind: str, seed: int) -> None:
    scores, masks = drawn(kind, seed), drawn_masks(seed)

    wanted = attention_pooled(scores, [np.flatnonzero(mask).tolist() for mask in masks])

    assert_close(pooled(scores, masks), wanted, scores)
    dense = attention_pool(torch.from_numpy(scores).double(), torch.from_numpy(masks))
    assert_close(dense.numpy(), wanted, scores)


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
def test_a_pool_lies_between_the_scores_of_its_subset_and_turns_with_their_sign(kind: str, seed: int) -> None:
    scores, masks = drawn(kind, seed), drawn_masks(seed)

    found = pooled(scores, masks)

    for subset, mask in enumerate(masks):
        own = scores[:, mask].astype(np.float64)
        room = 1e-12 * np.abs(own).max(1)
        assert (own.min(1) - room <= found[:, subset]).all()
        assert (found[:, subset] <= own.max(1) + room).all()
    assert (pooled(-scores, masks) == -found).all()


@given(seed=st.integers(0, 1000), size=st.sampled_from([1e-3, 1.0, 1e4]), order=st.permutations(range(ROWS)))
def test_subsets_of_the_same_scores_are_never_ranked(seed: int, size: float, order: list[int]) -> None:
    half = size * np.random.default_rng(seed).standard_normal((QUERIES, ROWS // 2))
    scores = np.concatenate([half, half], axis=1)
    masks = np.stack([np.arange(ROWS) < ROWS // 2, np.arange(ROWS) >= ROWS // 2])
    pools = AttentionPools(masks, QUERIES)
    for row in order:
        pools.add(scores[:, [row]], np.array([row]))

    assert (pools.total() == 0).all()
