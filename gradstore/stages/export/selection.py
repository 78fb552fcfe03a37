"""Which groups and rows of a feature set are exported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from gradstore.errors import DataError, NotReadyError, SpecError
from gradstore.lines import read_ids
from gradstore.store.blocks import in_parallel
from gradstore.store.features import FeatureArray, FeatureSet, FeatureStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the user asks for.

    Attributes
    ----------
    feature_set, member
        The set, and whose features; the first member by default.
    groups
        A regular expression that whole names of groups match; all groups by default.
    rows
        ``A:B``: rows from A up to B, where either may be left out.
    ids
        A file of example ids, one a line, instead of rows.
    """

    feature_set: str = "train"
    member: str | None = None
    groups: str | None = None
    rows: str | None = None
    ids: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The chosen rows of one block: which of the block's rows, and the first of their places in the file."""

    block: int
    within: np.ndarray
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What is exported: valid rows in the order of the set.

    Attributes
    ----------
    feature_set
        The set of the chosen member, of which one generation of every block is read throughout.
    arrays
        The chosen groups, in the order of the set.
    pieces
        The rows by block; no block without one.
    generations
        Generation of every committed block.
    examples
        row, example_id and label of every chosen row.
    invalid, erased
        Rows that were asked for and left out, since they have no features: those that are not valid, and those of them that
        were erased.
    """

    feature_set: FeatureSet
    arrays: tuple[FeatureArray, ...]
    pieces: tuple[Piece, ...]
    generations: Mapping[int, int]
    examples: pa.Table
    invalid: int
    erased: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self.examples.num_rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's features."""
        return 4 * sum(array.features for array in self.arrays)

    def snapshot(self) -> list[list[int]]:
        """(block, generation) of everything that is exported."""
        return [[piece.block, self.generations[piece.block]] for piece in self.pieces]


def choose(store: FeatureStore, selection: Selection) -> Chosen:
    """Find what a selection means in a store.

    Raises
    ------
    SpecError
        If a regular expression, range or file cannot be read, no group matches, or rows are out of range.
    DataError
        If an id is unknown, or no valid row is among those asked for.
    NotReadyError
        If the set or member is not there, or a block that is asked for is not committed.
    """
    feature_set = store.open_set(selection.feature_set, selection.member)
    arrays = _chosen_arrays(feature_set, selection.groups)
    if selection.rows is not None and selection.ids is not None:
        raise SpecError("--rows and --ids: found both; give one of them.")
    start, stop = _row_range(feature_set, selection.rows)
    committed = {unit: now for unit, now in feature_set.log.pin().items() if unit < feature_set.info.num_blocks}
    if selection.ids is None:
        blocks = _blocks_with(feature_set, start, stop)
        _require_committed(feature_set, [block for block in blocks if block not in committed], len(blocks))
        wanted = None
    else:
        blocks, wanted = list(committed), read_ids(selection.ids, "--ids")

    def read(block: int) -> pa.Table:
        return feature_set.read_examples(["row", "example_id", "label", "valid"], block=block)

    tables = dict(zip(blocks, in_parallel(read, blocks, threads=feature_set.storage.concurrency), strict=True))
    masks = {block: _mask(table, start, stop, wanted) for block, table in tables.items()}
    if selection.ids is not None and wanted is not None:
        missing = feature_set.info.num_blocks - len(committed)
        _require_known(selection.ids, wanted, tables, f"{store.storage.url}/{feature_set.info.folder}", missing)
    return _chosen(feature_set, arrays, committed, {block: (tables[block], masks[block]) for block in blocks})


def _chosen(
    feature_set: FeatureSet,
    arrays: tuple[FeatureArray, ...],
    generations: Mapping[int, int],
    asked: Mapping[int, tuple[pa.Table, np.ndarray]],
) -> Chosen:
    """Leave out, of the rows of every block that are asked for, those that are not valid, and number the rest."""
    pieces, kept, first, invalid, erased = [], [], 0, 0, 0
    for block, (table, mask) in asked.items():
        valid = table["valid"].to_numpy()
        left_out = mask & ~valid
        invalid += int(left_out.sum())
        erased += int((left_out & table["example_id"].is_null().to_numpy()).sum())
        within = np.flatnonzero(mask & valid)
        if within.size:
            pieces.append(Piece(block=block, within=within, first=first))
            kept.append(table.take(pa.array(within)).drop_columns("valid"))
            first += within.size
    if not kept:
        raise DataError(
            f"{feature_set.storage.url}/{feature_set.info.folder}: none of the rows asked for has features: {invalid} are not "
            f"valid, {erased} of them erased; any others are of no example. Ask for other rows."
        )
    return Chosen(
        feature_set=feature_set,
        arrays=arrays,
        pieces=tuple(pieces),
        generations=generations,
        examples=pa.concat_tables(kept),
        invalid=invalid,
        erased=erased,
    )


def _chosen_arrays(feature_set: FeatureSet, groups: str | None) -> tuple[FeatureArray, ...]:
    arrays = feature_set.info.arrays
    if groups is None:
        return arrays
    try:
        pattern = re.compile(groups)
    except re.error as error:
        raise SpecError(f"--groups: {groups!r} is not a regular expression: {error}.") from error
    found = tuple(array for array in arrays if pattern.fullmatch(array.name))
    if not found:
        some = ", ".join(array.name for array in arrays[:3])
        raise SpecError(
            f"--groups: {groups!r} matches no group's whole name; the set has {len(arrays)}, such as: {some}."
        )
    return found


def _row_range(feature_set: FeatureSet, rows: str | None) -> tuple[int, int]:
    total = feature_set.info.rows
    if rows is None:
        return 0, total
    match = re.fullmatch(r"(\d*):(\d*)", rows)
    if match is None:
        raise SpecError(f"--rows: found {rows!r}; accepted: A:B, rows from A up to B, such as 0:1000 or 500:.")
    start, stop = int(match[1] or 0), int(match[2] or total)
    if not 0 <= start < stop <= total:
        raise SpecError(
            f"--rows: found {rows!r}, rows {start} up to {stop}; the set {feature_set.info.name} has {total} rows."
        )
    return start, stop


def _blocks_with(feature_set: FeatureSet, start: int, stop: int) -> list[int]:
    """Blocks of which an example is among the rows."""
    info = feature_set.info
    ranges = {block: info.block_range(block) for block in range(info.num_blocks)}
    return [block for block, (first, last) in ranges.items() if max(first, start) < min(last, stop)]


def _require_committed(feature_set: FeatureSet, missing: list[int], total: int) -> None:
    if missing:
        raise NotReadyError(
            f"{feature_set.storage.url}/{feature_set.info.folder}: {len(missing)} of the {total} blocks asked for are not "
            f"committed, block {missing[0]} (rows {':'.join(map(str, feature_set.info.block_range(missing[0])))}) among "
            "them. Run `gradstore featurize`: it computes them; or ask for other rows."
        )


def _mask(table: pa.Table, start: int, stop: int, wanted: frozenset[str] | None) -> np.ndarray:
    if wanted is not None:
        return np.array([example_id in wanted for example_id in table["example_id"].to_pylist()], bool)
    rows = table["row"].to_numpy()
    return np.asarray((rows >= start) & (rows < stop))


def _require_known(
    path: Path, wanted: frozenset[str], tables: Mapping[int, pa.Table], where: str, missing_blocks: int
) -> None:
    known = {example_id for table in tables.values() for example_id in table["example_id"].to_pylist()}
    unknown = sorted(wanted - known)
    if unknown:
        later = f" or among the {missing_blocks} blocks that are not committed yet" if missing_blocks else ""
        raise DataError(
            f"--ids: {path}: {len(unknown)} of {len(wanted)} ids are of no example of {where}, {unknown[0]!r} among them. "
            f"They are misspelt, of another set, erased{later}."
        )
