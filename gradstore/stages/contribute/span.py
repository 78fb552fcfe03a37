"""The task of contribute: everything that is made of some consecutive blocks, for all query sets and dampings together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, groupby
from typing import Any

import numpy as np

from gradstore.plan.contribute import BUFFERS
from gradstore.plan.sizes import split
from gradstore.spec import RunSpec
from gradstore.stages.contribute.blocks import BlockBuilder, Built
from gradstore.stages.contribute.outputs import Output, Part, open_output
from gradstore.stages.contribute.queries import Slab, Target
from gradstore.stages.featurize.writer import BackgroundWriter
from gradstore.store.alignment import aligned
from gradstore.store.features import FeatureStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a task is to do.

    Attributes
    ----------
    blocks
        Consecutive blocks.
    tiles
        Queries of every target that are written together, in the order of the targets: (number of queries, of a tile).
    span
        Number of the span that the blocks are, for what is summed of it; None if nothing is.
    parts
        In how many parts the queries of each stack are multiplied.
    passes
        How often the blocks are read, each time for some of these parts.
    row_parts
        In how many parts the rows of a block are built, each of which reads the block.
    """

    blocks: tuple[int, ...]
    tiles: tuple[tuple[int, int], ...]
    span: int | None = None
    parts: int = 1
    passes: int = 1
    row_parts: int = 1


def contribute_span(store_url: str, run: Mapping[str, Any], targets: Sequence[Target], work: Work) -> int:
    """Task: build and commit what is missing of some blocks, of all targets; return how many rows.

    Each block of features is read once for the queries of all targets together, unless these take several passes. Members
    add up, each with what its rows count. A block that is committed is read back where what is summed of the span lacks it.
    """
    spec, store = RunSpec.model_validate(run), FeatureStore.open(store_url)
    outputs = {target: open_output(store, spec, target, (work.span, work.blocks)) for target in targets}
    info = store.open_set("train").info
    lacking = [block for block in work.blocks if any(output.lacks(block) for output in outputs.values())]
    totals = {target: queries for target, (queries, _) in zip(targets, work.tiles, strict=True)}
    for slabs in slabs_of(targets, work):
        taken = [_Taken(slab=slab, output=outputs[slab.target], queries=totals[slab.target]) for slab in slabs]
        _run_pass(store, spec, work, lacking, taken)
    for output in outputs.values():
        output.finish()
    return sum(stop - start for start, stop in map(info.block_range, work.blocks))


def slabs_of(targets: Sequence[Target], work: Work) -> list[list[Slab]]:
    """Queries of every pass: whole tiles, in parts of those of each stack."""
    tiles = [
        Slab(target=target, first=first, last=min(first + tile, queries))
        for target, (queries, tile) in zip(targets, work.tiles, strict=True)
        for first in range(0, queries, tile)
    ]
    parts = [
        _joined(part)
        for _, stack in groupby(tiles, key=lambda tile: tile.target.stack)
        for part in split(list(stack), work.parts)
    ]
    return [list(chain.from_iterable(run)) for run in split(parts, work.passes)]


def _joined(tiles: Sequence[Slab]) -> list[Slab]:
    """Neighbours of one target as one."""
    found: list[Slab] = []
    for tile in tiles:
        if found and found[-1].target == tile.target:
            found[-1] = Slab(target=tile.target, first=found[-1].first, last=tile.last)
        else:
            found.append(tile)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """Where some queries of a target go, which has ``queries`` in all."""

    slab: Slab
    output: Output
    queries: int


def _run_pass(store: FeatureStore, spec: RunSpec, work: Work, lacking: Sequence[int], taken: Sequence[_Taken]) -> None:
    """Build the lacking blocks for some queries; while one is built, outputs take the one before.

    They take all blocks in order: sums over them depend on it.
    """
    built: Iterator[Built] = iter(())
    rows_of = {
        block: stop - start for block in lacking for start, stop in [store.open_set("train").info.block_range(block)]
    }
    with BackgroundWriter[None]() as background:
        if lacking:
            builder = BlockBuilder(store, spec, [item.slab for item in taken], row_parts=work.row_parts)
            buffers = cycle([aligned(builder.part_shape) for _ in range(BUFFERS)])
            built = builder.build(lacking, partial(next, buffers))
        for block in work.blocks:
            if block not in rows_of:
                background.submit(partial(_take_stored, taken, block))
                continue
            for _, rows, c_QNM in built:
                ends = rows.stop == rows_of[block]
                background.submit(partial(_take, taken, block, rows.start, c_QNM, ends=ends))
                if ends:
                    break


def _take(taken: Sequence[_Taken], block: int, row: int, c_QNM: np.ndarray, *, ends: bool) -> None:
    start = 0
    for item in taken:
        slab, stop = item.slab, start + item.slab.queries
        ends_block = ends and slab.last == item.queries
        part = Part(block=block, first=slab.first, row=row, ends_rows=ends, ends_block=ends_block)
        item.output.take(part, c_QNM[start:stop])
        start = stop


def _take_stored(taken: Sequence[_Taken], block: int) -> None:
    for item in taken:
        item.output.take_stored(block, item.slab.first, item.slab.last)
