"""report: artifacts -> one page and tables. Reads what score left in the store and writes the page beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradstore.errors import NotReadyError, StorageError
from gradstore.plan.sizes import gigabytes
from gradstore.stages.report.data import (
    UNWEIGHTED,
    Group,
    PrecisionRow,
    QueryReport,
    RankedExample,
    ReportData,
    TailPatchRow,
    WeightVector,
)
from gradstore.stages.report.page import render_page
from gradstore.stages.report.terminal import render_tables
from gradstore.stages.status import status
from gradstore.store.artifacts import ScoresArtifact, WeightsArtifact
from gradstore.store.features import FeatureSet, FeatureStore

if TYPE_CHECKING:
    from rich.console import RenderableType

# A page of more queries is slow to open; the scores in the store hold them all.
MAX_QUERIES = 100
NOTES = (
    "Positive scores are proponents: training on them would lower the query's loss, by the model's own gradients.",
    "Label precision says whether proponents share the query's topic. Topic is not causal effect, and text search alone "
    "finds topics well.",
    "Tail-patch is causal but small: one optimizer step on a query's proponents, and the change of the query's "
    "log-probability. Weights are better where it is higher, or where LDS is; topic precision decides nothing.",
)


def report(store_url: str, output: Path | None) -> tuple[list[RenderableType], Path]:
    """Write the page of a store; return the tables for a terminal, and where the page is.

    Parameters
    ----------
    store_url
        The store.
    output
        The file to write; for a store in a directory ``report.html`` inside it, else ``<name>-report.html`` here.

    Raises
    ------
    NotReadyError
        If the store holds no finished scores.
    StorageError
        If the page cannot be written.
    """
    store = FeatureStore.open(store_url)
    data = collect(store, status(store_url))
    if output is None:
        local = "://" not in store_url
        output = Path(store_url) / "report.html" if local else Path(f"{data.name}-report.html")
    _write(output, render_page(data))
    return list(render_tables(data)), output


def collect(store: FeatureStore, found: Mapping[str, Any]) -> ReportData:
    """Read what a report shows from the store; ``found`` is its status."""
    rankings = [row for row in found["scores"] if row["committed"] == row["total"]]
    if not rankings:
        raise NotReadyError(f"{store.storage.url}: there are no finished scores. Run `gradstore score` first.")
    # Without weights first: it is what the others are compared with.
    rankings.sort(key=lambda row: (row["weights"] is not None, row["name"]))
    baselines = [row for row in found["baselines"] if row["committed"] == row["total"]]
    rows = [*rankings, *baselines]
    arrays = store.open_set("train").info.arrays
    notes = list(NOTES)
    if store.open_set("eval").info.rows > MAX_QUERIES:
        notes.append(f"The page shows the first {MAX_QUERIES} queries; the store holds the scores of all.")
    return ReportData(
        name=found["name"],
        facts=_facts(store, found, rankings[0]),
        groups=[Group(name=array.name, depth=array.depth, function=array.function) for array in arrays],
        weights=[_weights(store, row["weights"]) for row in rankings if row["weights"] is not None],
        queries=_queries(store, rankings),
        precision=[
            PrecisionRow(method=_title(row), precision=row["precision_at_10"], chance=row["chance"])
            for row in rows
            if row["precision_at_10"] is not None
        ],
        tail_patch=[_tail_patch(row) for row in rows if row["tail_patch"] is not None],
        notes=notes,
    )


def _title(row: Mapping[str, Any]) -> str:
    """What a method is called in a table."""
    if row.get("kernel") is None:
        return "BM25" if row["method"] == "bm25" else str(row["method"])
    return f"{row['kernel']}, {UNWEIGHTED if row['weights'] is None else 'weights ' + row['weights']}"


def _tail_patch(row: Mapping[str, Any]) -> TailPatchRow:
    patch = row["tail_patch"]
    return TailPatchRow(
        method=_title(row), mean=patch["mean"], ci_low=patch["low"], ci_high=patch["high"], queries=patch["queries"]
    )


def _weights(store: FeatureStore, name: str) -> WeightVector:
    return WeightVector(name=name, weights=WeightsArtifact.open(store.storage, name).read()["weight"].to_pylist())


def _facts(store: FeatureStore, found: Mapping[str, Any], ranking: Mapping[str, Any]) -> list[tuple[str, str]]:
    run, contract = store.run, store.contract
    sets = {row["name"]: row for row in found["feature_sets"]}
    train = sets["train"]
    projection = {key: value for key, value in contract["projection"].items() if key != "seed"}
    contributions = next(row for row in found["contributions"] if row["kernel"] == ranking["kernel"])
    facts = [
        ("model", Path(run["model"]["source"]).name or run["model"]["source"]),
        (
            "data",
            ", ".join(
                f"{row['rows']:,} {name}" for name, row in sorted(sets.items(), key=lambda item: -item[1]["rows"])
            ),
        ),
        ("sequence", f"up to {run['data']['train']['length']:,} tokens"),
        ("groups", f"{train['groups']:,} groups, {train['features']:,} features an example"),
        ("projection", _settings(projection)),
        ("kernel", _settings(contributions["kernel_settings"])),
        ("precision", f"{contract['model']['precision']}, features stored in {train['dtype']}"),
        ("seed", str(run["run"]["seed"])),
    ]
    for row in found["weights"]:
        facts.append((f"weights {row['name']}", _settings({k: v for k, v in row["learner"].items() if k != "tile"})))
    patch = ranking["tail_patch"]
    if patch is not None:
        step = f"{patch['optimizer']}, fresh state, learning rate {patch['learning_rate']:g}, {patch['k']} proponents"
        facts.append(("tail-patch step", step))
    facts.append(("store", f"{found['store']}, features {gigabytes(_feature_bytes(store))}"))
    return facts


def _settings(values: Mapping[str, Any]) -> str:
    """``kind`` first, then the other settings: ``block, damping 0.1, mode relative``."""
    rest = [f"{key.replace('_', ' ')} {value}" for key, value in values.items() if key != "kind"]
    return ", ".join([str(values["kind"]), *rest] if "kind" in values else rest)


def _feature_bytes(store: FeatureStore) -> int:
    total = 0
    for name in store.set_names():
        info = store.open_set(name).info
        total += info.rows * sum(array.features for array in info.arrays) * (2 if info.dtype == "float16" else 4)
    return total


def _queries(store: FeatureStore, rankings: Sequence[Mapping[str, Any]]) -> list[QueryReport]:
    train, evaluated = _texts(store.open_set("train")), _texts(store.open_set("eval"))
    shown = min(len(evaluated), MAX_QUERIES)
    by_query: list[dict[str, list[RankedExample]]] = [{} for _ in range(shown)]
    for row in rankings:
        name = row["weights"] or UNWEIGHTED
        for ranked in ScoresArtifact.open(store.storage, row["name"]).read().to_pylist():
            if ranked["query"] < shown:
                example = RankedExample(
                    side=ranked["side"],
                    rank=ranked["rank"],
                    score=ranked["score"],
                    parts=ranked["parts"],
                    **train[ranked["example"]],
                )
                by_query[ranked["query"]].setdefault(name, []).append(example)
    return [
        QueryReport(
            query_id=evaluated[query]["example_id"],
            label=evaluated[query]["label"],
            text=evaluated[query]["text"],
            rankings=by_query[query],
        )
        for query in range(shown)
    ]


def _texts(feature_set: FeatureSet) -> list[dict[str, Any]]:
    """Id, label and text of every example of a set, by row."""
    rows: list[dict[str, Any]] = []
    for block in range(feature_set.info.num_blocks):
        rows += feature_set.read_inputs(block).select(["example_id", "label", "text"]).to_pylist()
    return rows


def _write(path: Path, page: str) -> None:
    """Write the page whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written: {error.strerror}. Choose another place with --output."
        ) from error
