"""Tables of rows: cut at the blocks of a set, and with nothing left of the rows that are erased."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from gradstore.errors import DataError
from gradstore.store.features.info import SetInfo


def inputs_of_blocks(
    info: SetInfo, tables: Iterable[pa.Table], *, first_block: int = 0, without_erased: bool = False
) -> Iterator[pa.Table]:
    """Cut tables of consecutive examples at the blocks of a set, from ``first_block`` on; of erased rows nothing is left.

    The set decides of its blocks and the numbers of their rows, not the giver of the tables. With ``without_erased`` the
    tables lack the examples that are erased.

    Raises
    ------
    DataError
        If the tables have more or fewer rows than the blocks.
    """
    blocks = deque(range(first_block, info.num_blocks))
    left, given, wanted = None, 0, sum(_given(info, block, without_erased) for block in blocks)
    for table in tables:
        given += table.num_rows
        left = table if left is None else pa.concat_tables([left, table])
        while blocks and left.num_rows >= (rows := _given(info, blocks[0], without_erased)):
            yield _of_block(info, blocks.popleft(), left.slice(0, rows).combine_chunks(), without_erased)
            left = left.slice(rows)
    if given != wanted:
        raise DataError(f"feature set {info.name}: takes {wanted} rows; the input tables given have {given}.")


def blanked(table: pa.Table, rows: Sequence[int], *, inserted: bool = False) -> pa.Table:
    """A block's table with nothing left of some of its rows: null, and 0 or false where null cannot be.

    The numbers of the rows stay. With ``inserted`` the table lacks these rows, and they come in at their places.
    """
    gone = set(rows)
    kept = iter(range(table.num_rows))
    if inserted:
        indices = [None if row in gone else next(kept) for row in range(table.num_rows + len(gone))]
    else:
        indices = [None if row in gone else row for row in kept]
    blank = table.take(pa.array(indices, pa.int64())).combine_chunks()
    for place, field in enumerate(blank.schema):
        column = blank.column(place)
        if field.name == "row" and not inserted:
            blank = blank.set_column(place, field, table.column("row"))
        elif field.name == "valid":
            blank = blank.set_column(place, field, column.fill_null(False))
        elif field.name == "size" or (field.name.startswith("input:") and pa.types.is_primitive(field.type)):
            blank = blank.set_column(place, field, column.fill_null(pa.scalar(0).cast(field.type)))
    return blank


def _given(info: SetInfo, block: int, without_erased: bool) -> int:
    start, stop = info.block_range(block)
    return stop - start - (len(info.erased_in(block)) if without_erased else 0)


def _of_block(info: SetInfo, block: int, table: pa.Table, without_erased: bool) -> pa.Table:
    erased = info.erased_in(block)
    if erased:
        table = blanked(table, erased, inserted=without_erased)
    if "row" not in table.column_names:
        return table
    numbers = pa.array(range(*info.block_range(block)), pa.int64())
    return table.set_column(table.column_names.index("row"), pa.field("row", pa.int64()), numbers)
