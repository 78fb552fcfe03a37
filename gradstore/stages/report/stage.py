"""report: artifacts -> one page and tables. Reads what score left in the store and writes the page beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyarrow import compute

from gradstore.errors import NotReadyError, SpecError
from gradstore.plan.sizes import gigabytes
from gradstore.stages.output import replacing
from gradstore.stages.plots import pictures_of
from gradstore.stages.report.comparison import compare
from gradstore.stages.report.data import (
    Group,
    MeasuredRow,
    PrecisionRow,
    QueryReport,
    RankedExample,
    ReportData,
    WeightVector,
)
from gradstore.stages.report.evaluations import measured_tables
from gradstore.stages.report.formatting import sentence
from gradstore.stages.report.page import render_page
from gradstore.stages.status import status
from gradstore.stages.weights import UNWEIGHTED, read_weights
from gradstore.store.artifacts import ScoresArtifact
from gradstore.store.features import FeatureSet, FeatureStore

# What is shown in the place of an example that was erased since it was ranked.
_ERASED: Mapping[str, Any] = {"example_id": "(erased)", "label": None, "text": ""}
# A page of more queries is slow to open; the scores in the store hold them all.
MAX_QUERIES = 100
SIGN_NOTE = (
    "Positive scores are proponents: training on them would lower the query's loss, by the model's own gradients."
)
PRECISION_NOTE = (
    "Label precision says whether proponents share the query's topic. Topic is not causal effect, and text search alone "
    "finds topics well."
)
TAIL_PATCH_NOTE = (
    "Tail-patch is causal but small: one optimizer step on a query's proponents, and the change of the query's "
    "log-probability. Weights are better where it is higher, or where LDS is; topic precision decides nothing."
)


def report(store_url: str, output: Path | None, kernel: str | None = None) -> tuple[ReportData, Path]:
    """Write the page of a store; return what it shows, and where it is.

    Parameters
    ----------
    store_url
        The store.
    kernel
        The kernel whose rankings are shown; None for the only one.
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
    data = collect(store, status(store_url), kernel)
    if output is None:
        local = "://" not in store_url
        output = Path(store_url) / "report.html" if local else Path(f"{data.name}-report.html")
    with replacing(output) as temporary:
        temporary.write_text(render_page(data), encoding="utf-8")
    return data, output


def as_values(data: ReportData) -> dict[str, Any]:
    """Plain values of a report, but for its queries: what was measured, what that says of the weights, and these."""
    groups = [group.name for group in data.groups]
    return {
        "name": data.name,
        "facts": dict(data.facts),
        "precision": [asdict(row) for row in data.precision],
        "tail_patch": [asdict(row) for row in data.tail_patch],
        "comparisons": [
            {**asdict(comparison), "verdict": comparison.verdict, "says": sentence(comparison)}
            for comparison in data.comparisons
        ],
        "evaluations": [asdict(table) for table in data.evaluations],
        "weights": {vector.name: dict(zip(groups, vector.weights, strict=True)) for vector in data.weights},
        "notes": list(data.notes),
    }


def collect(store: FeatureStore, found: Mapping[str, Any], kernel: str | None) -> ReportData:
    """Read what a report shows from the store; ``found`` is its status."""
    finished = [row for row in found["scores"] if row["committed"] == row["total"]]
    kernels = sorted({row["kernel"] for row in finished})
    if not finished:
        raise NotReadyError(f"{store.storage.url}: there are no finished scores. Run `gradstore score` first.")
    if kernel is None and len(kernels) > 1:
        raise SpecError(
            f"{store.storage.url}: has scores of the kernels {', '.join(kernels)}. Choose one with --kernel."
        )
    if kernel is not None and kernel not in kernels:
        raise SpecError(f"--kernel: found {kernel!r}; {store.storage.url} has scores of: {', '.join(kernels)}.")
    rankings = [row for row in finished if row["kernel"] == (kernel or kernels[0])]
    made_from = ScoresArtifact.open(store.storage, rankings[0]["name"]).settings
    if "score_matrix" in made_from:
        raise NotReadyError(
            f"{store.storage.url}: of the kernel {rankings[0]['kernel']} there are scores alone, without the parts that a "
            'report shows. Set contribute.mode = "tensor", then run `gradstore run`.'
        )
    # Without weights first: it is what the others are compared with.
    rankings.sort(key=lambda row: (row["weights"] is not None, row["name"]))
    baselines = [row for row in found["baselines"] if row["committed"] == row["total"]]
    rows = [*rankings, *baselines]
    arrays = store.open_set("train").info.arrays
    summaries = [ScoresArtifact.open(store.storage, row["name"]).read_summary() for row in rankings]
    precision = [
        PrecisionRow(method=_title(row), precision=row["precision_at_10"], chance=row["chance"])
        for row in rows
        if row["precision_at_10"] is not None
    ]
    tail_patch = [_tail_patch(row) for row in rows if row["tail_patch"] is not None]
    notes = [SIGN_NOTE, *([PRECISION_NOTE] if precision else []), *([TAIL_PATCH_NOTE] if tail_patch else [])]
    if store.open_set("eval").info.rows > MAX_QUERIES:
        notes.append(f"The page shows the first {MAX_QUERIES} queries; the store holds the scores of all.")
    return ReportData(
        name=found["name"],
        facts=_facts(store, found, rankings[0], made_from["contributions"]["kernel"]),
        groups=[Group(name=array.name, depth=array.depth, function=array.function) for array in arrays],
        weights=[_weights(store, row["weights"]) for row in rankings if row["weights"] is not None],
        queries=_queries(store, rankings),
        precision=precision,
        tail_patch=tail_patch,
        comparisons=compare(summaries, seed=store.run["run"]["seed"]),
        notes=notes,
        evaluations=measured_tables(store, rankings[0]["kernel"]),
        pictures=_pictures(store),
    )


def _pictures(store: FeatureStore) -> list[tuple[str, bytes]]:
    """Pictures of LDS, where it was measured and matplotlib is there; the page draws weights itself."""
    if find_spec("matplotlib") is None:
        return []
    return [(picture.text, picture.png) for picture in pictures_of(store) if picture.name.startswith("lds")]


def _title(row: Mapping[str, Any]) -> str:
    """What a method is called in a table."""
    if row.get("kernel") is None:
        return "BM25" if row["method"] == "bm25" else str(row["method"])
    return f"{row['kernel']}, {UNWEIGHTED if row['weights'] is None else 'weights ' + row['weights']}"


def _tail_patch(row: Mapping[str, Any]) -> MeasuredRow:
    patch = row["tail_patch"]
    return MeasuredRow(
        method=_title(row), mean=patch["mean"], ci_low=patch["low"], ci_high=patch["high"], queries=patch["queries"]
    )


def _weights(store: FeatureStore, name: str) -> WeightVector:
    return WeightVector(name=name, weights=read_weights(store, name).tolist())


def _facts(
    store: FeatureStore, found: Mapping[str, Any], ranking: Mapping[str, Any], kernel: Mapping[str, Any]
) -> list[tuple[str, str]]:
    run, contract = store.run, store.contract
    sets = {row["name"]: row for row in found["feature_sets"]}
    train = sets["train"]
    projection = {key: value for key, value in contract["projection"].items() if key != "seed"}
    facts = [
        ("model", Path(run["model"]["source"]).name or run["model"]["source"]),
        (
            "data",
            ", ".join(
                f"{row['rows']:,} {name}" for name, row in sorted(sets.items(), key=lambda item: -item[1]["rows"])
            ),
        ),
        *(
            [("sequence", f"up to {run['data']['train']['length']:,} tokens")]
            if contract["model"]["adapter"] == "causal_lm"
            else []
        ),
        ("groups", f"{train['groups']:,} groups, {train['features']:,} features an example"),
        ("projection", _settings(projection)),
        ("kernel", _settings(kernel)),
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
        total += info.num_examples * info.row_bytes
    return total


def _queries(store: FeatureStore, rankings: Sequence[Mapping[str, Any]]) -> list[QueryReport]:
    """The first queries, each with its ranked examples; nothing is held of the rows and queries that are not shown."""
    evaluated = store.open_set("eval")
    shown = range(min(evaluated.info.rows, MAX_QUERIES))
    tables = {}
    for row in rankings:
        table = ScoresArtifact.open(store.storage, row["name"]).read()
        tables[row["weights"] or UNWEIGHTED] = table.filter(compute.less(table["query"], len(shown))).to_pylist()
    texts = _texts(store.open_set("train"), {row["example"] for rows in tables.values() for row in rows})
    by_query: list[dict[str, list[RankedExample]]] = [{name: [] for name in tables} for _ in shown]
    for name, rows in tables.items():
        for row in rows:
            side, rank, score, parts = (row[key] for key in ("side", "rank", "score", "parts"))
            ranked = RankedExample(side=side, rank=rank, score=score, parts=parts, **texts[row["example"]])
            by_query[row["query"]][name].append(ranked)
    queries = _texts(evaluated, set(shown))
    return [
        QueryReport(
            query_id=queries[query]["example_id"],
            label=queries[query]["label"],
            text=queries[query]["text"],
            rankings=by_query[query],
        )
        for query in shown
        # A row of a gap is no query.
        if query in queries
    ]


def _texts(feature_set: FeatureSet, rows: Collection[int]) -> dict[int, Mapping[str, Any]]:
    """Id, label and text of some examples of a set, by row."""
    found: dict[int, Mapping[str, Any]] = {}
    for block in sorted({row // feature_set.info.block_rows for row in rows}):
        start, _ = feature_set.info.block_range(block)
        table = feature_set.read_inputs(block).select(["example_id", "label", "text"])
        for index, row in enumerate(table.to_pylist()):
            if start + index in rows:
                found[start + index] = row if row["example_id"] is not None else _ERASED
    return found
