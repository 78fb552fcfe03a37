"""The two commands: influence by label or source, and the choice of rows by it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from gradstore.errors import SpecError
from gradstore.stages.influence.pools import pooled
from gradstore.stages.influence.totals import Asked, Influence, find_influence
from gradstore.stages.output import replacing, require_place
from gradstore.store.features import FeatureStore

Totals = Literal["label", "source"]
Pool = Literal["sum", "attention"]

_PERCENT: Final = 100


def influence(
    store_url: str,
    asked: Asked,
    by: Totals,
    *,
    pool: Pool = "sum",
    sharpness: float = 1.0,
    examples: Path | None = None,
) -> dict[str, Any]:
    r"""Plain values: of every label or source of the train set how many valid rows it has, and their influence.

    Of sums ``sum`` is that of their influence (`find_influence`), ``mean`` what one of them has, ``positive`` the share of rows
    above 0. By attention a set S of rows has on a query

    .. math:: f(q, S) = \sum_{n \in S} \alpha_n S[q, n], \qquad \alpha = \operatorname{softmax}_{n \in S} t |S[q, n]|

    (arXiv 2505.18513), of which ``sum`` is that over the queries, ``mean`` what one query has, and ``positive`` the share of
    queries above 0. Largest sums first. Labels of rows without one are None.

    Parameters
    ----------
    store_url, asked
        The store, and which influence: see `find_influence`.
    by
        Whose rows are put together.
    pool
        How.
    sharpness
        t, by attention.
    examples
        A file of ids, one a line: they are the one set that is asked for, in the place of labels and sources.

    Raises
    ------
    SpecError
        If the file holds no id, or one that is not in the train set; or self-influence is asked for by attention; or the sharpness is
        not a number above 0, or of sums.
    """
    if pool == "attention" and asked.on_itself:
        raise SpecError("--pool: found attention with --self, which has one number for each example. Leave out one.")
    if not 0 < sharpness < math.inf or (pool == "sum" and sharpness != 1):
        raise SpecError(
            f"--sharpness: found {sharpness} with --pool {pool}; accepted: a number above 0, with attention."
        )
    store = FeatureStore.open(store_url)
    by_name: str = by if examples is None else "examples"
    # Before C is read.
    named: dict[str | None, list[int]] = (
        _named(store, by) if examples is None else {examples.name: _rows_of_ids(store, examples)}
    )
    if pool == "attention":
        found, rows = pooled(store, asked, named, sharpness=sharpness)
    else:
        found = find_influence(store_url, asked)
        rows = _summed(found, named)
    told = [{by_name: name, **of} for name, of in rows.items()]
    told.sort(key=lambda row: -row["sum"])
    return {**_made(found), "by": by_name, "pool": pool, "sharpness": sharpness, "rows": told}


def _named(store: FeatureStore, by: Totals) -> dict[str | None, list[int]]:
    """Train rows by their label or source."""
    rows: dict[str | None, list[int]] = {}
    for row, value in enumerate(store.open_set("train").read_column(by)):
        rows.setdefault(value, []).append(row)
    return rows


def _rows_of_ids(store: FeatureStore, file: Path) -> list[int]:
    """Train rows of the ids in a file."""
    try:
        ids = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--examples: {file}: not readable as text: {error}.") from error
    if not ids:
        raise SpecError(f"--examples: {file}: holds no id. Write the ids of train examples into it, one a line.")
    known = {example: row for row, example in enumerate(store.open_set("train").read_column("example_id"))}
    if unknown := [example for example in ids if example not in known]:
        raise SpecError(
            f"--examples: {file}: {len(unknown):,} of {len(ids):,} ids are not in the train set, such as {unknown[0]!r}."
        )
    return sorted({known[example] for example in ids})


def _summed(found: Influence, named: Mapping[str | None, Sequence[int]]) -> dict[str | None, dict[str, Any]]:
    places = {row: place for place, row in enumerate(found.rows.tolist())}
    of_sets = {name: [places[row] for row in rows if row in places] for name, rows in named.items()}
    return {
        name: {
            "rows": len(of),
            "sum": math.fsum(found.totals[of]),
            "mean": float(found.totals[of].mean()),
            "positive": float((found.totals[of] > 0).mean()),
        }
        for name, of in of_sets.items()
        if of
    }


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
