"""kernel: features -> spectra. One task builds one bundle of groups over all blocks and commits it."""

from __future__ import annotations

import numpy as np

from gradstore.cluster import Engine, Task
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.sizes import kernel_bundles, split
from gradstore.spec import RunSpec
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import KernelArtifact
from gradstore.store.features import FeatureStore


def build_kernel(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write the spectra of the run's kernel that the store does not hold yet; the identity has none.

    Raises
    ------
    NotReadyError
        If blocks of the train set are missing.
    ContractError
        If a kernel of this kind was built from other features.
    """
    store = FeatureStore.open(spec.run.store)
    train = store.open_set("train")
    widths = {array.name: array.features for array in train.info.arrays}
    if not resolve_kernel(spec).needs_spectra:
        widths = {}
    artifact = KernelArtifact.create(
        store.storage,
        spec.kernel.kind,
        settings={"kind": spec.kernel.kind, "train": train.snapshot().to_json(), "data": train.info.data_hash},
        widths=widths,
        bundles=split(list(widths), kernel_bundles(list(widths.values()))),
    )
    tasks = [
        Task(
            name=f"kernel-{spec.kernel.kind}-{bundle:04d}",
            function=build_bundle,
            arguments=(spec.run.store, spec.kernel.kind, bundle),
            rows=len(artifact.bundles[bundle]),
        )
        for bundle in artifact.missing_units()
    ]
    done = len(widths) - sum(task.rows for task in tasks)
    with progress.stage(f"kernel {spec.kernel.kind}", len(widths) if tasks else 0, "groups", done) as advance:
        for task, _ in engine.run(tasks):
            advance(task.rows)


def build_bundle(store_url: str, name: str, bundle: int) -> int:
    """Task: accumulate the Gram matrices of one bundle of groups, decompose and commit them; return how many."""
    from gradstore.numerics.kernel import spectrum, update_gram

    store = FeatureStore.open(store_url)
    train = store.open_set("train")
    artifact = KernelArtifact.open(store.storage, name)
    groups = artifact.bundles[bundle]
    widths: dict[str, int] = artifact.settings["widths"]
    grams = {group: np.zeros((widths[group], widths[group])) for group in groups}
    buffers = {group: np.empty((train.info.block_rows, widths[group]), np.float32) for group in groups}
    for block in range(train.info.num_blocks):
        for group, rows in train.read_block(block, groups, out=buffers).items():
            update_gram(grams[group], rows)
    del buffers, rows
    spectra = {}
    for group in groups:
        # A matrix goes as soon as it is decomposed, and of its vectors only what is stored stays (plan/memory.py).
        values, vectors = spectrum(grams.pop(group))
        spectra[group] = values, vectors.astype(np.float32)
        del vectors
    artifact.write_bundle(bundle, spectra, facts={"rows": train.info.rows})
    return len(groups)
