"""The plan of a run: what every stage will write, in how many blocks and objects, with how much memory.

A plan is made from names and shapes alone (the model on the meta device, declared rows), so it costs seconds for a model
of any size. Every stage makes it first, and it refuses what cannot fit before work starts.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from gradstore.adapters import Adapter, DeclaresShape
from gradstore.errors import ResourceError, SpecError
from gradstore.groups import ParameterGroup, Partition
from gradstore.plan.combinations import refuse_combinations
from gradstore.plan.contributions import building_notes, contribute_notes, plan_contribute
from gradstore.plan.dtypes import BLOSC_RATIOS, SCORE_ERRORS
from gradstore.plan.kernels import (
    SMALLER_KERNELS,
    decomposition_notes,
    refuse_without_covariances,
    refuse_without_factors,
)
from gradstore.plan.memory import TaskMemory
from gradstore.plan.resolve import make_adapter, model_shape, resolve_device, resolve_kernel, resolve_projection
from gradstore.plan.sizes import (
    ASSUMED_RATE,
    ITEM_BYTES,
    MAX_OBJECTS,
    MIN_BLOCK_ROWS,
    PUT_DOLLARS,
    REFUSED_CHUNK_BYTES,
    SetPlan,
    Sizes,
    StagePlan,
    Widths,
    gigabytes,
)
from gradstore.plan.stages import stage_plans
from gradstore.spec import RunSpec, key_of
from gradstore.store.dtypes import DTYPES

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Kernel
    from gradstore.numerics.projection import Projection
    from gradstore.store.examples import Example

    Splits = Mapping[str, Sequence[Example]]

# What a file takes on a disk beside its array's bytes: half a page of 4 KiB, and its part of records, metadata and tables.
# The quickstart's 6,900 files take 9 KB each.
FILE_BYTES = 9_000
# What to lower where a stage's tasks do not fit a worker, or its work the process that runs it.
LOWER = {
    "featurize": "features.token_budget, features.block_rows or the projection's rank",
    "kernel": SMALLER_KERNELS,
    "self-influence": SMALLER_KERNELS,
    "contribute": "data.learn.rows, data.eval.rows, features.block_rows or the projection's rank, or sweep fewer dampings",
    "score": "score.tail_patch.k, or set score.tail_patch.queries = 0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do.

    ``dtype_bytes`` are those of the train features in each type, whichever is chosen; ``notes`` are for the reader.
    """

    partition: Partition
    projection: Projection
    kernel: Kernel
    sets: Mapping[str, SetPlan]
    dtype_bytes: Mapping[str, int]
    stages: tuple[StagePlan, ...]
    worker_memory_bytes: int
    notes: tuple[str, ...]

    @property
    def features(self) -> int:
        """D, the features of one example over all groups."""
        return sum(self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        """k_j of every group."""
        return tuple(self.projection.width(group) for group in self.partition.groups)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values; rows, feature_bytes and blocks are those of the train set."""
        train = self.sets["train"]
        return {
            "rows": train.rows,
            "groups": len(self.partition.groups),
            "features": self.features,
            "feature_bytes": train.feature_bytes,
            "dtype_bytes": dict(self.dtype_bytes),
            "dtype_errors": {name: asdict(error) for name, error in SCORE_ERRORS.items()},
            "objects": sum(stage.objects for stage in self.stages),
            "blocks": train.blocks,
            "block_rows": train.block_rows,
            "total_bytes": sum(stage.written_bytes for stage in self.stages),
            "task_memory_bytes": max(stage.task_memory_bytes for stage in self.stages),
            "worker_memory_bytes": self.worker_memory_bytes,
            "parameters": self.partition.total_parameters,
            "coverage": self.partition.coverage,
            "skipped": [asdict(skipped) for skipped in self.partition.skipped],
            "sets": {name: asdict(set_plan) for name, set_plan in self.sets.items()},
            "stages": [asdict(stage) for stage in self.stages],
            "notes": list(self.notes),
        }


def make_plan(spec: RunSpec, splits: Splits | None = None) -> Plan:
    """Plan a run.

    Parameters
    ----------
    spec
        The run.
    splits
        The examples of every split where the data has been read. Else rows and lengths are those that [data.*] declares; and
        where it does not, or the adapter knows no length, the data is read now.

    Raises
    ------
    SpecError
        If a kind, an option or a rule is unknown.
    ResourceError
        If a task, a chunk or the whole run does not fit.
    """
    adapter = make_adapter(spec)
    projection, kernel = resolve_projection(spec), resolve_kernel(spec)
    refuse_combinations(spec, spec.model.output)
    blank = adapter.blank() if splits is None and isinstance(adapter, DeclaresShape) else None
    shapes = None if splits is not None else _declared(spec, adapter, blank)
    if shapes is None:
        splits = adapter.examples().splits if splits is None else splits
        shapes = {name: (len(rows), max(example.size for example in rows)) for name, rows in splits.items()}
    if spec.learn.objective != "pairs" and max(spec.learn.ks) > shapes["train"][0]:
        raise SpecError(
            f"learn.k: found {max(spec.learn.ks)}; accepted: at most the {shapes['train'][0]:,} rows of data.train."
        )
    text = adapter.longest("train") is not None
    example = None if text else blank if splits is None else splits["train"][0]
    model = model_shape(adapter, adapter.load("meta"), spec, example)
    widths = Widths.of(projection, model.partition.groups)
    groups = zip(model.partition.groups, widths.sides, strict=True)
    refuse_without_factors(spec, kernel, [group.name for group, sides in groups if not sides])
    refuse_without_covariances(spec, kernel)
    sizes = Sizes(spec, model, widths.stored, resolve_device(spec))
    sets = {name: sizes.set_plan(name, *shapes[name]) for name in spec.data.splits()}
    memory = TaskMemory(spec, model, widths)
    # Lengths are declared of texts, and of synthetic examples, which have none.
    of_words = spec.model.adapter != "synthetic" and blank is None
    texts = of_words if splits is None else any(example.text for example in splits["eval"])
    stages = stage_plans(spec, widths, sets, memory, spectra=kernel.needs_spectra, texts=texts)
    cut = plan_contribute(spec, widths, sets)
    plan = Plan(
        partition=model.partition,
        projection=projection,
        kernel=kernel,
        sets=sets,
        dtype_bytes={name: sizes.feature_bytes(name, sets["train"].rows) for name in DTYPES},
        stages=stages,
        worker_memory_bytes=sizes.worker_memory,
        notes=(
            *_notes(spec, sets, stages, model.partition, sizes),
            *_kernel_notes(spec, kernel, widths, sets),
            *contribute_notes(cut),
            *building_notes(spec, cut, sets["train"]),
        ),
    )
    _refuse_wide_chunks(spec, plan)
    _refuse_too_little_memory(spec, plan)
    _refuse_a_full_disk(spec, plan)
    return plan


def _kernel_notes(spec: RunSpec, kernel: Kernel, widths: Widths, sets: Mapping[str, SetPlan]) -> list[str]:
    if not kernel.across_groups:
        return decomposition_notes(kernel, widths)
    from gradstore.plan.full import full_notes, refuse_all_coefficients

    refuse_all_coefficients(spec, widths, sets)
    return full_notes(spec, widths, sets["train"].rows)


def _declared(spec: RunSpec, adapter: Adapter, blank: Example | None) -> dict[str, tuple[int, int]] | None:
    """(rows, tokens of the longest example) of every split where run.toml tells both of all, or a blank one their size."""
    found = {}
    for name, section in spec.data.splits().items():
        longest = adapter.longest(name) if blank is None else blank.size
        if section.rows is None or longest is None:
            return None
        found[name] = (section.rows, longest)
    return found


def _refuse_wide_chunks(spec: RunSpec, plan: Plan) -> None:
    for group, width in zip(plan.partition.groups, plan.widths, strict=True):
        _refuse_wide(group, width, ITEM_BYTES[spec.features.dtype])
    for planned in plan.sets.values():
        if planned.largest_chunk_bytes > REFUSED_CHUNK_BYTES:
            row_bytes = planned.largest_chunk_bytes // planned.block_rows
            raise ResourceError(
                f"features.block_rows: {planned.block_rows} rows make a chunk of {gigabytes(planned.largest_chunk_bytes)} "
                f"in the {planned.dtype} set {planned.name}; the limit is {gigabytes(REFUSED_CHUNK_BYTES)}. Use at most "
                f"{REFUSED_CHUNK_BYTES // row_bytes}, or leave it to the plan."
            )


def _refuse_too_little_memory(spec: RunSpec, plan: Plan) -> None:
    worst = max(plan.stages, key=lambda stage: stage.task_memory_bytes)
    if worst.task_memory_bytes > plan.worker_memory_bytes:
        fitting = plan.worker_memory_bytes * spec.cluster.num_workers // worst.task_memory_bytes
        shared = spec.cluster.memory_per_worker == "auto" and fitting
        fewer = f"Set cluster.workers = {fitting}" if shared else "Raise cluster.memory_per_worker if there is more"
        raise ResourceError(
            f"one task of {worst.name} needs {gigabytes(worst.task_memory_bytes)}{_widest(plan, worst.name)}, each of "
            f"{spec.cluster.num_workers} "
            f"workers may use {gigabytes(plan.worker_memory_bytes)}. {fewer}, or lower {LOWER[worst.name]}."
        )
    worst = max(plan.stages, key=lambda stage: stage.client_memory_bytes)
    # On a cluster of machines the plan may be made on another one than the run is started from: there it is a note.
    if spec.cluster.kind == "local" and worst.client_memory_bytes > psutil.virtual_memory().total:
        read = spec.data.learn_sets() if worst.name == "learn" else ("eval",)
        most = max(read, key=lambda name: plan.sets[name].rows)
        raise ResourceError(
            f"{worst.name} needs {gigabytes(worst.client_memory_bytes)} in the process that runs it, this machine has "
            f"{gigabytes(psutil.virtual_memory().total)}. Lower {key_of(most)}.rows or data.train.rows."
        )


def _widest(plan: Plan, stage: str) -> str:
    """Which group makes a task of a stage large, where its memory grows with the square of a group's features."""
    if plan.kernel.basis != "vectors" or stage not in ("kernel", "self-influence"):
        return ""
    width, group = max(zip(plan.widths, plan.partition.groups, strict=True), key=lambda pair: pair[0])
    return f" (group {group.name} has {width:,} features, whose Gram matrix is decomposed)"


def _refuse_a_full_disk(spec: RunSpec, plan: Plan) -> None:
    if "://" in spec.run.store:
        return
    folder = Path(spec.run.store).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    needed = sum(stage.written_bytes + stage.objects * FILE_BYTES for stage in plan.stages)
    # Only where it matters: a large store has a million files.
    if needed > free and (missing := needed - _bytes_on_disk(folder)) > free:
        raise ResourceError(
            f"the run still writes {gigabytes(missing)}, {existing} has {gigabytes(free)} free. "
            f"Choose another run.store or a smaller projection."
        )


def _bytes_on_disk(folder: Path) -> int:
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def _refuse_wide(group: ParameterGroup, width: int, item: int) -> None:
    if MIN_BLOCK_ROWS * width * item > REFUSED_CHUNK_BYTES:
        rank = int(math.sqrt(REFUSED_CHUNK_BYTES / item / MIN_BLOCK_ROWS))
        raise ResourceError(
            f"features.projection: group {group.name} has {width} features, so {MIN_BLOCK_ROWS} rows make a chunk of "
            f"{gigabytes(MIN_BLOCK_ROWS * width * item)}; the limit is {gigabytes(REFUSED_CHUNK_BYTES)}. "
            f'Use projection = {{ kind = "logra", rank = {rank} }} or less.'
        )


def _notes(
    spec: RunSpec, sets: Mapping[str, SetPlan], stages: Sequence[StagePlan], groups: Partition, sizes: Sizes
) -> Sequence[str]:
    objects = sum(stage.objects for stage in stages)
    notes = [
        f"{groups.coverage:.1%} of {groups.total_parameters:,} parameters are in a group",
        f"blocks assume {ASSUMED_RATE[sizes.device]:.0e} operations a second on {sizes.device}, {sizes.workers} workers",
    ]
    if spec.features.compression != "none":
        saved = 1 - BLOSC_RATIOS[spec.features.dtype]
        notes.append(
            f"bytes are those before compression, which saved {saved:.0%} of {spec.features.dtype} where measured"
        )
    wide = [group for group, width in zip(groups.groups, sizes.widths, strict=True) if width > group.parameters]
    if wide:
        notes.append(
            f"{len(wide)} groups have more features than parameters, such as {wide[0].name}: a smaller rank stores less"
        )
    small = [planned.name for planned in sets.values() if planned.largest_chunk_bytes < 2**16]
    if small:
        notes.append(f"chunks of {', '.join(small)} are under 64 KiB: fine on a disk, many requests on S3")
    if objects > MAX_OBJECTS:
        notes.append(f"{objects:,} objects; writing them to S3 costs about ${objects * PUT_DOLLARS:,.0f} in requests")
    client = max(stages, key=lambda stage: stage.client_memory_bytes)
    if spec.cluster.kind != "local":
        notes.append(
            f"{client.name} takes {gigabytes(client.client_memory_bytes)} where the command runs, not on workers"
        )
    return notes
