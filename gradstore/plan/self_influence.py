"""How the work on self-influence is divided, into chunks of rows and groups and tasks of one column of chunks; and planned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from gradstore.plan.combinations import DAS
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.sizes import BUNDLE_BYTES, KERNEL_BUNDLES, SetPlan, StagePlan, Widths, split
from gradstore.spec import RunSpec

if TYPE_CHECKING:
    from gradstore.plan.memory import TaskMemory

# Numbers of a chunk of self-influence at most: a unit is then some thousand rows of a few groups, a minute of work.
CHUNK_NUMBERS = 2**16
_CHECKSUM_BYTES: Final = 4


def needs_self_influence(spec: RunSpec, output: str | None) -> bool:
    """Whether contributions take self-influence; under the identity norms are those of the example table."""
    return output == DAS or (spec.contribute.normalize != "none" and resolve_kernel(spec).needs_spectra)


def influence_chunk(widths: Sequence[int], rows: int, block_rows: int, *, apart: bool) -> tuple[int, int]:
    """Rows and groups of a chunk of self-influence; the same whatever the number of workers.

    Where a kernel keeps groups ``apart``, a task holds the spectra of its groups, so that these are few.
    """
    groups = len(widths)
    if apart:
        largest = 8 * max(widths) ** 2
        groups = max(1, min(BUNDLE_BYTES // largest, math.ceil(len(widths) / KERNEL_BUNDLES)))
    blocks = max(1, CHUNK_NUMBERS // (groups * block_rows))
    return block_rows * min(blocks, math.ceil(rows / block_rows)), groups


def influence_tasks(missing: Mapping[int, Sequence[int]], workers: int) -> list[Sequence[int]]:
    """Cut missing units, by the column of chunks that they are in, into those of each task.

    A task is a whole column, which reads every feature and every spectrum once. Only where there are fewer columns than
    workers, the rows of a column are shared out, and its spectra read as often.
    """
    pieces = max(1, math.ceil(workers / max(1, len(missing))))
    return [task for units in missing.values() for task in split(units, pieces)]


def influence_stage(spec: RunSpec, widths: Widths, train: SetPlan, memory: TaskMemory) -> StagePlan | None:
    """Plan the self-influence that contributions need; None where they need none."""
    if not needs_self_influence(spec, spec.model.output):
        return None
    kernel, members, kernels = resolve_kernel(spec), len(spec.model.etas), len(spec.sweep())
    apart = kernel.needs_spectra and not kernel.across_groups
    rows, groups = influence_chunk(widths.full, train.rows, train.block_rows, apart=apart)
    columns, deep = math.ceil(len(widths.full) / groups), math.ceil(train.rows / rows)
    workers = 1 if _is_dual(spec, widths, train) else math.ceil(spec.cluster.num_workers / members)
    units = {column: range(column, columns * deep, columns) for column in range(columns)}
    return StagePlan(
        name="self-influence",
        tasks=members * len(influence_tasks(units, workers)),
        # zarr.json of all, of each kernel's, and of each artifact, its folder and its array; artifact.json; chunks and records.
        objects=1 + kernels * (1 + members * (4 + 2 * columns * deep)),
        written_bytes=kernels * members * columns * deep * (4 * rows * groups + _CHECKSUM_BYTES),
        task_memory_bytes=memory.self_influence(train, kernel, groups, kernels),
    )


def _is_dual(spec: RunSpec, widths: Widths, train: SetPlan) -> bool:
    if not resolve_kernel(spec).across_groups:
        return False
    from gradstore.plan.full import route_of

    return route_of(spec, (train.rows, sum(widths.full)))[0] == "dual"
