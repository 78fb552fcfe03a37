"""Files of lines that users give: JSON objects, and ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gradstore.errors import DataError, SpecError


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
