"""Appending: the data of a set has grown, and its first examples are those that the store holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from gradstore.errors import ContractError
from gradstore.spec import key_of
from gradstore.stages.progress import Progress
from gradstore.store.examples import Example, data_hash, to_table
from gradstore.store.features import FeatureStore, SetInfo

if TYPE_CHECKING:
    import pyarrow as pa


def extend_if_grown(
    store: FeatureStore, name: str, rows: Sequence[Example], progress: Progress, *, append: bool
) -> None:
    """Append to a set the examples that its data has beyond those that the store holds, if there are such.

    Raises
    ------
    ContractError
        If there are and ``append`` is not asked for.
    """
    found = _grown(store, name, rows)
    if found is None:
        return
    extended, added = found
    where = f"{store.storage.url}/{extended.folder}"
    if not append:
        raise ContractError(
            f"{where}: has {len(rows) - len(added):,} examples, {key_of(name)} has {len(added):,} more after them. Add --append "
            "to append those, restore the data, or choose another run.store."
        )
    progress.note(f"features/{name}: appending {len(added):,} examples from row {extended.rows - len(added):,} on")
    store.extend_set(name, extended, input_tables(added, extended.block_rows))


def input_tables(examples: Sequence[Example], block_rows: int) -> Iterator[pa.Table]:
    """The inputs of some examples, in tables of at most ``block_rows`` rows."""
    for first in range(0, len(examples), block_rows):
        yield to_table(examples[first : first + block_rows], first)


def _grown(store: FeatureStore, name: str, rows: Sequence[Example]) -> tuple[SetInfo, Sequence[Example]] | None:
    """What a set becomes with the examples that it lacks, and these; None if it is not of the first of ``rows``."""
    existing = store.find_set(name)
    if existing is None:
        return None
    info = existing.info
    held = {info.num_examples: info.data_hash}
    if info.remaining_hash is not None:
        held[info.num_examples - len(info.erased)] = info.remaining_hash
    for count, known in held.items():
        if len(rows) > count and data_hash(rows[:count]) == known:
            added = rows[count:]
            remaining = None if info.remaining_hash is None else data_hash(added, start=info.remaining_hash)
            return info.appended(len(added), data_hash(added, start=info.data_hash), remaining), added
    return None
