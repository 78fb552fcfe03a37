"""The arithmetic of a plan: rows, blocks, objects, bytes and memory from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

from gradstore.plan.resolve import ModelShape
from gradstore.spec import FeaturesSection, RunSpec

T = TypeVar("T")
StoredDtype = Literal["float32", "float16"]
ITEM_BYTES: Mapping[StoredDtype, int] = {"float32": 4, "float16": 2}
MIN_BLOCK_ROWS = 16
MAX_CHUNK_BYTES = 8 * 2**20
REFUSED_CHUNK_BYTES = 64 * 2**20
BLOCKS_PER_WORKER = 4
BLOCK_SECONDS = 300
MAX_OBJECTS = 1_000_000
PUT_DOLLARS = 5e-6
# Floating point operations a second that a worker is assumed to reach; used for the five-minute rule of blocks only.
ASSUMED_RATE = {"cpu": 1e11, "cuda": 2e14}
# Python, torch and transformers before any model is loaded, as measured on Linux.
PROCESS_BYTES = 600 * 2**20
# Part of a worker's memory that the features of one block may take.
BLOCK_MEMORY_SHARE = 0.25
KERNEL_BUNDLES = 32
BUNDLE_BYTES = 2**30
CONTRIBUTION_CHUNK_BYTES = 32 * 2**20
LEARNER_TILE_BYTES = 2 * 2**30
BLOCK_OBJECTS = 4  # inputs, example part, statistics, commit record


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPlan:
    """One feature set: its rows, blocks, objects and bytes."""

    name: str
    rows: int
    length: int
    dtype: StoredDtype
    block_rows: int
    blocks: int
    objects: int
    feature_bytes: int
    largest_chunk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage: how many tasks, what they write, and the memory of one of them."""

    name: str
    tasks: int
    objects: int
    written_bytes: int
    task_memory_bytes: int


class Sizes:
    """The arithmetic of a plan: bytes, rows, objects and memory from shapes.

    Parameters
    ----------
    spec
        The run.
    model
        Names and shapes of the model.
    widths
        k_j, the features of every group.
    device
        Where features are computed.
    """

    def __init__(self, spec: RunSpec, model: ModelShape, widths: Sequence[int], device: str) -> None:
        self._spec = spec
        self._model = model
        self._groups = model.partition.groups
        self._parameters = model.partition.total_parameters
        self._widths = widths
        self.device = device
        self.workers = spec.cluster.num_workers
        self.worker_memory = spec.cluster.worker_memory_bytes

    def set_plan(self, name: str, rows: int) -> SetPlan:
        """Plan one feature set."""
        dtype = stored_dtype(name, self._spec.features)
        item = ITEM_BYTES[dtype]
        length = self._spec.data.splits()[name].length
        block_rows = self._spec.features.block_rows or self._block_rows(rows, length, item)
        blocks = math.ceil(rows / block_rows)
        return SetPlan(
            name=name,
            rows=rows,
            length=length,
            dtype=dtype,
            block_rows=block_rows,
            blocks=blocks,
            objects=self._objects(rows, block_rows),
            feature_bytes=rows * sum(self._widths) * item,
            largest_chunk_bytes=block_rows * max(self._widths) * item,
        )

    def _block_rows(self, rows: int, length: int, item: int) -> int:
        """Return the largest power of two within the four rules of architecture.md, and at least MIN_BLOCK_ROWS."""
        widest = max(self._widths) * item
        in_memory = self.worker_memory * BLOCK_MEMORY_SHARE / (sum(self._widths) * (4 + item))
        in_chunk = MAX_CHUNK_BYTES / widest
        seconds_a_row = 4 * self._parameters * length / ASSUMED_RATE[self.device]
        bound = min(in_memory, in_chunk, BLOCK_SECONDS / seconds_a_row, rows / (BLOCKS_PER_WORKER * self.workers))
        block_rows = max(_power_of_two(bound), MIN_BLOCK_ROWS)
        # Many objects cost requests and listings: give up the last two rules, never memory or chunk size.
        while self._objects(rows, block_rows) > MAX_OBJECTS and 2 * block_rows <= min(in_memory, in_chunk):
            block_rows *= 2
        return block_rows

    def _objects(self, rows: int, block_rows: int) -> int:
        return math.ceil(rows / block_rows) * (len(self._groups) + BLOCK_OBJECTS) + len(self._groups) + 4

    def query_tile(self, queries: SetPlan, train: SetPlan) -> int:
        """Queries in one chunk of C."""
        return query_tile((queries.rows, train.rows, len(self._groups)), train.block_rows, self._spec.contribute.dtype)

    def _model_bytes(self) -> int:
        return 4 * self._parameters

    def _token_bytes(self) -> int:
        """Bytes that one token keeps alive: outputs of every layer and what follows them, and three sets of logits.

        Inputs of layers are not kept for their own sake, because nobody takes weight gradients.
        """
        item = 2 if self._spec.model.precision == "bfloat16" else 4
        return 2 * item * sum(group.out_features for group in self._groups) + 3 * 4 * self._model.outputs

    def featurize_stage(self, sets: Mapping[str, SetPlan]) -> StagePlan:
        """Plan featurize: one task per block."""
        budget = max(self._spec.features.token_budget, *(planned.length for planned in sets.values()))
        a_block = max(planned.block_rows * (4 + ITEM_BYTES[planned.dtype]) for planned in sets.values())
        memory = self._model_bytes() + budget * self._token_bytes() + a_block * sum(self._widths)
        return StagePlan(
            name="featurize",
            tasks=sum(planned.blocks for planned in sets.values()),
            objects=sum(planned.objects for planned in sets.values()),
            written_bytes=sum(planned.feature_bytes for planned in sets.values()),
            task_memory_bytes=PROCESS_BYTES + memory,
        )

    def kernel_stage(self, train: SetPlan, bundles: int) -> StagePlan:
        """Plan kernel: one task per bundle of groups."""
        widest = max(self._widths)
        gram_bytes = 8 * max((sum(w**2 for w in bundle) for bundle in split(self._widths, max(bundles, 1))), default=0)
        return StagePlan(
            name="kernel",
            tasks=bundles,
            objects=bundles + (4 * len(self._groups) if bundles else 0),
            written_bytes=sum(4 * width**2 + 8 * width for width in self._widths) if bundles else 0,
            task_memory_bytes=PROCESS_BYTES + gram_bytes + 3 * 8 * widest**2 + 4 * train.block_rows * widest,
        )

    def contribute_stage(self, sets: Mapping[str, SetPlan], tiles: Mapping[str, int]) -> StagePlan:
        """Plan contribute: one task per query set, then one per span of blocks."""
        train = sets["train"]
        item = ITEM_BYTES[self._spec.contribute.dtype]
        queries = {name: sets[name].rows for name in tiles}
        most = max(queries.values())
        tensor = most * train.block_rows * len(self._groups) * (4 + item)
        query_bytes = sum(4 * count * sum(self._widths) for count in queries.values())
        return StagePlan(
            name="contribute",
            tasks=len(tiles) * (1 + min(train.blocks, BLOCKS_PER_WORKER * self.workers)),
            objects=sum(train.blocks * (1 + math.ceil(queries[name] / tile)) for name, tile in tiles.items())
            + len(tiles) * (2 * len(self._groups) + 4),
            written_bytes=query_bytes + sum(queries.values()) * train.rows * len(self._groups) * item,
            task_memory_bytes=PROCESS_BYTES + 4 * most * sum(self._widths) + tensor + 2 * train.largest_chunk_bytes,
        )

    def learn_stage(self, sets: Mapping[str, SetPlan], tile: int) -> StagePlan:
        """Plan learn: streamed in this process."""
        tile_bytes = tile * sets["train"].rows * len(self._groups) * 4
        return StagePlan(
            name="learn",
            tasks=0,
            objects=4,
            written_bytes=8 * len(self._groups) * (self._spec.learn.epochs * sets["learn"].rows + 1),
            task_memory_bytes=PROCESS_BYTES + tile_bytes,
        )

    def score_stage(self, sets: Mapping[str, SetPlan]) -> StagePlan:
        """Plan score: streamed in this process, with one tail-patch task per query."""
        queries, patch = sets["eval"].rows, self._spec.score.tail_patch
        kept = 2 * 2 * queries * self._spec.score.k * (4 * len(self._groups) + 40)
        tokens = patch.k * sets["train"].length
        # The step needs the model, a copy to restore it from, its gradient, and the optimizer's two moments.
        memory = (5 * self._model_bytes() + tokens * self._token_bytes()) if patch.queries else 0
        return StagePlan(
            name="score",
            tasks=min(patch.queries, queries),
            objects=16,
            written_bytes=kept,
            task_memory_bytes=PROCESS_BYTES + memory + kept,
        )


def kernel_bundles(widths: Sequence[int]) -> int:
    """Number of bundles of groups that a kernel is built in; the same whatever the number of workers.

    Several bundles keep workers busy; a bundle's Gram matrices, in float64, take about BUNDLE_BYTES at most.
    """
    gram_bytes = sum(8 * width**2 for width in widths)
    return min(len(widths), max(KERNEL_BUNDLES, math.ceil(gram_bytes / BUNDLE_BYTES)))


def query_tile(contributions: tuple[int, int, int], block_rows: int, dtype: StoredDtype) -> int:
    """Queries in one chunk of C, whose shape is ``contributions`` [Q, N, M].

    A chunk takes at most CONTRIBUTION_CHUNK_BYTES, and a tile of all rows, which the learner holds, LEARNER_TILE_BYTES.
    """
    queries, rows, groups = contributions
    row_bytes = groups * ITEM_BYTES[dtype]
    by_chunk = CONTRIBUTION_CHUNK_BYTES // (row_bytes * block_rows)
    by_learner = LEARNER_TILE_BYTES // (row_bytes * rows)
    return max(1, min(queries, by_chunk, by_learner))


def stored_dtype(set_name: str, features: FeaturesSection) -> StoredDtype:
    """Return the dtype a set is stored in: train as the run says, queries always in float32 (they are few)."""
    return features.dtype if set_name == "train" else "float32"


def split(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Cut a sequence into consecutive runs, ``parts`` or as many as it has items, of lengths that differ by at most one."""
    parts = min(parts, len(items))
    edges = [len(items) * part // max(parts, 1) for part in range(parts + 1)]
    return [items[first:last] for first, last in pairwise(edges)]


def _power_of_two(bound: float) -> int:
    return 2 ** int(math.log2(bound)) if bound >= 1 else 1


def gigabytes(count: float) -> str:
    """Format a number of bytes for a reader, in decimal units as storage is sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size < 1000 else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"
