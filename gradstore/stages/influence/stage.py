"""The two commands: influence by label or source, and the choice of rows by it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from gradstore.errors import SpecError
from gradstore.stages.influence.totals import Asked, Influence, find_influence
from gradstore.stages.output import replacing, require_place
from gradstore.store.features import FeatureStore

Totals = Literal["label", "source"]

_PERCENT: Final = 100


def influence(store_url: str, asked: Asked, by: Totals) -> dict[str, Any]:
    """Plain values: of every label or source of the train set how many valid rows it has, and their influence.

    ``sum`` is that of their influence (`find_influence`), ``mean`` what one of them has, ``positive`` the share of rows above
    0; largest sums first. Labels of rows without one are None.
    """
    found = find_influence(store_url, asked)
    values = found.store.open_set("train").read_column(by)
    places: dict[str | None, list[int]] = {}
    for place, row in enumerate(found.rows.tolist()):
        places.setdefault(values[row], []).append(place)
    rows: list[dict[str, Any]] = [
        {
            by: value,
            "rows": len(of),
            "sum": math.fsum(found.totals[of]),
            "mean": float(found.totals[of].mean()),
            "positive": float((found.totals[of] > 0).mean()),
        }
        for value, of in places.items()
    ]
    rows.sort(key=lambda row: -row["sum"])
    return {**_made(found), "by": by, "rows": rows}


def select(
    store_url: str, output: Path, top: str, asked: Asked, *, lowest: bool = False, force: bool = False
) -> dict[str, Any]:
    """Write the train examples of the largest influence to a file; return what was done.

    One id a line, largest first; a file that ends in .jsonl has row, id and influence.

    Parameters
    ----------
    store_url
        The store.
    output
        The file.
    top
        How many: a number, or a share of the valid rows such as 5%, rounded up.
    asked
        Which influence: see `find_influence`.
    lowest
        Whether those of the lowest influence are chosen, lowest first.
    force
        Whether a file that is there is replaced.

    Raises
    ------
    SpecError
        If ``top`` is neither, or asks for none or for more than there are; or the file cannot be of that name, or cannot
        hold the ids line by line.
    StorageError
        If the file cannot be written.
    """
    # Before C is read, as far as can be told.
    _count(top, None)
    require_place(output, FeatureStore.open(store_url).storage, force=force)
    found = find_influence(store_url, asked)
    count = _count(top, len(found.rows))
    # Of equal ones the first.
    order = np.argsort(found.totals if lowest else -found.totals, kind="stable")[:count]
    ids = found.store.open_set("train").read_column("example_id")
    chosen = [(int(found.rows[place]), ids[found.rows[place]], float(found.totals[place])) for place in order]
    if output.suffix == ".jsonl":
        lines = [json.dumps({"row": row, "example": example, "influence": total}) for row, example, total in chosen]
    else:
        lines = [example for _, example, _ in chosen]
        _require_lines(output, lines)
    with replacing(output) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {**_made(found), "output": str(output), "examples": len(chosen), "of": len(found.rows)}


def _made(found: Influence) -> dict[str, Any]:
    return {
        "store": found.store.storage.url,
        "kernel": found.kernel,
        "weights": found.asked.weights,
        "self": found.asked.on_itself,
        "query": found.asked.query,
        "queries": found.queries,
    }


def _require_lines(output: Path, ids: Sequence[str]) -> None:
    for example in ids:
        # As those split lines who read the file: also at marks that are no newline.
        if example.splitlines() != [example]:
            raise SpecError(
                f"{output}: the id {example!r} is not one line, which this file could not be read back by. Choose a name that "
                "ends in .jsonl."
            )


def _count(top: str, rows: int | None) -> int:
    """How many rows a number or a share of them is; where their number is not known yet, one at least."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", top)
    count = 0
    if match and match[2] and 0 < Fraction(match[1]) <= _PERCENT:
        count = 1 if rows is None else math.ceil(Fraction(match[1]) * rows / _PERCENT)
    elif match and not match[2] and match[1].isdigit():
        count = int(match[1])
    if count < 1 or (rows is not None and count > rows):
        most = "" if rows is None else f", of {rows:,} valid train rows"
        raise SpecError(f"--top: found {top!r}; accepted: a number from 1, or a share such as 5%{most}.")
    return count
