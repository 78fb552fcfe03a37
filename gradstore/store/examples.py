"""Examples as the store keeps them: what enters the model, and what a reader wants to know beside it.

The creator of a feature set writes every example once, so that workers need neither the dataset nor the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa

INPUT: Final = "input:"
"""Prefix of the columns that hold an example's inputs: ``input:tokens``."""

REDACTED: Final = "(redacted)"
"""Stands for the text of an example where that is not to be shown."""

_FACTS: Final = (
    ("example_id", pa.string()),
    ("source", pa.string()),
    ("label", pa.string()),
    ("text", pa.string()),
    ("content_hash", pa.string()),
    ("size", pa.int64()),
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One example: a row of a feature set.

    Attributes
    ----------
    example_id
        What the example is called in its source: the value of an id column, a path, a path and a row.
    source
        The source as run.toml names it.
    label
        The value of the label column, or None; never seen by the model of a language-modelling run.
    text
        The example as a person reads it, as much of it as the model sees.
    content_hash
        Hash of ``inputs``: equal for equal inputs, whatever their origin. See `hash_inputs`.
    size
        What a batch's budget counts: tokens of a text.
    inputs
        The arrays that the adapter's ``outputs`` takes, by name.
    """

    example_id: str
    source: str
    label: str | None
    text: str
    content_hash: str
    size: int
    inputs: Mapping[str, np.ndarray]


def hash_inputs(inputs: Mapping[str, np.ndarray]) -> str:
    """Return the hex digest of named arrays: names, types, shapes and little-endian values."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(inputs):
        array = np.ascontiguousarray(inputs[name])
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name}|{little.dtype.str}|{array.shape}|".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()


def data_hash(examples: Iterable[Example], *, start: str = "") -> str:
    """Return the hash of a set's examples, in row order: of their inputs, ids and labels.

    It is a chain, so that appending rows extends it: ``data_hash(b, start=data_hash(a)) == data_hash(a + b)``.
    """
    facts = ((example.content_hash, example.example_id, example.label) for example in examples)
    return data_hash_of_facts(facts, start=start)


def data_hash_of_facts(facts: Iterable[tuple[str, str, str | None]], *, start: str = "") -> str:
    """Return the same hash of what enters it: (content hash, id, label) of every example."""
    chain = start
    for fact in facts:
        link = json.dumps([chain, *fact])
        chain = hashlib.blake2b(link.encode(), digest_size=16).hexdigest()
    return chain


def to_table(examples: Sequence[Example], first_row: int) -> pa.Table:
    """Return the inputs table of consecutive rows.

    Columns: row int64, example_id, source, label (nullable), text, content_hash, size int64, and for each input
    ``input:<name>``: plain values for scalars, lists for vectors, lists of lists for matrices, and so on.

    Raises
    ------
    ValueError
        If there is no example, or an input differs among them in type or number of dimensions.
    """
    if not examples:
        raise ValueError("A table of inputs needs at least one example.")
    columns: dict[str, Any] = {"row": pa.array(range(first_row, first_row + len(examples)), pa.int64())}
    for name, kind in _FACTS:
        columns[name] = pa.array([getattr(example, name) for example in examples], kind)
    for name in examples[0].inputs:
        columns[f"{INPUT}{name}"] = _nested_column(name, [example.inputs[name] for example in examples])
    return pa.table(columns)


def from_table(table: pa.Table) -> list[Example]:
    """Return the examples of an inputs table; the inverse of `to_table`."""
    facts = {name: table.column(name).to_pylist() for name, _ in _FACTS}
    inputs = {
        name.removeprefix(INPUT): _row_arrays(table.column(name))
        for name in table.column_names
        if name.startswith(INPUT)
    }
    return [
        Example(
            **{name: values[i] for name, values in facts.items()},
            inputs={name: arrays[i] for name, arrays in inputs.items()},
        )
        for i in range(table.num_rows)
    ]


def _nested_column(name: str, arrays: Sequence[np.ndarray]) -> pa.Array:
    """Nest from the values outwards: one level of lists for each dimension an example has.

    Offsets are 64-bit: a block of images passes 2**31 values.
    """
    kinds = {(array.dtype.str, array.ndim) for array in arrays}
    if len(kinds) != 1:
        raise ValueError(f"Input {name!r} must have one type and number of dimensions; found {sorted(kinds)}.")
    column = pa.array(np.concatenate([array.reshape(-1) for array in arrays]))
    for axis in reversed(range(arrays[0].ndim)):
        lengths = np.concatenate(
            [np.full(int(np.prod(array.shape[:axis])), array.shape[axis], np.int64) for array in arrays]
        )
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        column = pa.LargeListArray.from_arrays(pa.array(offsets), column)
    return column


def _row_arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    values = column.combine_chunks()
    levels: list[np.ndarray] = []
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        levels.append(values.offsets.to_numpy())
        values = values.values
    flat = values.to_numpy(zero_copy_only=False)
    return [_row_array(flat, levels, row) for row in range(len(column))]


def _row_array(flat: np.ndarray, levels: Sequence[np.ndarray], row: int) -> np.ndarray:
    start, stop = row, row + 1
    shape: list[int] = []
    for offsets in levels:
        lists, (start, stop) = stop - start, (int(offsets[start]), int(offsets[stop]))
        # Every list of one level is as long as its neighbours, because the row was an array.
        shape.append((stop - start) // max(lists, 1))
    return flat[start:stop].reshape(shape)
