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
    kernel_bundles,
    learner_tile,
    query_tile,
)
from gradstore.spec import RunSpec

QUERY_SETS = ("learn", "eval")
STORE_OBJECTS = 3  # gradstore.json, and zarr.json of the root and of features
KERNEL_OBJECTS = 5  # artifact.json, and zarr.json of kernels, of the kernel and of its two folders
TABLE_OBJECTS = 4  # artifact.json, commit record, and two tables or a table and a document
METHODS = 4  # unweighted, learned, BM25 and random rankings
CHECKSUM_BYTES = 4


def stage_plans(
    spec: RunSpec, widths: Sequence[int], sets: Mapping[str, SetPlan], memory: TaskMemory, *, spectra: bool
) -> tuple[StagePlan, ...]:
    """Plan every stage, in the order of the path.

    Parameters
    ----------
    spec
        The run.
    widths
        k_j, the features of every group.
    sets
        Its feature sets.
    memory
        Memory of its tasks.
    spectra
        Whether its kernel needs the spectra of the train features.
    """
    train = sets["train"]
    tiles = {
        name: query_tile((sets[name].rows, train.rows, len(widths)), train.block_rows, spec.contribute.dtype)
        for name in QUERY_SETS
    }
    return (
        _featurize(widths, sets, memory),
        _kernel(widths, train, memory, spectra=spectra),
        _contribute(spec, widths, sets, tiles, memory),
        _learn(spec, widths, sets, learner_tile((sets["learn"].rows, train.rows, len(widths))), memory),
        _score(spec, sets, tiles["eval"], memory),
    )


def _featurize(widths: Sequence[int], sets: Mapping[str, SetPlan], memory: TaskMemory) -> StagePlan:
    """One task hashes and probes the model, then one computes each block."""
    return StagePlan(
        name="featurize",
        tasks=1 + sum(planned.blocks for planned in sets.values()),
        objects=STORE_OBJECTS + sum(planned.objects for planned in sets.values()),
        written_bytes=sum(
            planned.blocks
            * (planned.block_rows * sum(widths) * ITEM_BYTES[planned.dtype] + CHECKSUM_BYTES * len(widths))
            for planned in sets.values()
        ),
        task_memory_bytes=memory.featurize([*sets.values()]),
    )


def _kernel(widths: Sequence[int], train: SetPlan, memory: TaskMemory, *, spectra: bool) -> StagePlan:
    """One task per bundle of groups; float64 eigenvalues and float32 eigenvectors of every group."""
    if not spectra:
        return StagePlan(name="kernel", tasks=0, objects=1, written_bytes=0, task_memory_bytes=0)
    bundles = kernel_bundles(widths)
    return StagePlan(
        name="kernel",
        tasks=bundles,
        objects=bundles + 4 * len(widths) + KERNEL_OBJECTS,
        written_bytes=sum(4 * width**2 + 8 * width + 2 * CHECKSUM_BYTES for width in widths),
        task_memory_bytes=memory.kernel(train),
    )


def _contribute(
    spec: RunSpec,
    widths: Sequence[int],
    sets: Mapping[str, SetPlan],
    tiles: Mapping[str, int],
    memory: TaskMemory,
) -> StagePlan:
    """One task per query set, and in float16 another that finds its scales; then one per span of blocks, for all sets."""
    train, groups, half = sets["train"], len(widths), spec.contribute.dtype == "float16"
    objects, written = 2, 0  # zarr.json of queries and of contributions, and of the kernel in both
    objects += 2
    for name, tile in tiles.items():
        queries, num_tiles = sets[name].rows, math.ceil(sets[name].rows / tile)
        # artifact.json, commit record, zarr.json of the set and of its folder; array and chunk of each group.
        objects += 4 + 2 * groups
        written += 4 * queries * sum(widths) + CHECKSUM_BYTES * groups
        # artifact.json, zarr.json of the set, of its folder and of C; the array of scales and its chunk.
        objects += 4 + train.blocks * (1 + num_tiles) + (2 if half else 0)
        chunk = tile * train.block_rows * groups * ITEM_BYTES[spec.contribute.dtype] + CHECKSUM_BYTES
        written += train.blocks * num_tiles * chunk + (4 * queries + CHECKSUM_BYTES if half else 0)
    return StagePlan(
        name="contribute",
        tasks=len(tiles) * (2 if half else 1) + min(train.blocks, BLOCKS_PER_WORKER * spec.cluster.num_workers),
        objects=objects,
        written_bytes=written,
        task_memory_bytes=memory.contribute(train, [sets[name] for name in tiles]),
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


def _score(spec: RunSpec, sets: Mapping[str, SetPlan], tile: int, memory: TaskMemory) -> StagePlan:
    """Ranks in the process that runs the command; one tail-patch task per query."""
    train, queries = sets["train"], sets["eval"]
    tasks = min(spec.score.tail_patch.queries, queries.rows)
    return StagePlan(
        name="score",
        tasks=tasks,
        objects=METHODS * TABLE_OBJECTS,
        written_bytes=memory.ranked_bytes(train, queries),
        task_memory_bytes=memory.patch(train) if tasks else 0,
        client_memory_bytes=memory.rank(train, queries, tile),
    )
