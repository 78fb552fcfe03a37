"""learn: C -> w[j]. Fits one weight per parameter group to the contributions of the learn queries."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from gradstore.cluster import Engine
from gradstore.errors import ContractError, SpecError
from gradstore.plan.sizes import learner_tile
from gradstore.spec import RunSpec
from gradstore.stages.contributions import Contributions
from gradstore.stages.learn.methods import Found, certified, streamed
from gradstore.stages.learn.tables import trajectory_table, weights_table
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.backend import Storage
from gradstore.store.contract import require_equal
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    from gradstore.numerics.learner import LearnerSettings
    from gradstore.numerics.scores import Transform

# Settings of the learner that follow from C: its shape, and what its scores end in.
_TOLD_BY_CONTRIBUTIONS: Final = ("tile", "transform")


def learn(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write the weights that Algorithm 1 finds, of every kernel of a sweep and every set to learn from its own.

    Those that the store holds are left as they are.

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
        for target in swept.learn_targets():
            _learn(swept, store, target, progress)


def _learn(spec: RunSpec, store: FeatureStore, target: tuple[str, str], progress: Progress) -> None:
    """Learn the weights of a target: from a set of queries, under a name."""
    set_name, name = target
    contributions = Contributions.open(store, spec.kernel.name, set_name)
    shape = contributions.artifact.shape
    valid = len(contributions.valid_rows())
    if spec.learn.k > valid:
        raise SpecError(f"learn.k: found {spec.learn.k}; accepted: at most the {valid} train examples that are valid.")
    tile = learner_tile((shape.queries, shape.rows, len(shape.groups)))
    settings = learner_settings(spec, tile, contributions.artifact.settings["transform"])
    artifact = WeightsArtifact.create(
        store.storage,
        name,
        settings={
            **_made_from(spec, set_name, asdict(settings)),
            "contributions": dict(contributions.artifact.settings),
        },
    )
    if artifact.is_complete():
        return
    started = time.monotonic()
    learned, facts = _find(spec, contributions, settings, progress)
    arrays = {array.name: array for array in store.open_set("train").info.arrays}
    artifact.write(
        weights_table([arrays[name] for name in shape.groups], learned),
        trajectory_table(learned),
        facts={"seconds": time.monotonic() - started, **facts},
    )


def _find(spec: RunSpec, contributions: Contributions, settings: LearnerSettings, progress: Progress) -> Found:
    """Certify the weights, if the run asks for it and it can be done; else stream, and say why."""
    if spec.learn.method == "certified":
        found = certified(contributions, settings, spec.learn.memory_bytes, progress)
        if not isinstance(found, str):
            return found
        progress.note(f"weights are not certified but streamed, in {settings.epochs} reads of C: {found}")
    return streamed(contributions, settings, progress)


def refuse_other_weights(spec: RunSpec, storage: Storage) -> None:
    """Refuse names of weights that a store has already with other settings: as far as is known before there is any C.

    Raises
    ------
    ContractError
        Naming the settings that differ.
    """
    for swept, (set_name, name) in ((run, target) for run in spec.sweep() for target in run.learn_targets()):
        artifact = WeightsArtifact.find_named(storage, name)
        if artifact is None:
            continue
        if "transferred_from" in artifact.settings:
            raise ContractError(
                f"learn.name: the artifact {storage.url}/{artifact.folder} was taken from "
                f"{artifact.settings['transferred_from']['store']}. Choose another learn.name, and rank by it with score.weights."
            )
        learner = asdict(learner_settings(swept, tile=1))
        told = {key: value for key, value in learner.items() if key not in _TOLD_BY_CONTRIBUTIONS}
        asked = _made_from(swept, set_name, told)
        stored = {key: artifact.settings.get(key) for key in asked}
        stored["learner"] = {key: artifact.settings["learner"].get(key) for key in told}
        require_equal(
            f"learn.name: the artifact {storage.url}/{artifact.folder}",
            stored,
            asked,
            remedy=f"Restore these settings, choose another learn.name, or run `gradstore prune {storage.url} "
            f"{artifact.folder}`: the run then learns anew.",
        )


def _made_from(spec: RunSpec, set_name: str, learner: Mapping[str, Any]) -> dict[str, Any]:
    """What weights are made from, but for the contributions."""
    return {"learner": learner, "kernel": spec.kernel.name, "queries": set_name}


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
        objective=spec.learn.objective,
    )
