"""Weights and how they were reached, as the tables of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradstore.store.features import FeatureArray

if TYPE_CHECKING:
    import pyarrow as pa

    from gradstore.numerics.learner import LearnedWeights


def weights_table(arrays: Sequence[FeatureArray], learned: LearnedWeights) -> pa.Table:
    """One row for each group."""
    import pyarrow as pa

    return pa.table(
        {
            "group": pa.array([array.name for array in arrays], pa.string()),
            "depth": pa.array([array.depth for array in arrays], pa.int64()),
            "function": pa.array([array.function for array in arrays], pa.string()),
            "weight": pa.array(learned.weights, pa.float64()),
        }
    )


def trajectory_table(learned: LearnedWeights) -> pa.Table:
    """One row per step; weights at the steps that end an epoch, because those of every step would be E Q M numbers."""
    import pyarrow as pa

    steps, queries = len(learned.visits), len(learned.visits) // len(learned.weights_per_epoch)
    weights = [
        learned.weights_per_epoch[step // queries] if (step + 1) % queries == 0 else None for step in range(steps)
    ]
    return pa.table(
        {
            "step": pa.array(range(steps), pa.int64()),
            "epoch": pa.array([epoch for epoch, _ in learned.visits], pa.int64()),
            "query": pa.array([query for _, query in learned.visits], pa.int64()),
            "loss": pa.array(learned.losses, pa.float64()),
            "weights": pa.array(weights, pa.list_(pa.float64())),
        }
    )
