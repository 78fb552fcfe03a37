"""Queries of a report, each with its ranked examples: nothing is held of rows and queries that are not shown."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import compute

from gradstore.stages.report.data import QueryReport, RankedExample
from gradstore.stages.weights import UNWEIGHTED
from gradstore.store.artifacts import ScoresArtifact
from gradstore.store.examples import REDACTED
from gradstore.store.features import FeatureSet, FeatureStore

Address = Callable[[str, int], str | None]
"""Where the picture of an example is, by its set and row; None if it has none."""

# What is shown in the place of an example that was erased since it was ranked.
_ERASED: Mapping[str, Any] = {"example_id": "(erased)", "label": None, "text": ""}


def read_queries(
    store: FeatureStore,
    rankings: Sequence[Mapping[str, Any]],
    shown: Collection[int],
    image: Address = lambda *_: None,
    *,
    redact: bool = False,
) -> list[QueryReport]:
    """Return some queries, by their rows in the eval set and in that order; a row of a gap is none.

    Parameters
    ----------
    store
        The store.
    rankings
        Which of its scores, as its status tells of them.
    shown
        The rows.
    image
        Where pictures are.
    redact
        Whether texts are left out.
    """
    wanted = pa.array(sorted(shown), pa.int64())
    tables = {}
    for row in rankings:
        table = ScoresArtifact.open(store.storage, row["name"]).read()
        kept = table.filter(compute.is_in(table["query"], value_set=wanted.cast(table["query"].type)))
        tables[row["weights"] or UNWEIGHTED] = kept.to_pylist()
    ranked_rows = {row["example"] for rows in tables.values() for row in rows}
    texts = read_texts(store.open_set("train"), ranked_rows, redact=redact)
    by_query: dict[int, dict[str, list[RankedExample]]] = {query: {name: [] for name in tables} for query in shown}
    for name, rows in tables.items():
        for row in rows:
            side, rank, score, parts = (row[key] for key in ("side", "rank", "score", "parts"))
            ranked = RankedExample(
                side=side,
                rank=rank,
                score=score,
                parts=parts,
                image=image("train", row["example"]),
                **texts[row["example"]],
            )
            by_query[row["query"]][name].append(ranked)
    queries = read_texts(store.open_set("eval"), set(shown), redact=redact)
    return [
        QueryReport(
            query_id=queries[query]["example_id"],
            label=queries[query]["label"],
            text=queries[query]["text"],
            rankings=by_query[query],
            image=image("eval", query),
        )
        for query in shown
        if query in queries
    ]


def read_texts(feature_set: FeatureSet, rows: Collection[int], *, redact: bool = False) -> dict[int, Mapping[str, Any]]:
    """Id, label and text of some examples of a set, by row."""
    found: dict[int, Mapping[str, Any]] = {}
    for block in sorted({row // feature_set.info.block_rows for row in rows}):
        start, _ = feature_set.info.block_range(block)
        table = feature_set.read_inputs(block).select(["example_id", "label", "text"])
        for index, row in enumerate(table.to_pylist()):
            if start + index in rows:
                shown = {**row, "text": REDACTED} if redact else row
                found[start + index] = shown if row["example_id"] is not None else _ERASED
    return found
