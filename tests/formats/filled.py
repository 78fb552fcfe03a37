"""Stores whose tables are those that a run writes, for tests of what a user reads."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gradstore.stages.featurize.tables import Outputs, Statistics, example_table, statistics_of
from gradstore.store.backend import Storage
from gradstore.store.commits import Record
from gradstore.store.examples import Example, hash_inputs, to_table
from gradstore.store.features import FeatureSet, FeatureStore, SetInfo
from gradstore.store.features.erasure import erase_rows
from tests import stores


def example(row: int) -> Example:
    """The example of a row: id-<row>, every fourth without a label."""
    inputs = {"tokens": np.arange(row, row + 3, dtype=np.int64)}
    return Example(
        example_id=f"id-{row}",
        source="texts.jsonl",
        label=None if row % 4 == 0 else f"topic {row % 3}",
        text=f"text {row}",
        content_hash=hash_inputs(inputs),
        size=3 + row,
        inputs=inputs,
    )


def examples(info: SetInfo, block: int) -> list[Example]:
    return [example(row) for row in range(*info.block_range(block))]


def features(info: SetInfo, block: int, invalid: Container[int] = ()) -> dict[str, npt.NDArray[np.float32]]:
    """Features of a block; NaN in the invalid rows of the set."""
    values = stores.features(info, block)
    for row in range(*info.block_range(block)):
        if row in invalid:
            for array in values.values():
                array[row - info.block_range(block)[0]] = np.nan
    return values


def create(target: str | Storage, info: SetInfo) -> FeatureSet:
    """Create a store and one set in it."""
    inputs = [to_table(examples(info, block), info.block_range(block)[0]) for block in range(info.num_blocks)]
    return FeatureStore.create(target, contract=stores.CONTRACT, run=stores.RUN).create_set(info, inputs)


def write(
    feature_set: FeatureSet, block: int, invalid: Container[int] = (), facts: Mapping[str, Any] | None = None
) -> Record:
    """Write and commit a block as a worker does."""
    info = feature_set.info
    values = features(info, block, invalid)
    start, stop = info.block_range(block)
    return feature_set.write_block(
        block,
        values,
        examples=_examples_table(info, block, values, np.arange(start, stop) / 8),
        statistics=Statistics(info).table(values),
        facts=facts or {},
    )


def _examples_table(
    info: SetInfo, block: int, values: Mapping[str, npt.NDArray[np.float32]], outputs: npt.NDArray[np.float64]
) -> pa.Table:
    """The example table of a block."""
    start = info.block_range(block)[0]
    said = Outputs(function="cross_entropy", values=outputs)
    return example_table(start, examples(info, block), said, values, arrays=info.arrays)


def filled(
    target: str | Storage, info: SetInfo, *, without: Container[int] = (), invalid: Container[int] = ()
) -> FeatureSet:
    """A store of one set, all of whose blocks but some are written."""
    made = create(target, info)
    for block in range(info.num_blocks):
        if block not in without:
            write(made, block, invalid)
    return made


def whole(made: FeatureSet, group: str, *, without: Container[int] = ()) -> npt.NDArray[np.float32]:
    """A group's features of all rows, by the store's own reading; NaN where a block is not written."""
    width = next(array.features for array in made.info.arrays if array.name == group)
    values = np.full((made.info.rows, width), np.nan, np.float32)
    for block in range(made.info.num_blocks):
        if block not in without:
            values[slice(*made.info.block_range(block))] = made.read_block(block)[group]
    return values


def append(made: FeatureSet, count: int, *, first: int) -> FeatureSet:
    """The same set with more examples, from the next block on; ``first`` is the first of their rows."""
    info = made.info
    added = [example(row) for row in range(first, first + count)]
    extended = info.appended(count, f"{info.data_hash} and {count} rows", None)
    store = FeatureStore.open(made.storage)
    return store.extend_set(info.name, extended, [to_table(added, first)])


def erase(made: FeatureSet, rows: Sequence[int]) -> FeatureSet:
    """The same set without the examples of some rows."""
    store = FeatureStore.open(made.storage)
    erase_rows(store, made.info.name, rows, statistics_of)
    return store.open_set(made.info.name)
