"""How contribute cuts its work: rows into tiles, groups into bundles, queries into passes, blocks into spans."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from gradstore.errors import ResourceError
from gradstore.plan.sizes import gigabytes

# Bytes of train features that a task reads at a time: groups are read in bundles of about this size.
READ_BYTES: Final = 32 * 2**20
# Groups whose products are turned into C's order together: a cache line of C holds 16.
GROUPS_AT_ONCE: Final = 16
# Products of a tile of rows: near the processor, and yet of rows enough for matrix products to be fast.
_TILE_BYTES: Final = 2**22
_TILE_ROWS: Final = (64, 1024)
# Queries whose scores are worked on together, where memory asks for several passes.
SCORE_TILE: Final = 64
# Part of a worker's memory that queries may take, and C of blocks, and what is summed for the learner: each.
_SHARE: Final = 4
# Blocks of C in float32 that a task holds: one is built while the one before is rounded and written.
BUFFERS: Final = 2
# Spans that blocks are cut into, whose tasks the workers share: at least, and at most, where there are blocks enough.
_SPANS: Final = (16, 128)


def tile_rows(queries: int, columns: int) -> int:
    """Rows whose products are computed at once, of all queries and some groups: a power of two."""
    least, most = _TILE_ROWS
    fitting = _TILE_BYTES // (4 * queries * min(columns, GROUPS_AT_ONCE))
    return min(max(1 << max(fitting, 1).bit_length() - 1, least), most)


def part_rows(block_rows: int, tile: int, parts: int) -> int:
    """Rows that are built at once where blocks are built in parts: whole tiles, so that every part has the same ones."""
    if parts == 1:
        return block_rows
    tiles = math.ceil(block_rows / tile)
    return min(block_rows, math.ceil(tiles / parts) * tile)


def read_bundles(widths: Mapping[str, int], block_rows: int, read_bytes: int) -> list[list[str]]:
    """Cut groups, in order, into bundles of about ``read_bytes`` a block, each of at least one group."""
    bundles: list[list[str]] = []
    filled = read_bytes
    for group, width in widths.items():
        if filled + 4 * width * block_rows > read_bytes:
            bundles.append([])
            filled = 0
        bundles[-1].append(group)
        filled += 4 * width * block_rows
    return bundles


def query_passes(query_bytes: int, built_bytes: int, worker_memory: int, stacks: int) -> tuple[int, int]:
    """(Parts that the queries of a stack are cut into, passes over the features of a span that all parts take).

    Into how many parts depends on one stack alone: a sweep of more kernels takes more passes, but multiplies the same
    queries together.

    Parameters
    ----------
    query_bytes, built_bytes
        Queries of one kernel, and C of blocks for them: each may take its part of a worker's memory.
    worker_memory
        Memory of a worker.
    stacks
        How many there are of such queries.
    """
    taken = max(query_bytes, built_bytes) / (worker_memory / _SHARE)
    parts = max(1, math.ceil(taken))
    at_once = stacks if taken == 0 else max(1, int(parts / taken))
    return parts, math.ceil(stacks * parts / at_once)


def moments_bytes(queries: int, groups: int) -> int:
    """Bytes of A_q of every query: what a task sums, and what is stored of every span."""
    return 8 * queries * groups**2


def refuse_moments(queries: int, groups: int, worker_memory: int) -> None:
    """Refuse sums for the learner that a worker has no memory for.

    Raises
    ------
    ResourceError
        Naming what to set.
    """
    taken = moments_bytes(queries, groups)
    if taken > worker_memory / _SHARE:
        raise ResourceError(
            f"contribute.second_moments: A_q of {queries:,} learn queries and {groups:,} groups takes {gigabytes(taken)} of a "
            f"task, more than a quarter of the {gigabytes(worker_memory)} of a worker. Set contribute.second_moments = false, "
            "or raise cluster.memory_per_worker."
        )


def num_spans(blocks: int, rows: int, groups: int) -> int:
    """Spans that blocks are cut into: some for each of many workers, but few where what is summed of each is much.

    All runs agree on them, since they depend on the train set alone: sums of one run go on with those of another.

    Parameters
    ----------
    blocks, rows, groups
        Of the train set.
    """
    # A_q of all spans, in float64, is no more than half of C of the same queries in float32.
    bearable = rows // (4 * groups)
    least, most = _SPANS
    return min(blocks, max(least, min(bearable, most)))
