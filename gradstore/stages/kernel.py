"""kernel: features -> spectra. One task builds one bundle of groups over all blocks and commits it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gradstore.cluster import Engine, Task
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.sizes import kernel_bundles, split
from gradstore.spec import MEAN_MEMBER, RunSpec
from gradstore.stages.progress import Progress
from gradstore.stages.reading import full_width, read_block
from gradstore.store.artifacts import KernelArtifact
from gradstore.store.features import FeatureSet, FeatureStore


def build_kernel(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write the spectra of the run's kernel that the store does not hold yet; the identity has none.

    Raises
    ------
    NotReadyError
        If blocks of the train set are missing.
    ContractError
        If a kernel of this kind was built from other features.
    """
    train = FeatureStore.open(spec.run.store).open_set("train")
    for member in dict.fromkeys(spec.kernel.of_member(member) for member in train.info.members):
        _build(spec, engine, progress, train, member)


def _build(spec: RunSpec, engine: Engine, progress: Progress, train: FeatureSet, member: str) -> None:
    """Build the kernel of one member, whose features span a space of their own, or of the mean of all members."""
    widths = {array.name: full_width(array) for array in train.info.arrays}
    if not resolve_kernel(spec).needs_spectra:
        widths = {}
    snapshots = [item.snapshot().to_json() for item in _members(train, member)]
    artifact = KernelArtifact.create(
        train.storage,
        spec.kernel.kind,
        member,
        settings={"kind": spec.kernel.kind, "train": snapshots, "data": train.info.data_hash},
        widths=widths,
        bundles=split(list(widths), kernel_bundles(list(widths.values()))),
    )
    label = spec.kernel.kind if len(train.info.members) == 1 else f"{spec.kernel.kind} {member}"
    tasks = [
        Task(
            name=f"kernel-{label.replace(' ', '-')}-{bundle:04d}",
            function=build_bundle,
            arguments=(spec.run.store, spec.kernel.kind, member, bundle),
            rows=len(artifact.bundles[bundle]),
        )
        for bundle in artifact.missing_units()
    ]
    done = len(widths) - sum(task.rows for task in tasks)
    with progress.stage(f"kernel {label}", len(widths) if tasks else 0, "groups", done) as advance:
        for task, _ in engine.run(tasks):
            advance(task.rows)


def build_bundle(store_url: str, name: str, member: str, bundle: int) -> int:
    """Task: accumulate the Gram matrices of one bundle of groups, decompose and commit them; return how many."""
    from gradstore.numerics.kernel import spectrum, update_gram, zero_invalid

    store = FeatureStore.open(store_url)
    train = store.open_set("train")
    trains = _members(train, member)
    artifact = KernelArtifact.open(store.storage, name, member)
    groups = artifact.bundles[bundle]
    widths: dict[str, int] = artifact.settings["widths"]
    grams = {group: np.zeros((widths[group], widths[group])) for group in groups}
    stored = {array.name: array.features for array in train.info.arrays}
    buffers = {group: np.empty((train.info.block_rows, stored[group]), np.float32) for group in groups}
    invalid = {block for item in trains for block in item.invalid_blocks()}
    for block in range(train.info.num_blocks):
        for group, rows in _mean_block(trains, block, groups, buffers).items():
            if block in invalid:
                zero_invalid(rows)
            update_gram(grams[group], rows)
    del buffers, rows
    spectra = {}
    for group in groups:
        # A matrix goes as soon as it is decomposed, and of its vectors only what is stored stays (plan/memory.py).
        values, vectors = spectrum(grams.pop(group))
        spectra[group] = values, vectors.astype(np.float32)
        del vectors
    artifact.write_bundle(bundle, spectra, facts={"rows": train.info.num_examples})
    return len(groups)


def _members(train: FeatureSet, member: str) -> list[FeatureSet]:
    """The train set as the member has it whose kernel is built, or as all have it."""
    return [train.of_member(name) for name in (train.info.members if member == MEAN_MEMBER else [member])]


def _mean_block(
    trains: Sequence[FeatureSet], block: int, groups: Sequence[str], out: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The features of a block by group, the mean of those of all sets; NaN where a row is not valid in one of them."""
    first, *others = trains
    found = read_block(first, block, groups, out=out)
    for group, total in found.items():
        for other in others:
            np.add(total, read_block(other, block, [group])[group], out=total)
        if others:
            np.divide(total, len(trains), out=total)
    return found
