"""What artifacts of contribute are made from: what makes one another one, and what a task must find in what it writes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradstore.errors import SupersededError
from gradstore.plan.resolve import resolve_kernel
from gradstore.spec import RunSpec
from gradstore.stages import full_kernel
from gradstore.stages.contribute.queries import Target, run_of
from gradstore.stages.contribute.rows import score_transform
from gradstore.stages.spectra import kernel_settings
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.artifacts.artifact import Artifact
from gradstore.store.codecs import plain
from gradstore.store.features import FeatureStore


def query_settings(spec: RunSpec, store: FeatureStore, name: str, members: Sequence[str]) -> dict[str, Any]:
    """What preconditioned queries are made from: the kernel with its damping, and the sets as they are now."""
    return {**_of_kernel(spec, store, members), **_sets(spec, store, name, members)}


def output_settings(spec: RunSpec, store: FeatureStore, target: Target) -> dict[str, Any]:
    """What a target is made from: what is asked of it, and the sets as they are now."""
    members = store.open_set("train").info.members
    run = run_of(spec, target.kernel)
    return {**_asked(spec, store, target), **_sets(run, store, target.set_name, members)}


def refuse_superseded(spec: RunSpec, store: FeatureStore, target: Target, artifact: Artifact) -> None:
    """Make sure that an artifact is what a task is asked for: one of an earlier run may wait on a scheduler still.

    The sets are not compared, which takes as long as reading all of their records: a run does that when it begins.

    Raises
    ------
    SupersededError
        Naming what differs.
    """
    asked = plain(_asked(spec, store, target))
    differing = [name for name, value in asked.items() if artifact.settings.get(name) != value]
    if differing:
        raise SupersededError(
            f"{artifact.storage.url}/{artifact.folder}: was made anew with another {differing[0]} than this task's. Run "
            "`gradstore contribute` again."
        )


def _asked(spec: RunSpec, store: FeatureStore, target: Target) -> dict[str, Any]:
    run = run_of(spec, target.kernel)
    settings = {
        **_of_kernel(run, store, store.open_set("train").info.members),
        "etas": run.model.etas,
        "normalize": run.contribute.normalize,
        "transform": score_transform(store.contract["model"].get("output")),
    }
    if run.contribute.mode == "scores":
        named = None if target.weights is None else WeightsArtifact.open(store.storage, target.weights)
        settings["weights"] = None if named is None else {"name": target.weights, "made": dict(named.settings)}
    return settings


def _of_kernel(spec: RunSpec, store: FeatureStore, members: Sequence[str]) -> dict[str, Any]:
    if not resolve_kernel(spec).across_groups:
        return {"kernel": kernel_settings(spec), "kernel_of": spec.kernel.members}
    # Coefficients and coordinates are of one build.
    return {
        "kernel": full_kernel.kernel_settings(store, spec),
        "built": full_kernel.built(store, spec, members),
        "kernel_of": spec.kernel.members,
    }


def _sets(spec: RunSpec, store: FeatureStore, name: str, members: Sequence[str]) -> dict[str, Any]:
    made_from = None if spec.kernel.members == "mean" else members
    return {"train": store.describe("train", made_from), "queries_from": store.describe(name, members)}
