"""Weights and how they were reached, as the tables of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradstore.stages.learn.choice import Choice
from gradstore.stages.learn.methods import Found
from gradstore.stages.learn.settings import Candidate
from gradstore.store.features import FeatureArray

if TYPE_CHECKING:
    import pyarrow as pa

    from gradstore.numerics.learner import LearnedWeights


def weights_table(arrays: Sequence[FeatureArray], weights: np.ndarray) -> pa.Table:
    """One row for each group."""
    import pyarrow as pa

    return pa.table(
        {
            "group": pa.array([array.name for array in arrays], pa.string()),
            "depth": pa.array([array.depth for array in arrays], pa.int64()),
            "function": pa.array([array.function for array in arrays], pa.string()),
            "weight": pa.array(weights, pa.float64()),
        }
    )


def trajectory_table(learned: LearnedWeights | None, queries: np.ndarray) -> pa.Table:
    """One row per step of Algorithm 1; weights at the steps that end an epoch, because those of every step would be E Q M numbers.

    ``queries`` are the numbers of the queries that were learned from. Other solvers take no such steps.
    """
    import pyarrow as pa

    visits = () if learned is None else learned.visits
    per_epoch: Sequence[np.ndarray] = () if learned is None else [*learned.weights_per_epoch]
    steps, count = len(visits), len(queries)
    weights = [per_epoch[step // count] if (step + 1) % count == 0 else None for step in range(steps)]
    return pa.table(
        {
            "step": pa.array(range(steps), pa.int64()),
            "epoch": pa.array([epoch for epoch, _ in visits], pa.int64()),
            "query": pa.array([int(queries[query]) for _, query in visits], pa.int64()),
            "loss": pa.array([] if learned is None else learned.losses, pa.float64()),
            "weights": pa.array(weights, pa.list_(pa.float64())),
        }
    )


def candidates_table(candidates: Sequence[Candidate], found: Sequence[Found], choice: Choice) -> pa.Table:
    """One row for each candidate: its settings, by what factor it raises the top scores of held-out queries, and its weights."""
    import pyarrow as pa

    assert choice.gains is not None, "candidates are judged"
    return pa.table(
        {
            "k": pa.array([each.k for each in candidates], pa.int64()),
            "weight_decay": pa.array([each.weight_decay for each in candidates], pa.float64()),
            "seed": pa.array([each.seed for each in candidates], pa.uint64()),
            "gain": pa.array(choice.gains, pa.float64()),
            "chosen": pa.array([place == choice.place for place in range(len(candidates))], pa.bool_()),
            "weights": pa.array([each.weights for each in found], pa.list_(pa.float64())),
        }
    )
