"""Ranking train rows for some queries: by a scan of all of them, under every weighting at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from gradstore.numerics.scores import Ranked, Ranking
from gradstore.spec import RunSpec
from gradstore.stages.contribute.blocks import BlockBuilder, MakeReader
from gradstore.stages.contribute.queries import Slab
from gradstore.stages.progress import Progress
from gradstore.stages.reading import full_width
from gradstore.store.alignment import aligned
from gradstore.store.features import FeatureStore, SetInfo

if TYPE_CHECKING:
    from gradstore.numerics.scores import Transform

# Memory for queries that are ranked for in one reading.
QUERY_BYTES: Final = 2**30
# Copies of a query's features that are alive at once: computed, stored, preconditioned, and beside others.
_COPIES: Final = 4


def query_bytes(train: SetInfo) -> int:
    """Memory that one more query of a reading of the train set takes: its features, C of a block, and what becomes of that."""
    features = _COPIES * 4 * len(train.members) * sum(map(full_width, train.arrays))
    return features + 3 * 8 * train.block_rows * len(train.arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranker:
    """What rankings are made with.

    Attributes
    ----------
    store, spec
        The store, with the preconditioned queries in it, and the run whose kernel they are of.
    weightings
        Weights, float64 [M], by the name of the ranking.
    transform
        What becomes of scores in the end.
    make_reader
        What reads features.
    progress, stage
        Told of the scan, and what it is called.
    """

    store: FeatureStore
    spec: RunSpec
    weightings: Mapping[str, np.ndarray]
    transform: Transform
    make_reader: MakeReader
    progress: Progress
    stage: str = "query"


@dataclass(frozen=True, slots=True, kw_only=True)
class Winners:
    """The rows that some queries rank highest, and those that they rank lowest."""

    proponents: Ranked
    opponents: Ranked


def rank(ranker: Ranker, slab: Slab, keep: int) -> dict[str, Winners]:
    """Return the winners of some preconditioned queries under every weighting: exact, by C of all valid rows.

    Rows are built group by group and weighted then, so that a reading serves all weightings, and the parts of winners are
    known when it ends.

    Parameters
    ----------
    ranker
        What they are made with.
    slab
        The queries.
    keep
        How many rows on each side.
    """
    builder = BlockBuilder(ranker.store, ranker.spec, [slab], make_reader=ranker.make_reader)
    rankings = {
        name: Ranking(num_queries=builder.queries, num_groups=builder.columns, k=keep, transform=ranker.transform)
        for name in ranker.weightings
    }
    info = builder.info
    a_row = info.row_bytes * len(info.members)
    with ranker.progress.stage(
        ranker.stage, info.num_examples, "rows", total_bytes=a_row * info.num_examples
    ) as advance:
        for rows, rows_N, c_QNM in _valid(ranker, builder):
            for name, ranking in rankings.items():
                ranking.update(c_QNM, ranker.weightings[name], rows_N)
            advance(rows)
    return {
        name: Winners(proponents=ranking.proponents(), opponents=ranking.opponents())
        for name, ranking in rankings.items()
    }


def _valid(ranker: Ranker, builder: BlockBuilder) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Of every block: how many rows it has, the numbers of those that are valid in every member, and C of them."""
    trains = [ranker.store.open_set("train", member) for member in ranker.spec.model.etas]
    buffer = aligned(builder.part_shape)
    for block, rows, c_QNM in builder.build(range(builder.info.num_blocks), lambda: buffer):
        start, _ = builder.info.block_range(block)
        rows_N = np.arange(start + rows.start, start + rows.stop)
        valid_N = np.ones(len(rows_N), bool)
        for train in trains:
            mask = train.valid_in(block)
            valid_N &= True if mask is None else mask[rows]
        whole = bool(valid_N.all())
        yield len(rows_N), rows_N if whole else rows_N[valid_N], c_QNM if whole else c_QNM[:, valid_N]
