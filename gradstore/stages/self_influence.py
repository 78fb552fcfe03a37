"""self-influence: features + spectra -> tau_j(n, n) of every train example. No query takes part in it.

A task is a column of chunks: the spectra of a few groups are read once, then all rows of these groups stream by, and a chunk
is committed as soon as its rows have passed. So every feature and every spectrum is read once in all, and a task holds the
spectra of its groups alone (ADR 0017). Under a kernel across groups there is one column, whose rows are shared out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.cluster import Engine, Task
from gradstore.errors import SupersededError
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.self_influence import influence_chunk, influence_tasks
from gradstore.spec import RunSpec
from gradstore.stages import full_kernel
from gradstore.stages.full_self_influence import full_self_influences, is_dual
from gradstore.stages.progress import Progress
from gradstore.stages.reading import full_rows, full_width
from gradstore.stages.spectra import kernel_settings, open_spectra, read_spectrum
from gradstore.store.artifacts import SelfInfluenceArtifact, SelfInfluenceShape
from gradstore.store.features import BlockReader, FeatureSet, FeatureStore, Piece

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Damping, Spectrum


def self_influence(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write the self-influence of all train examples that the store does not hold yet, under all kernels of a sweep.

    Raises
    ------
    NotReadyError
        If features or spectra are missing.
    ContractError
        If self-influence of this name was computed with other settings.
    """
    store = FeatureStore.open(spec.run.store)
    train = store.open_set("train")
    tasks, total = [], 0
    for member in train.info.members:
        artifacts = {swept.kernel.name: _create(swept, store, train.of_member(member)) for swept in spec.sweep()}
        total += len(artifacts) * train.info.num_examples * len(train.info.arrays)
        tasks += _tasks(spec, store, member, artifacts)
    left = sum(task.rows for task in tasks)
    read_bytes = (
        train.info.row_bytes * train.info.num_examples * len(train.info.members) if _reads_features(spec) else 0
    )
    label = f"self-influence {spec.kernel.name}"
    with progress.stage(label, total if tasks else 0, "values", total - left, read_bytes) as advance:
        for task, _ in engine.run(tasks):
            advance(task.rows)


def _reads_features(spec: RunSpec) -> bool:
    """Whether there is a kernel to apply: without one, the norms of the example table tell all."""
    return resolve_kernel(spec).needs_spectra


def _create(spec: RunSpec, store: FeatureStore, train: FeatureSet) -> SelfInfluenceArtifact:
    info, kernel = train.info, resolve_kernel(spec)
    apart = kernel.needs_spectra and not kernel.across_groups
    if apart:
        open_spectra(store, spec, train.member)
    widths = [full_width(array) for array in info.arrays]
    chunk = influence_chunk(widths, info.rows, info.block_rows, apart=apart)
    made_from = None if spec.kernel.members == "mean" else [train.member]
    return SelfInfluenceArtifact.create(
        store.storage,
        spec.kernel.name,
        train.member,
        settings={
            **_kernel_settings(spec, store, train.member),
            "kernel_of": spec.kernel.members,
            "train": store.describe("train", made_from),
        },
        shape=SelfInfluenceShape(
            rows=info.rows,
            block_rows=info.block_rows,
            gaps=info.gaps,
            groups=tuple(array.name for array in info.arrays),
            chunk_rows=chunk[0],
            chunk_groups=chunk[1],
        ),
    )


def _kernel_settings(spec: RunSpec, store: FeatureStore, member: str) -> dict[str, Any]:
    """What the artifact keeps of the kernel: its options and, of one across groups, which build of it."""
    if not resolve_kernel(spec).across_groups:
        return {"kernel": kernel_settings(spec)}
    return {"kernel": full_kernel.kernel_settings(store, spec), "built": full_kernel.built(store, spec, [member])}


def _tasks(
    spec: RunSpec, store: FeatureStore, member: str, artifacts: Mapping[str, SelfInfluenceArtifact]
) -> list[Task]:
    """The tasks of one member; those of a sweep are computed together where they are divided alike."""
    workers = -(-spec.cluster.num_workers // len(spec.model.etas))
    if resolve_kernel(spec).across_groups and is_dual(store, spec, member):
        # Every task would pass over all rows once more.
        workers = 1
    alike: dict[SelfInfluenceShape, list[str]] = defaultdict(list)
    for name, artifact in artifacts.items():
        alike[artifact.shape].append(name)
    tasks = []
    for shape, names in alike.items():
        missing = {name: artifacts[name].missing_units() for name in names}
        columns: dict[int, list[int]] = defaultdict(list)
        for unit in sorted({unit for units in missing.values() for unit in units}):
            columns[shape.place(unit)[1]].append(unit)
        values = {
            unit: sum(_num_values(shape, unit) for name in names if unit in missing[name])
            for units in columns.values()
            for unit in units
        }
        tasks += [_task((spec, member, names), units, values) for units in influence_tasks(columns, workers)]
    return tasks


def _num_values(shape: SelfInfluenceShape, unit: int) -> int:
    rows = sum(stop - start for start, stop in map(shape.block_range, shape.blocks_of(unit)))
    return rows * len(shape.groups_of(unit))


def _task(of: tuple[RunSpec, str, list[str]], units: Sequence[int], values: Mapping[int, int]) -> Task:
    """The task of some units of a member under some kernels of a sweep; what it is cut into holds one spectrum at a time."""
    spec, member, names = of
    arguments = spec.run.store, spec.model_dump(), member, names

    def cut(units: Sequence[int], suffix: str, *, whole: bool) -> Task:
        return Task(
            name=f"self-influence-{names[0]}-{member}-{units[0]:06d}{suffix}",
            function=compute_units if whole else compute_alone,
            arguments=(*arguments, list(units)),
            rows=sum(values[unit] for unit in units),
            lower=("features.block_rows",),
        )

    return replace(cut(units, "", whole=True), smaller=lambda: [cut([unit], "-alone", whole=False) for unit in units])


def compute_units(
    store_url: str, run: Mapping[str, Any], member: str, names: Sequence[str], units: Sequence[int]
) -> int:
    """Task: compute and commit units of one column of chunks, for some kernels of a sweep; return how many units.

    Features are read once for all dampings, and the spectra of all groups of the column are held.
    """
    return _compute((store_url, run, member), names, units, held=True)


def compute_alone(
    store_url: str, run: Mapping[str, Any], member: str, names: Sequence[str], units: Sequence[int]
) -> int:
    """Task: as `compute_units` with the spectrum of one group at a time, where there is no memory for more."""
    return _compute((store_url, run, member), names, units, held=False)


def _compute(
    place: tuple[str, Mapping[str, Any], str], names: Sequence[str], units: Sequence[int], *, held: bool
) -> int:
    store_url, run, member = place
    spec = RunSpec.model_validate(run)
    store = FeatureStore.open(store_url)
    train = store.open_set("train", member)
    sweep = [swept for swept in spec.sweep() if swept.kernel.name in names]
    artifacts = [_open(swept, store, member) for swept in sweep]
    lacking = [set(artifact.missing_units()) for artifact in artifacts]
    left = [unit for unit in units if any(unit in missing for missing in lacking)]
    shape = artifacts[0].shape
    # Units of a task are in one column; those that are computed alone are begun one by one.
    parts = [left] if held else [[unit] for unit in left]
    computed = chain.from_iterable(_computed(sweep, train, shape, part, held=held) for part in parts)
    for unit, tau_VNG in zip(left, computed, strict=True):
        for artifact, tau_NG in zip(artifacts, tau_VNG, strict=True):
            artifact.write(unit, tau_NG, facts={"rows": int(np.isfinite(tau_NG).all(1).sum())})
    return len(left)


def _open(spec: RunSpec, store: FeatureStore, member: str) -> SelfInfluenceArtifact:
    artifact = SelfInfluenceArtifact.open(store.storage, spec.kernel.name, member)
    # A task of an earlier run must not fill an artifact that was pruned and made anew since.
    asked = {**_kernel_settings(spec, store, member), "kernel_of": spec.kernel.members}
    if any(artifact.settings[key] != value for key, value in asked.items()):
        raise SupersededError(
            f"{artifact.folder}: is of another kernel than this task's. Run `gradstore self-influence` again."
        )
    return artifact


def _computed(
    sweep: Sequence[RunSpec], train: FeatureSet, shape: SelfInfluenceShape, units: Sequence[int], *, held: bool
) -> Iterator[np.ndarray]:
    """Self-influence of units, one after the other: float64 [kernels of the sweep, rows of the chunk, its groups]."""
    if not units:
        return
    if not _reads_features(sweep[0]):
        yield from (_squared_norms(train, shape, unit) for unit in units)
        return
    store = FeatureStore.open(sweep[0].run.store)
    blocks = [block for unit in units for block in shape.blocks_of(unit)]
    dampings = [damping for swept in sweep if (damping := resolve_kernel(swept).damped_by) is not None]
    if resolve_kernel(sweep[0]).across_groups:
        stream = full_self_influences(store, sweep[0], train.member, blocks, dampings)
        yield from (_gathered(shape, unit, stream, len(dampings)) for unit in units)
        return
    groups = shape.groups_of(units[0])
    artifact = open_spectra(store, sweep[0], train.member)
    ahead = store.storage.concurrency
    if not held:
        (unit,) = units
        tau_VNG = _nothing(shape, unit, len(dampings))
        for place, group in enumerate(groups):
            of_group = _InGroups({group: read_spectrum(artifact, group)}, dampings)
            with closing(BlockReader([train], [[group]], ahead=ahead).read(blocks)) as pieces:
                tau_VNG[:, :, place] = of_group.unit(train, shape, unit, pieces)[:, :, 0]
        yield tau_VNG
        return
    of_groups = _InGroups({group: read_spectrum(artifact, group) for group in groups}, dampings)
    with closing(BlockReader([train], [[group] for group in groups], ahead=ahead).read(blocks)) as pieces:
        for unit in units:
            yield of_groups.unit(train, shape, unit, pieces)


@dataclass(frozen=True, slots=True)
class _InGroups:
    """The spectra of the groups of a column, and the dampings that they are applied with."""

    spectra: Mapping[str, Spectrum]
    dampings: Sequence[Damping]

    def unit(self, train: FeatureSet, shape: SelfInfluenceShape, unit: int, pieces: Iterator[Piece]) -> np.ndarray:
        """Self-influence of a unit whose features are the next pieces: float64 [dampings, rows, groups]."""
        from gradstore.numerics.self_influence import self_influences

        arrays = {array.name: array for array in train.info.arrays}
        tau_VNG = _nothing(shape, unit, len(self.dampings))
        for block in shape.blocks_of(unit):
            rows = _rows_in(shape, unit, block)
            for place, (group, spectrum) in enumerate(self.spectra.items()):
                rows_ND = full_rows(arrays[group], next(pieces).rows[group])
                tau_VNG[:, rows, place] = self_influences(rows_ND, spectrum, self.dampings)
        return tau_VNG


def _gathered(
    shape: SelfInfluenceShape, unit: int, stream: Iterator[tuple[int, np.ndarray]], variants: int
) -> np.ndarray:
    """The next blocks of a stream as a unit: float64 [dampings, rows, groups]."""
    tau_VNG = _nothing(shape, unit, variants)
    for expected in shape.blocks_of(unit):
        block, found_VNG = next(stream)
        assert block == expected, "blocks come in the order that they are asked for"
        tau_VNG[:, _rows_in(shape, unit, block)] = found_VNG
    return tau_VNG


def _squared_norms(train: FeatureSet, shape: SelfInfluenceShape, unit: int) -> np.ndarray:
    """Self-influence under the identity: the squares of the example table's norms."""
    tau_VNG = _nothing(shape, unit, 1)
    for block in shape.blocks_of(unit):
        norms = train.read_examples(["group_norms"], block=block)["group_norms"].to_pylist()
        unknown = [np.nan] * len(shape.groups)
        norms_NM = np.array([unknown if row is None else row for row in norms], np.float64)
        tau_VNG[0, _rows_in(shape, unit, block)] = np.square(norms_NM)
    return tau_VNG


def _nothing(shape: SelfInfluenceShape, unit: int, variants: int) -> np.ndarray:
    """NaN of the shape of a unit, which rows of gaps keep."""
    return np.full((variants, *shape.layout().chunk_extent(shape.place(unit))), np.nan)


def _rows_in(shape: SelfInfluenceShape, unit: int, block: int) -> slice:
    """Rows of a block, counted from the first of the unit's chunk."""
    first = shape.place(unit)[0] * shape.chunk_rows
    start, stop = shape.block_range(block)
    return slice(start - first, stop - first)
