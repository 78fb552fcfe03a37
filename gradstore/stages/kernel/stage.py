"""The kernel stage: which artifacts the run's kernel is made of, and the tasks that build what is missing of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradstore.cluster import Engine, Task
from gradstore.plan.kernels import kernel_bundles, refuse_too_large, refuse_without_factors
from gradstore.plan.memory import PROCESS_BYTES
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.sizes import Widths, split
from gradstore.spec import RunSpec
from gradstore.stages.kernel.bundles import build_bundle, reader_of, sum_covariances
from gradstore.stages.kernel.full import build_full
from gradstore.stages.progress import Progress
from gradstore.stages.reading import full_width, members_of
from gradstore.store.artifacts import KernelArtifact, SpectraShape
from gradstore.store.features import FeatureSet, FeatureStore, SetInfo

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Kernel


def build_kernel(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write what the store does not hold yet of the run's kernel; the identity has nothing but its settings.

    Raises
    ------
    NotReadyError
        If blocks of the train set are missing.
    ContractError
        If a kernel of this kind was built from other features, or with other settings.
    SpecError
        If the features are not what the kernel needs.
    ResourceError
        If a worker has no memory for it.
    """
    train = FeatureStore.open(spec.run.store).open_set("train")
    members = [*dict.fromkeys(spec.kernel.of_member(member) for member in train.info.members)]
    if resolve_kernel(spec).across_groups:
        build_full(spec, engine, progress, train, members)
        return
    for member in members:
        _build_in_groups(spec, engine, progress, train, member)


def _build_in_groups(spec: RunSpec, engine: Engine, progress: Progress, train: FeatureSet, member: str) -> None:
    """Build the kernel of one member, whose features span a space of their own, or of the mean of all members."""
    kernel = resolve_kernel(spec)
    refuse_without_factors(spec, kernel, [array.name for array in train.info.arrays if not array.parts])
    shape, trains = _shape(kernel, train.info), members_of(train, member)
    _refuse_too_large(spec, kernel, trains)
    kind, label = spec.kernel.kind, spec.kernel.kind if len(train.info.members) == 1 else f"{spec.kernel.kind} {member}"
    artifact = KernelArtifact.create(
        train.storage,
        kind,
        member,
        settings={
            "kind": kind,
            "train": [item.snapshot().to_json() for item in trains],
            "data": train.info.data_hash,
        },
        shape=shape,
        bundles=split(list(shape.widths), kernel_bundles(kernel.basis, list(shape.widths.values()))),
    )
    tasks = _tasks(spec.run.store, artifact, member, f"kernel-{label.replace(' ', '-')}")
    total = len(shape.widths)
    done = total - sum(task.rows for task in tasks)
    with progress.stage(f"kernel {label}", total if tasks else 0, "groups", done) as advance:
        for task, result in engine.run(tasks):
            if task.function is sum_covariances and result:
                progress.note(
                    f"kernel {label}: {result} of {train.info.num_blocks} blocks have lost covariances, as a row of theirs was "
                    "erased; those of the others count"
                )
            advance(task.rows)


def _refuse_too_large(spec: RunSpec, kernel: Kernel, trains: Sequence[FeatureSet]) -> None:
    """Refuse a kernel of which a task does not fit a worker: the plan may have been of another."""
    info = trains[0].info
    widths = Widths(
        stored=tuple(array.features for array in info.arrays),
        full=tuple(full_width(array) for array in info.arrays),
        sides=tuple(tuple(part.shape for part in array.parts) for array in info.arrays),
    )
    # Beside what is read, the rows of a group as they are multiplied out, or summed over members.
    copied = 0 if len(trains) == 1 and widths.full == widths.stored else 2 * 4 * info.block_rows * max(widths.full)
    reader = reader_of(trains, [array.name for array in info.arrays])
    refuse_too_large(spec, kernel, widths, PROCESS_BYTES + reader.memory_bytes + copied)


def _shape(kernel: Kernel, info: SetInfo) -> SpectraShape:
    """What the spectra of a kernel of these features are made of."""
    from gradstore.numerics.kernel import Block, Ekfac

    if kernel.basis is None:
        return SpectraShape(widths={})
    return SpectraShape(
        widths={array.name: full_width(array) for array in info.arrays},
        basis=kernel.basis,
        dtype=kernel.spectra if isinstance(kernel, Block | Ekfac) else "float32",
        parts={array.name: [(part.part, part.shape) for part in array.parts] for array in info.arrays}
        if kernel.basis == "kronecker"
        else {},
    )


def _tasks(store: str, artifact: KernelArtifact, member: str, label: str) -> list[Task]:
    """Tasks of what is missing; where bases come from covariances, these first."""
    kind, missing, first = artifact.settings["kind"], artifact.missing_units(), artifact.covariances_unit
    tasks = []
    if first in missing:
        tasks.append(
            Task(name=f"{label}-covariances", function=sum_covariances, arguments=(store, kind, member), rows=0)
        )
    before = tuple(task.name for task in tasks)
    tasks += [
        Task(
            name=f"{label}-{bundle:04d}",
            function=build_bundle,
            arguments=(store, kind, member, bundle),
            rows=len(artifact.bundles[bundle]),
            after=before,
            lower=("features.projection.rank",),
        )
        for bundle in missing
        if bundle != first
    ]
    return tasks
