"""learn: C -> w[j]. Streams the contributions of the learn queries and fits one weight per parameter group."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gradstore.cluster import Engine
from gradstore.errors import SpecError
from gradstore.plan.sizes import learner_tile
from gradstore.spec import RunSpec
from gradstore.stages.contributions import Contributions
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.backend import Storage
from gradstore.store.contract import require_equal
from gradstore.store.features import FeatureArray, FeatureStore

if TYPE_CHECKING:
    import pyarrow as pa

    from gradstore.numerics.learner import LearnedWeights, LearnerSettings
    from gradstore.numerics.scores import Transform

# Settings of the learner that follow from C: its shape, and what its scores end in.
_TOLD_BY_CONTRIBUTIONS: Final = ("tile", "transform")


def learn(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write the weights that Algorithm 1 finds, of every kernel of a sweep its own, unless the store holds them.

    Raises
    ------
    NotReadyError
        If contributions are missing.
    SpecError
        If k is larger than the number of train examples.
    ContractError
        If weights of this name were learned otherwise.
    """
    del engine  # learning is light: it streams C in this process
    store = FeatureStore.open(spec.run.store)
    for swept in spec.sweep():
        _learn(swept, store, progress)


def _learn(spec: RunSpec, store: FeatureStore, progress: Progress) -> None:
    from gradstore.numerics.learner import learn_weights

    contributions = Contributions.open(store, spec.kernel.name, "learn")
    shape = contributions.artifact.shape
    if spec.learn.k > shape.num_examples:
        raise SpecError(f"learn.k: found {spec.learn.k}; accepted: at most the {shape.num_examples} train examples.")
    tile = learner_tile((shape.queries, shape.rows, len(shape.groups)))
    settings = learner_settings(spec, tile, contributions.artifact.settings["transform"])
    artifact = WeightsArtifact.create(
        store.storage,
        spec.learn.name,
        settings={**_made_from(spec, asdict(settings)), "contributions": dict(contributions.artifact.settings)},
    )
    if artifact.is_complete():
        return
    started = time.monotonic()
    with progress.stage(f"learn {spec.learn.name}", settings.epochs * shape.queries, "steps") as advance:
        learned = learn_weights(
            TileReader(contributions, settings.tile, advance).read,
            num_queries=shape.queries,
            num_groups=len(shape.groups),
            settings=settings,
        )
    arrays = {array.name: array for array in store.open_set("train").info.arrays}
    artifact.write(
        _weights_table([arrays[name] for name in shape.groups], learned),
        _trajectory_table(learned),
        facts={"seconds": time.monotonic() - started},
    )


def refuse_other_weights(spec: RunSpec, storage: Storage) -> None:
    """Refuse names of weights that a store has already with other settings: as far as is known before there is any C.

    Raises
    ------
    ContractError
        Naming the settings that differ.
    """
    for swept in spec.sweep():
        artifact = WeightsArtifact.find_named(storage, swept.learn.name)
        if artifact is None:
            continue
        learner = asdict(learner_settings(swept, tile=1))
        asked = _made_from(swept, {name: learner[name] for name in learner if name not in _TOLD_BY_CONTRIBUTIONS})
        stored = {name: artifact.settings.get(name) for name in asked}
        stored["learner"] = {name: artifact.settings["learner"].get(name) for name in asked["learner"]}
        require_equal(
            f"learn.name: the artifact {storage.url}/{artifact.folder}",
            stored,
            asked,
            remedy=f"Restore these settings, choose another learn.name, or run `gradstore prune {storage.url} "
            f"{artifact.folder}`: the run then learns anew.",
        )


def _made_from(spec: RunSpec, learner: Mapping[str, Any]) -> dict[str, Any]:
    """What weights are made from, but for the contributions."""
    return {"learner": learner, "kernel": spec.kernel.name, "queries": "learn"}


def learner_settings(spec: RunSpec, tile: int, transform: Transform = "none") -> LearnerSettings:
    """The settings of Algorithm 1 that run.toml asks for, of scores that end in a transform."""
    from gradstore.numerics.learner import LearnerSettings

    return LearnerSettings(
        k=spec.learn.k,
        epochs=spec.learn.epochs,
        learning_rate=spec.learn.learning_rate,
        weight_decay=spec.learn.weight_decay,
        seed=spec.run.seed if spec.learn.seed is None else spec.learn.seed,
        tile=tile,
        transform=transform,
    )


class TileReader:
    """Gives the valid rows of C_q block by block; holds the tile that q is in, because visits stay inside a tile."""

    def __init__(self, contributions: Contributions, size: int, advance: Callable[[int], None]) -> None:
        self._contributions = contributions
        self._size = size
        self._advance = advance
        self._tile = -1
        self._blocks: list[np.ndarray] = []

    def read(self, query: int) -> Iterator[np.ndarray]:
        """Pieces [rows, M] of one query's contributions, in row order."""
        self._advance(1)
        if query // self._size != self._tile:
            self._tile = query // self._size
            first = self._tile * self._size
            last = min(first + self._size, self._contributions.artifact.shape.queries)
            self._blocks = [c_QNM for _, c_QNM in self._contributions.read_blocks(first, last)]
        for block in self._blocks:
            yield block[query % self._size]


def _weights_table(arrays: list[FeatureArray], learned: LearnedWeights) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {
            "group": pa.array([array.name for array in arrays], pa.string()),
            "depth": pa.array([array.depth for array in arrays], pa.int64()),
            "function": pa.array([array.function for array in arrays], pa.string()),
            "weight": pa.array(learned.weights, pa.float64()),
        }
    )


def _trajectory_table(learned: LearnedWeights) -> pa.Table:
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
