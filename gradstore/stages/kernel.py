"""kernel: features -> spectra. One task builds one bundle of groups over all blocks and commits it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice, product

import numpy as np

from gradstore.cluster import Engine, Task
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.sizes import kernel_bundles, split
from gradstore.spec import MEAN_MEMBER, RunSpec
from gradstore.stages.progress import Progress
from gradstore.stages.reading import full_rows, full_width
from gradstore.store.artifacts import KernelArtifact
from gradstore.store.features import BlockReader, FeatureArray, FeatureSet, FeatureStore, Piece


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
    from gradstore.numerics.kernel import spectrum

    store = FeatureStore.open(store_url)
    train = store.open_set("train")
    trains = _members(train, member)
    artifact = KernelArtifact.open(store.storage, name, member)
    groups = artifact.bundles[bundle]
    widths: dict[str, int] = artifact.settings["widths"]
    grams = _gram_matrices(trains, groups, widths)
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


def _gram_matrices(
    trains: Sequence[FeatureSet], groups: Sequence[str], widths: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Gram matrix [d, d] of every group, over all blocks."""
    from gradstore.numerics.kernel import update_gram, zero_invalid

    info, concurrency = trains[0].info, trains[0].storage.concurrency
    arrays = {array.name: array for array in info.arrays}
    invalid = {block for item in trains for block in item.invalid_blocks()}
    grams = {group: np.zeros((widths[group], widths[group])) for group in groups}
    # One group at a time takes the least memory; as many are read ahead as the storage serves at once.
    reader = BlockReader(trains, [[group] for group in groups], ahead=concurrency)
    with closing(reader.read(range(info.num_blocks))) as pieces:
        for block, group in product(range(info.num_blocks), groups):
            rows = _next_mean(pieces, arrays[group], len(trains))
            if block in invalid:
                zero_invalid(rows)
            update_gram(grams[group], rows)
    return grams


def _next_mean(pieces: Iterator[Piece], array: FeatureArray, members: int) -> np.ndarray:
    """Rows of a group as kernels see them: the mean of the next pieces, one of each member; NaN where one is not valid."""
    total = full_rows(array, next(pieces).rows[array.name])
    if members == 1:
        return total
    total = total.copy()
    for piece in islice(pieces, members - 1):
        np.add(total, full_rows(array, piece.rows[array.name]), out=total)
    np.divide(total, members, out=total)
    return total
