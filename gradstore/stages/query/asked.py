"""Queries as feature sets of their own, in a store that lies over the user's: of new examples, or of rows that are stored."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from gradstore.errors import ContractError, DataError, SpecError
from gradstore.plan.resolve import resolve_kernel
from gradstore.spec import RunSpec
from gradstore.stages.contribute import across, queries
from gradstore.stages.contribute.artifacts import create_queries
from gradstore.stages.featurize.block import featurize_blocks
from gradstore.stages.featurize.tables import statistics_of
from gradstore.stages.reading import examples_at
from gradstore.stages.spectra import KeptSpectra
from gradstore.store.contract import require_equal
from gradstore.store.examples import Example, data_hash, from_table, to_table
from gradstore.store.features import FeatureSet, FeatureStore, SetInfo

if TYPE_CHECKING:
    from gradstore.adapters import Adapter

_PREFIX: Final = "query"
# Enough of a hash to tell sets apart.
_HASH_DIGITS: Final = 16
# Where an adapter tells how its splits are cut, which a query is cut by and not compared with.
_OF_SPLITS: Final = "truncation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A row of a feature set."""

    set_name: str
    row: int

    @classmethod
    def parse(cls, text: str) -> Place:
        """Read ``eval:12``.

        Raises
        ------
        SpecError
            If it is none.
        """
        # A row of more digits is of no set.
        match = re.fullmatch(r"([^:]+):([0-9]{1,18})", text)
        if match is None:
            raise SpecError(f"--index: found {text!r}; accepted: a set and a row, such as eval:12.")
        return cls(set_name=match[1], row=int(match[2]))

    def __str__(self) -> str:
        return f"{self.set_name}:{self.row}"


def refuse_other_model(store: FeatureStore, adapter: Adapter) -> None:
    """Make sure that a query is read by the tokenizer and computed by the code that the store's features are of.

    The weights are compared where they are loaded.

    Raises
    ------
    ContractError
        With one line for each thing that differs.
    """
    stored, found = (
        {key: value for key, value in said.items() if key not in (_OF_SPLITS, "precision")}
        for said in (store.contract["model"], adapter.identity())
    )
    remedy = "Name the model that the store was made with: --model."
    require_equal(f"The store {store.storage.url}", stored, found, remedy=remedy)


def featurize_examples(store: FeatureStore, spec: RunSpec, examples: Sequence[Example]) -> str:
    """Compute the features of some examples as a set of the store; return its name.

    Raises
    ------
    ContractError
        If the model is not the one that the store was made with.
    DataError
        If the features of one are not finite.
    """
    train = store.open_set("train").info
    info = _info(train, f"{_PREFIX}-{data_hash(examples)[:_HASH_DIGITS]}", len(examples), data_hash(examples))
    made = store.create_set(info, [to_table(examples, 0)])
    for member in made.info.members:
        featurize_blocks(spec.run.store, spec.model_dump(), (made.info.name, member), [0])
        # A set may have some such rows; of a query it is the answer that would be missing.
        valid = made.of_member(member).valid_rows()
        if not valid.all():
            names = [example.example_id for example, is_valid in zip(examples, valid, strict=True) if not is_valid]
            raise DataError(f"{', '.join(names)}: the model's output or gradient is not finite. Leave it out.")
    return made.info.name


def copy_row(store: FeatureStore, place: Place) -> tuple[str, Example]:
    """Take the features of a stored row as a set of the store; return its name, and the example.

    Raises
    ------
    NotReadyError
        If there is no such set, or the row's block is not committed.
    SpecError
        If the set has no such row.
    DataError
        If the row's example was erased, or its features are not finite.
    ContractError
        If the features are not a query's: those of training examples along Adam's direction, or of other groups.
    """
    source = store.open_set(place.set_name)
    example = _example_at(source, place)
    _refuse_directions(store, place)
    queries.refuse_other_groups(store, place.set_name)
    digest = data_hash([example])
    name = f"{_PREFIX}-{place.set_name}-{place.row}-{digest[:_HASH_DIGITS]}"
    made = store.create_set(_info(source.info, name, 1, digest), [to_table([example], 0)])
    for member in made.info.members:
        block, index = divmod(place.row, source.info.block_rows)
        if not source.of_member(member).read_examples(block=block)["valid"][index].as_py():
            raise DataError(f"--index: {place}: its features are not finite. Name another row.")
        _copy(source.of_member(member), made.of_member(member), [place.row])
    return name, example


def copy_rows(store: FeatureStore, set_name: str, rows: Sequence[int]) -> str:
    """Take the features of some stored rows, valid ones, as a set of the store; return its name.

    Raises
    ------
    ContractError
        If the features are not a query's, as in `copy_row`.
    """
    _refuse_directions(store, Place(set_name=set_name, row=rows[0]))
    source = store.open_set(set_name)
    examples = examples_at(source, rows)
    digest = data_hash(examples)
    name = f"{_PREFIX}-{set_name}-{digest[:_HASH_DIGITS]}"
    made = store.create_set(_info(source.info, name, len(rows), digest), [to_table(examples, 0)])
    for member in made.info.members:
        _copy(source.of_member(member), made.of_member(member), rows)
    return name


def precondition(store: FeatureStore, spec: RunSpec, name: str, kept: KeptSpectra) -> None:
    """Precondition the queries of a set, as each member has them, under the run's kernel, by spectra that were read before.

    Raises
    ------
    NotReadyError
        If the kernel is not built.
    ContractError
        If it is stale.
    """
    url, run = spec.run.store, spec.model_dump()
    for member in store.open_set(name).info.members:
        create_queries(spec, store, (name, member))
        if not resolve_kernel(spec).across_groups:
            queries.precondition(url, run, (name, member), kept.read)
            continue
        for task in across.query_tasks(store, spec, [(name, member)]):
            task.function(*task.arguments)
        across.precondition(url, run, (name, member), spec.kernel.name)


def _info(of: SetInfo, name: str, rows: int, digest: str) -> SetInfo:
    """A set of queries, with the groups and members of another set."""
    return SetInfo(
        name=name,
        rows=rows,
        block_rows=rows,
        # Queries are stored as they were computed.
        dtype="float32",
        arrays=tuple(replace(array, scale=1.0) for array in of.arrays),
        data_hash=digest,
        members=of.members,
        recorded=of.recorded,
    )


def _example_at(source: FeatureSet, place: Place) -> Example:
    info = source.info
    if place.row >= info.rows:
        raise SpecError(f"--index: found {place}; {place.set_name} has rows 0 to {info.rows - 1:,}.")
    block, index = divmod(place.row, info.block_rows)
    _, stop = info.block_range(block)
    if place.row in info.erased or place.row >= stop:
        what = "its example was erased" if place.row < stop else "it belongs to no example"
        raise DataError(f"--index: {place}: {what}. Name another row.")
    (example,) = from_table(source.read_inputs(block).slice(index, 1).combine_chunks())
    return example


def _refuse_directions(store: FeatureStore, place: Place) -> None:
    if place.set_name == "train" and any("optimizer" in member for member in store.contract["members"].values()):
        raise ContractError(
            f"--index: {place}: features of training examples are of the directions of Adam's steps in this store, those of "
            "queries are not. Name a row of learn or eval, or give the example itself."
        )


def _copy(source: FeatureSet, made: FeatureSet, rows: Sequence[int]) -> None:
    """Write some rows of a set as the one block of another."""
    parts, tables = [], []
    for block, of_block in groupby(rows, lambda row: row // source.info.block_rows):
        places = [row % source.info.block_rows for row in of_block]
        tables.append(source.read_examples(block=block).take(places))
        parts.append({name: values[places] for name, values in source.read_block(block).items()})
    features = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    table = pa.concat_tables(tables)
    column = table.column_names.index("row")
    table = table.set_column(column, table.field(column), pa.array(range(len(rows)), pa.int64()))
    made.write_block(0, features, examples=table, statistics=statistics_of(made.info, features), facts={})
