"""What every stage of a run writes, in how many tasks and objects, with how much memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gradstore.plan.memory import TaskMemory
from gradstore.plan.sizes import (
    BLOCKS_PER_WORKER,
    ITEM_BYTES,
    SetPlan,
    StagePlan,
    Widths,
    block_tasks,
    kernel_bundles,
    learner_tile,
    query_tile,
    row_scale_bytes,
)
from gradstore.spec import RunSpec

QUERY_SETS = ("learn", "eval")
STORE_OBJECTS = 3  # gradstore.json, and zarr.json of the root and of features
COMPONENT_OBJECTS = 5  # artifact.json, and zarr.json of projections, of this one and of its two folders
KERNEL_OBJECTS = 4  # of a member: artifact.json, and zarr.json of the member and of its two folders
TABLE_OBJECTS = 4  # artifact.json, commit record, and two tables or a table and a document
METHODS = 3  # unweighted, learned and random rankings; where there are texts, BM25's too
CHECKSUM_BYTES = 4


def stage_plans(
    spec: RunSpec,
    widths: Widths,
    sets: Mapping[str, SetPlan],
    memory: TaskMemory,
    *,
    spectra: bool,
    texts: bool,
) -> tuple[StagePlan, ...]:
    """Plan every stage, in the order of the path.

    Parameters
    ----------
    spec
        The run.
    widths
        Features of every group.
    sets
        Its feature sets.
    memory
        Memory of its tasks.
    spectra
        Whether its kernel needs the spectra of the train features.
    texts
        Whether eval queries have texts, by which BM25 ranks.
    """
    train = sets["train"]
    tiles = {
        name: query_tile((sets[name].rows, train.rows, len(widths.full)), train.block_rows, spec.contribute.dtype)
        for name in QUERY_SETS
    }
    return (
        _featurize(spec, widths, sets, memory),
        _kernel(spec, widths.full, train, memory, spectra=spectra),
        _contribute(spec, widths.full if spectra else widths.stored, sets, tiles, memory, spectra=spectra),
        _learn(spec, widths.full, sets, learner_tile((sets["learn"].rows, train.rows, len(widths.full))), memory),
        _score(spec, sets, tiles["eval"], memory, texts=texts),
    )


def _featurize(spec: RunSpec, widths: Widths, sets: Mapping[str, SetPlan], memory: TaskMemory) -> StagePlan:
    """For every member one task hashes and probes it; then tasks of some blocks each compute and write them.

    Where principal components are needed, tasks of some parts each find those first.
    """
    members, stored, found = len(spec.model.etas), widths.stored, widths.components
    tasks = sum(len(block_tasks(range(planned.blocks), spec.cluster.num_workers)) for planned in sets.values())
    written = sum(_set_bytes(stored, planned) for planned in sets.values())
    return StagePlan(
        name="featurize",
        tasks=members * (1 + tasks) + (found.bundles if found else 0),
        # Of the pre-pass commit records, and array and chunk of two matrices of each part.
        objects=STORE_OBJECTS
        + sum(planned.objects for planned in sets.values())
        + (COMPONENT_OBJECTS + found.bundles + 4 * found.parts if found else 0),
        written_bytes=members * written + (found.matrix_bytes + 2 * CHECKSUM_BYTES * found.parts if found else 0),
        task_memory_bytes=memory.featurize([*sets.values()]),
    )


def _set_bytes(widths: Sequence[int], planned: SetPlan) -> int:
    """Bytes of the chunks of one member of a set, with those of its rows' scales."""
    scales = row_scale_bytes(planned.dtype, len(widths))
    a_row = sum(widths) * ITEM_BYTES[planned.dtype] + scales
    return planned.blocks * (planned.block_rows * a_row + CHECKSUM_BYTES * (len(widths) + (scales > 0)))


def _kernel(spec: RunSpec, widths: Sequence[int], train: SetPlan, memory: TaskMemory, *, spectra: bool) -> StagePlan:
    """For every kernel one task per bundle of groups; float64 eigenvalues and float32 eigenvectors of every group."""
    members = len({spec.kernel.of_member(member) for member in spec.model.etas})
    if not spectra:
        return StagePlan(name="kernel", tasks=0, objects=members, written_bytes=0, task_memory_bytes=0)
    bundles = kernel_bundles(widths)
    return StagePlan(
        name="kernel",
        tasks=members * bundles,
        # zarr.json of kernels and of this one, beside those of its members.
        objects=members * (bundles + 4 * len(widths) + KERNEL_OBJECTS) + 2,
        written_bytes=members * sum(4 * width**2 + 8 * width + 2 * CHECKSUM_BYTES for width in widths),
        task_memory_bytes=memory.kernel(train),
    )


def _contribute(
    spec: RunSpec,
    widths: Sequence[int],
    sets: Mapping[str, SetPlan],
    tiles: Mapping[str, int],
    memory: TaskMemory,
    *,
    spectra: bool,
) -> StagePlan:
    """One task per query set, and in float16 another that finds its scales; then one per span of blocks, for all sets."""
    train, groups, half = sets["train"], len(widths), spec.contribute.dtype == "float16"
    members = len(spec.model.etas)
    objects, written = 2, 0  # zarr.json of queries and of contributions, and of the kernel in both
    objects += 2
    for name, tile in tiles.items():
        queries, num_tiles = sets[name].rows, math.ceil(sets[name].rows / tile)
        # zarr.json of the set; of each member artifact.json, commit record, zarr.json of it and of its folder, and array
        # and chunk of each group.
        objects += 1 + members * (4 + 2 * groups)
        written += members * (4 * queries * sum(widths) + CHECKSUM_BYTES * groups)
        # artifact.json, zarr.json of the set, of its folder and of C; the array of scales and its chunk.
        objects += 4 + train.blocks * (1 + num_tiles) + (2 if half else 0)
        chunk = tile * train.block_rows * groups * ITEM_BYTES[spec.contribute.dtype] + CHECKSUM_BYTES
        written += train.blocks * num_tiles * chunk + (4 * queries + CHECKSUM_BYTES if half else 0)
    return StagePlan(
        name="contribute",
        tasks=len(tiles) * (members + (1 if half else 0))
        + min(train.blocks, BLOCKS_PER_WORKER * spec.cluster.num_workers),
        objects=objects,
        written_bytes=written,
        task_memory_bytes=memory.contribute(train, [sets[name] for name in tiles], spectra=spectra),
    )


def _learn(
    spec: RunSpec, widths: Sequence[int], sets: Mapping[str, SetPlan], tile: int, memory: TaskMemory
) -> StagePlan:
    """No task: C is streamed in the process that runs the command. Weights of every epoch, and a row for every step."""
    return StagePlan(
        name="learn",
        tasks=0,
        objects=TABLE_OBJECTS,
        written_bytes=8 * len(widths) * (spec.learn.epochs + 1) + 32 * spec.learn.epochs * sets["learn"].rows,
        task_memory_bytes=0,
        client_memory_bytes=memory.learn(sets["train"], sets["learn"], tile),
    )


def _score(spec: RunSpec, sets: Mapping[str, SetPlan], tile: int, memory: TaskMemory, *, texts: bool) -> StagePlan:
    """Ranks in the process that runs the command; one tail-patch task per query."""
    train, queries = sets["train"], sets["eval"]
    tasks = min(spec.score.tail_patch.queries, queries.rows)
    return StagePlan(
        name="score",
        tasks=tasks,
        objects=(METHODS + texts) * TABLE_OBJECTS,
        written_bytes=memory.ranked_bytes(train, queries),
        task_memory_bytes=memory.patch(train) if tasks else 0,
        client_memory_bytes=memory.rank(train, queries, tile, texts=texts),
    )
