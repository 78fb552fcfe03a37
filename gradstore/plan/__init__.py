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

from gradstore.adapters import Adapter
from gradstore.errors import ResourceError
from gradstore.groups import ParameterGroup, Partition
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
    gigabytes,
    kernel_bundles,
)
from gradstore.spec import SPLITS, RunSpec

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Kernel
    from gradstore.numerics.projection import Projection


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do; ``notes`` are for the reader."""

    partition: Partition
    projection: Projection
    kernel: Kernel
    sets: Mapping[str, SetPlan]
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


def make_plan(spec: RunSpec, rows: Mapping[str, int] | None = None) -> Plan:
    """Plan a run.

    Parameters
    ----------
    spec
        The run.
    rows
        Rows of every split where the data has been read; else those that [data.*] declares, else the data is read now.

    Raises
    ------
    SpecError
        If a kind, an option or a rule is unknown.
    ResourceError
        If a task, a chunk or the whole run does not fit.
    """
    adapter = make_adapter(spec)
    projection, kernel = resolve_projection(spec), resolve_kernel(spec)
    model = model_shape(adapter, adapter.load("meta"), spec)
    rows = rows or _declared_rows(spec, adapter)
    widths = [projection.width(group) for group in model.partition.groups]
    sizes = Sizes(spec, model, widths, resolve_device(spec))
    sets = {name: sizes.set_plan(name, rows[name]) for name in SPLITS}
    tiles = {name: sizes.query_tile(sets[name], sets["train"]) for name in ("learn", "eval")}
    bundles = kernel_bundles(widths) if kernel.needs_spectra else 0
    stages = (
        sizes.featurize_stage(sets),
        sizes.kernel_stage(sets["train"], bundles),
        sizes.contribute_stage(sets, tiles),
        sizes.learn_stage(sets, tiles["learn"]),
        sizes.score_stage(sets),
    )
    plan = Plan(
        partition=model.partition,
        projection=projection,
        kernel=kernel,
        sets=sets,
        stages=stages,
        worker_memory_bytes=sizes.worker_memory,
        notes=tuple(_notes(sets, stages, model.partition, sizes)),
    )
    _refuse_what_does_not_fit(spec, plan)
    return plan


def _declared_rows(spec: RunSpec, adapter: Adapter) -> dict[str, int]:
    declared = {name: section.rows for name, section in spec.data.splits().items()}
    if all(count is not None for count in declared.values()):
        return {name: count for name, count in declared.items() if count is not None}
    return {name: len(rows) for name, rows in adapter.examples().splits.items()}


def _refuse_what_does_not_fit(spec: RunSpec, plan: Plan) -> None:
    for group, width in zip(plan.partition.groups, plan.widths, strict=True):
        _refuse_wide(group, width, ITEM_BYTES[spec.features.dtype])
    worst = max(plan.stages, key=lambda stage: stage.task_memory_bytes)
    if worst.task_memory_bytes > plan.worker_memory_bytes:
        raise ResourceError(
            f"one task of {worst.name} needs {gigabytes(worst.task_memory_bytes)}, a worker may use "
            f"{gigabytes(plan.worker_memory_bytes)}. Set cluster.memory_per_worker, use fewer workers, or lower "
            f"features.token_budget, features.block_rows or the projection's rank."
        )
    if "://" not in spec.run.store:
        folder = Path(spec.run.store).absolute()
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        needed = sum(stage.written_bytes for stage in plan.stages)
        if not folder.exists() and needed > free:
            raise ResourceError(
                f"the run writes {gigabytes(needed)}, {existing} has {gigabytes(free)} free. "
                f"Choose another run.store or a smaller projection."
            )


def _refuse_wide(group: ParameterGroup, width: int, item: int) -> None:
    if MIN_BLOCK_ROWS * width * item > REFUSED_CHUNK_BYTES:
        rank = int(math.sqrt(REFUSED_CHUNK_BYTES / item / MIN_BLOCK_ROWS))
        raise ResourceError(
            f"features.projection: group {group.name} has {width} features, so {MIN_BLOCK_ROWS} rows make a chunk of "
            f"{gigabytes(MIN_BLOCK_ROWS * width * item)}; the limit is {gigabytes(REFUSED_CHUNK_BYTES)}. "
            f'Use projection = {{ kind = "logra", rank = {rank} }} or less.'
        )


def _notes(sets: Mapping[str, SetPlan], stages: Sequence[StagePlan], groups: Partition, sizes: Sizes) -> Sequence[str]:
    objects = sum(stage.objects for stage in stages)
    notes = [
        f"{groups.coverage:.1%} of {groups.total_parameters:,} parameters are in a group",
        f"blocks assume {ASSUMED_RATE[sizes.device]:.0e} operations a second on {sizes.device}, {sizes.workers} workers",
    ]
    small = [planned.name for planned in sets.values() if planned.largest_chunk_bytes < 2**16]
    if small:
        notes.append(f"chunks of {', '.join(small)} are under 64 KiB: fine on a disk, many requests on S3")
    if objects > MAX_OBJECTS:
        notes.append(f"{objects:,} objects; writing them to S3 costs about ${objects * PUT_DOLLARS:,.0f} in requests")
    return notes
