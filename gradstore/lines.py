"""Files of lines that users give: JSON objects, rows of texts, and ids."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Final

from gradstore.errors import DataError, SpecError

_ENDINGS: Final = (".jsonl", ".csv", ".parquet")


def read_objects(content: bytes, where: str) -> list[tuple[int, dict[str, Any]]]:
    """Return (number of the line, object) of every line of JSON that is not blank.

    Parameters
    ----------
    content
        UTF-8 text, with or without a byte order mark. A line ends at a newline alone: other marks may stand in a text.
    where
        What it is, for messages.

    Raises
    ------
    DataError
        If it is not UTF-8, or a line is no JSON object.
    """
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is no UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}.") from error
    return [
        (number, parse_object(line, f"{where}, line {number}"))
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def parse_object(line: str, where: str) -> dict[str, Any]:
    """Return the JSON object of a line.

    Raises
    ------
    DataError
        If it is none.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{where} is not JSON: {reason}.") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} is a JSON {type(found).__name__}, not an object with columns.")
    return found


def read_ids(path: Path, key: str) -> frozenset[str]:
    """Return the example ids of a file, one a line; ``key`` is the option or key that names it.

    Raises
    ------
    SpecError
        If it cannot be read.
    DataError
        If it holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not UTF-8 text: {error.reason}"
        raise SpecError(f"{key}: {path} cannot be read: {reason}. Give a file of example ids, one a line.") from error
    ids = frozenset(line for line in lines if line.strip())
    if not ids:
        raise DataError(f"{key}: {path} holds no id; give a file of example ids, one a line.")
    return ids


def read_rows(path: str, key: str, columns: Sequence[str], noun: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return where each row of a .jsonl, .csv or .parquet file is, and its texts in some columns; other columns are passed over.

    Parameters
    ----------
    path
        The file, here or at a URL.
    key
        The key of run.toml that names it, for messages.
    columns
        The columns that every row has.
    noun
        What a row is, for messages.

    Raises
    ------
    SpecError
        If there is no such file, or it has another ending.
    DataError
        If it has no rows, or one has none of the columns, or not text in them.
    """
    import fsspec

    ending = PurePath(path).suffix
    if ending not in _ENDINGS:
        raise SpecError(f"{key}: found {path}; accepted: a file that ends in {', '.join(_ENDINGS)}.")
    try:
        with fsspec.open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else f"it cannot be read: {error}"
        raise SpecError(f"{key}: found {path}; {reason}.") from error
    read = {".jsonl": _from_jsonl, ".csv": _from_csv, ".parquet": _from_parquet}[ending]
    asked = f"a {noun} has the columns {' and '.join(columns)}"
    found = [(f"{path}:{line}", _texts(row, columns, f"{path}:{line}", asked)) for line, row in read(path, content)]
    if not found:
        raise DataError(f"{path}: holds no {noun}s; {asked}.")
    return found


def _texts(row: Any, columns: Sequence[str], where: str, asked: str) -> tuple[str, ...]:
    if not isinstance(row, Mapping) or not {*columns} <= {*row}:
        found = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(f"{where}: found the columns {found or 'none'}; {asked}.")
    for column in columns:
        if not isinstance(row[column], str) or not row[column]:
            raise DataError(f"{where}: {column} is {row[column]!r}; accepted: a text that is not empty.")
    return tuple(row[column] for column in columns)


def _from_jsonl(path: str, content: bytes) -> Iterator[tuple[int, Any]]:
    return iter(read_objects(content, path))


def _from_csv(path: str, content: bytes) -> Iterator[tuple[int, Any]]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not readable as text in UTF-8: {error}.") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        yield reader.line_num, row


def _from_parquet(path: str, content: bytes) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet: {error}.") from error
    yield from enumerate(table.to_pylist(), start=1)
