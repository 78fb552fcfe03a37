"""influence and select: what every train example does to the eval queries together, summed by label or source, or chosen by."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from gradstore.errors import NotReadyError, SpecError
from gradstore.stages.contributions import Contributions, Reads, ScoreMatrix, valid_queries
from gradstore.stages.output import replacing, require_place
from gradstore.stages.progress import Progress
from gradstore.stages.weights import UNWEIGHTED, ranking_name, read_weights
from gradstore.store.artifacts import ContributionArtifact, list_artifacts
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    from rich.table import Table

Totals = Literal["label", "source"]

_QUERIES: Final = "eval"
_PERCENT: Final = 100
# Characters of a label or source in a table.
_LABEL_LENGTH: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Influence:
    """Influence of every valid train row on the eval queries together.

    Attributes
    ----------
    store, kernel, weights
        What it was computed from; weights are None where all groups count the same.
    queries
        How many queries were summed.
    rows, totals
        Numbers of the rows [n], ascending, and the sum of their scores over the queries, float64 [n].
    """

    store: FeatureStore
    kernel: str
    weights: str | None
    queries: int
    rows: np.ndarray
    totals: np.ndarray


def set_influence(store_url: str, kernel: str | None, weights: str | None) -> Influence:
    r"""Sum scores over all valid eval queries.

    .. math:: \tau(Q, n) = \sum_{q \in Q} S[q, n]

    Parameters
    ----------
    store_url
        The store.
    kernel
        Name of the kernel, which may be left out where the store has contributions or scores of one only.
    weights
        Name of the weights; None for none.

    Raises
    ------
    NotReadyError
        If contributions, or scores in their place, or weights are not there.
    SpecError
        If the kernel has to be chosen.
    """
    store = FeatureStore.open(store_url)
    kernel = _chosen(store, kernel)
    valid_Q = np.zeros(store.open_set(_QUERIES).info.rows, bool)
    valid_Q[valid_queries(store, _QUERIES)] = True
    total_N = np.zeros(store.open_set("train").info.rows)
    rows_N, scores = _open(store, kernel, weights)
    for first, place_N, s_QN in scores:
        total_N[place_N] += s_QN[valid_Q[first : first + len(s_QN)]].sum(0)
    return Influence(
        store=store, kernel=kernel, weights=weights, queries=int(valid_Q.sum()), rows=rows_N, totals=total_N[rows_N]
    )


def _chosen(store: FeatureStore, kernel: str | None) -> str:
    known = set()
    for artifact in list_artifacts(store.storage):
        first, _, queries = artifact.name.partition("/")
        if queries == _QUERIES and artifact.kind in ("contributions", "score_matrix"):
            known.add(first if artifact.kind == "contributions" else first.partition(".")[0])
    if not known:
        raise NotReadyError(f"{store.storage.url}: holds no contributions of eval. Run `gradstore contribute` first.")
    if kernel is None and len(known) == 1:
        return known.pop()
    if kernel not in known:
        asked = "is missing" if kernel is None else f"found {kernel}"
        raise SpecError(
            f"--kernel: {asked}; {store.storage.url} has contributions or scores of: {', '.join(sorted(known))}."
        )
    return kernel


def _open(
    store: FeatureStore, kernel: str, weights: str | None
) -> tuple[np.ndarray, Iterator[tuple[int, np.ndarray, np.ndarray]]]:
    """Numbers of the valid rows; and (first query, rows [n], scores [q, n]), float64, of C or of scores in its place."""
    from gradstore.numerics.scores import transformed

    if ContributionArtifact.find_named(store.storage, kernel, _QUERIES) is None:
        matrix = ScoreMatrix.open(store, ranking_name(kernel, weights), _QUERIES)
        transform = matrix.artifact.settings["transform"]
        return matrix.valid_rows(), (
            (0, rows_N, transformed(s_QN.astype(np.float64), transform)) for rows_N, s_QN in matrix.read_blocks()
        )
    contributions = Contributions.open(store, kernel, _QUERIES)
    transform, weights_M = contributions.artifact.settings["transform"], read_weights(store, weights)
    reads = Reads(contributions, Progress(quiet=True), "influence")
    return contributions.valid_rows(), (
        (first, rows_N, transformed(c_QNM @ weights_M, transform)) for first, rows_N, c_QNM in reads.read()
    )


def influence(store_url: str, kernel: str | None, weights: str | None, by: Totals) -> dict[str, Any]:
    """Plain values: of every label or source of the train set how many valid rows it has, and their influence.

    ``sum`` is that of their influence (`set_influence`), ``mean`` what one of them has, ``positive`` the share of rows above 0;
    largest sums first. Labels of rows without one are None.
    """
    found = set_influence(store_url, kernel, weights)
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
    store_url: str,
    output: Path,
    top: str,
    of: tuple[str | None, str | None],
    *,
    lowest: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write the train examples of the largest influence on the eval queries together to a file; return what was done.

    One id a line, largest first; a file that ends in .jsonl has row, id and influence.

    Parameters
    ----------
    store_url
        The store.
    output
        The file.
    top
        How many: a number, or a share of the valid rows such as 5%, rounded up.
    of
        Kernel and weights: see `set_influence`.
    lowest
        Whether those of the lowest influence are chosen, lowest first.
    force
        Whether a file that is there is replaced.

    Raises
    ------
    SpecError
        If ``top`` is neither, or asks for none or for more than there are; or the file cannot be of that name.
    StorageError
        If the file cannot be written.
    """
    # Before C is read, as far as can be told.
    _count(top, None)
    require_place(output, FeatureStore.open(store_url).storage, force=force)
    found = set_influence(store_url, *of)
    count = _count(top, len(found.rows))
    # Of equal ones the first.
    order = np.argsort(found.totals if lowest else -found.totals, kind="stable")[:count]
    ids = found.store.open_set("train").read_column("example_id")
    chosen = [(int(found.rows[place]), ids[found.rows[place]], float(found.totals[place])) for place in order]
    lines = [example for _, example, _ in chosen]
    if output.suffix == ".jsonl":
        lines = [json.dumps({"row": row, "example": example, "influence": total}) for row, example, total in chosen]
    with replacing(output) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {**_made(found), "output": str(output), "examples": len(chosen), "of": len(found.rows)}


def _made(found: Influence) -> dict[str, Any]:
    return {
        "store": found.store.storage.url,
        "kernel": found.kernel,
        "weights": found.weights,
        "queries": found.queries,
    }


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


def render_influence(found: Mapping[str, Any]) -> Table:
    """Draw the influence of labels or sources for a terminal."""
    from rich.table import Table
    from rich.text import Text

    from gradstore.stages.report.formatting import one_line

    title = f"influence on {found['queries']:,} queries: {found['kernel']}, {found['weights'] or UNWEIGHTED}"
    table = Table(found["by"], title=Text(title), title_justify="left")
    for column in ("rows", "sum", "mean", "above 0"):
        table.add_column(column, justify="right")
    for row in found["rows"]:
        name = "(none)" if row[found["by"]] is None else one_line(row[found["by"]], _LABEL_LENGTH)
        # Not as markup, which labels may look like.
        table.add_row(
            Text(name), f"{row['rows']:,}", f"{row['sum']:.4g}", f"{row['mean']:.4g}", f"{row['positive']:.0%}"
        )
    return table
