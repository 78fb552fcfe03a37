"""Pairs of a query and an example that is to score best for it, read from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from gradstore.errors import DataError
from gradstore.lines import read_rows
from gradstore.spec import content_hash
from gradstore.stages.contributions import valid_rows_of
from gradstore.store.features import FeatureStore

_COLUMNS: Final = ("query", "example")


class Pair(NamedTuple):
    """Ids of a query and an example, and where the file says so."""

    query: str
    example: str
    where: str


def read_pairs(path: str, key: str) -> list[Pair]:
    """Read a .jsonl, .csv or .parquet file with the columns query and example; ``key`` of run.toml names it.

    Raises
    ------
    SpecError
        If there is no such file, or it has another ending.
    DataError
        If it has no pairs, or a line has none of the columns, or not text in them.
    """
    rows = read_rows(path, key, _COLUMNS, "pair")
    return [Pair(query=query, example=example, where=where) for where, (query, example) in rows]


def hash_pairs(pairs: Sequence[Pair]) -> str:
    """Digest of pairs, whatever their order and where they were read from."""
    return content_hash(sorted({(pair.query, pair.example) for pair in pairs}))


def rows_of_pairs(
    store: FeatureStore, pairs: Sequence[Pair], set_name: str, elsewhere: Sequence[str] = ()
) -> list[np.ndarray]:
    """Rows of the train set that are paired with each query of a set, ascending.

    Pairs of queries of the sets ``elsewhere`` are passed over.

    Raises
    ------
    DataError
        If an id is unknown or of a row that is not valid.
    """
    passed = {example_id for name in elsewhere for example_id in _rows(store, name)}
    queries, examples = _rows(store, set_name), _rows(store, "train")
    valid = {
        "query": {*valid_rows_of(store, set_name).tolist()},
        "example": {*valid_rows_of(store, "train").tolist()},
    }
    found: list[set[int]] = [set() for _ in range(store.open_set(set_name).info.rows)]
    for pair in pairs:
        if pair.query not in queries and pair.query in passed:
            continue
        of_query = _known(pair, "query", queries, (set_name, valid["query"]))
        of_example = _known(pair, "example", examples, ("train", valid["example"]))
        for query in of_query:
            found[query].update(of_example)
    return [np.array(sorted(rows), np.int64) for rows in found]


def _known(pair: Pair, column: str, rows: Mapping[str, Sequence[int]], of: tuple[str, set[int]]) -> list[int]:
    """Rows of an id, of a set and its valid rows."""
    (set_name, valid), name = of, getattr(pair, column)
    if name not in rows:
        raise DataError(f"{pair.where}: {column} {name!r} is not the id of an example of {set_name}.")
    found = [row for row in rows[name] if row in valid]
    if not found:
        raise DataError(
            f"{pair.where}: {column} {name!r} has no valid features in {set_name}, and so no contributions. Leave out this pair."
        )
    return found


def _rows(store: FeatureStore, set_name: str) -> dict[str, list[int]]:
    """Rows of every id of a set."""
    found: dict[str, list[int]] = {}
    for row, example_id in enumerate(store.open_set(set_name).read_column("example_id")):
        if example_id is not None:
            found.setdefault(example_id, []).append(row)
    return found
