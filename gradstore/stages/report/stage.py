"""report: artifacts -> one page and tables. Reads what score left in the store and writes the page beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gradstore.adapters.encoder import OUTPUT as REPRESENTATION
from gradstore.errors import NotReadyError, SpecError
from gradstore.plan.sizes import gigabytes
from gradstore.stages.output import replacing
from gradstore.stages.plots import pictures_of
from gradstore.stages.report.comparison import compare
from gradstore.stages.report.data import (
    Comparison,
    MeasuredRow,
    PrecisionRow,
    ReportData,
    WeightVector,
    groups_of,
)
from gradstore.stages.report.evaluations import measured_tables
from gradstore.stages.report.formatting import sentence
from gradstore.stages.report.page import render_page
from gradstore.stages.report.queries import read_queries
from gradstore.stages.status import status
from gradstore.stages.weights import UNWEIGHTED, read_weights
from gradstore.store.artifacts import ScoresArtifact
from gradstore.store.features import FeatureStore

# A page of more queries is slow to open; the scores in the store hold them all.
MAX_QUERIES = 100
SIGN_NOTE = (
    "Positive scores are proponents: training on them would lower the query's loss, by the model's own gradients."
)
REPRESENTATION_NOTE = (
    "Scores are products of what an encoder makes of texts: similarity, or what it has learned of how training on one text helps "
    "another. No gradient of the attributed model is in them."
)
PRECISION_NOTE = (
    "Label precision says whether proponents share the query's topic. Topic is not causal effect, and text search alone "
    "finds topics well."
)
TAIL_PATCH_NOTE = (
    "Tail-patch is causal but small: one optimizer step on a query's proponents, and the change of the query's "
    "log-probability. Weights are better where it is higher, or where LDS is; topic precision decides nothing."
)


def report(
    store_url: str, output: Path | None, kernel: str | None = None, *, redact: bool = False
) -> tuple[ReportData, Path]:
    """Write the page of a store; return what it shows, and where it is.

    Parameters
    ----------
    store_url
        The store.
    kernel
        The kernel whose rankings are shown; None for the only one.
    output
        The file to write; for a store in a directory ``report.html`` inside it, else ``<name>-report.html`` here.
    redact
        Whether texts of queries and examples are left out; their ids and labels are not.

    Raises
    ------
    NotReadyError
        If the store holds no finished scores.
    StorageError
        If the page cannot be written.
    """
    store = FeatureStore.open(store_url)
    data = collect(store, status(store_url), kernel, redact=redact)
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


def collect(store: FeatureStore, found: Mapping[str, Any], kernel: str | None, *, redact: bool) -> ReportData:
    """Read what a report shows from the store; ``found`` is its status."""
    rankings = rankings_of(found, kernel)
    summary = summarize(store, found, rankings)
    arrays, num_queries = store.open_set("train").info.arrays, store.open_set("eval").info.rows
    notes = [*summary.notes]
    if num_queries > MAX_QUERIES:
        notes.append(f"The page shows the first {MAX_QUERIES} queries; the store holds the scores of all.")
    made_from = ScoresArtifact.open(store.storage, rankings[0]["name"]).settings
    return ReportData(
        name=found["name"],
        facts=_facts(store, found, rankings[0], made_from["contributions"]["kernel"]),
        groups=groups_of(arrays),
        weights=[_weights(store, row["weights"]) for row in rankings if row["weights"] is not None],
        queries=read_queries(store, rankings, range(min(num_queries, MAX_QUERIES)), redact=redact),
        precision=summary.precision,
        tail_patch=summary.tail_patch,
        comparisons=summary.comparisons,
        notes=notes,
        evaluations=measured_tables(store, rankings[0]["kernel"]),
        pictures=lds_pictures(store),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How good the rankings of a kernel are, by what `score` measured: see `ReportData`."""

    precision: Sequence[PrecisionRow]
    tail_patch: Sequence[MeasuredRow]
    comparisons: Sequence[Comparison]
    notes: Sequence[str]


def summarize(store: FeatureStore, found: Mapping[str, Any], rankings: Sequence[Mapping[str, Any]]) -> Summary:
    """Tell how good some rankings and the baselines are; ``found`` is the store's status.

    Raises
    ------
    NotReadyError
        If there are scores alone, without their parts.
    """
    if "score_matrix" in ScoresArtifact.open(store.storage, rankings[0]["name"]).settings:
        raise NotReadyError(
            f"{store.storage.url}: of the kernel {rankings[0]['kernel']} there are scores alone, without the parts that a "
            'report shows. Set contribute.mode = "tensor", then run `gradstore run`.'
        )
    rows = [*rankings, *(row for row in found["baselines"] if row["committed"] == row["total"])]
    precision = [
        PrecisionRow(method=_title(row), precision=row["precision_at_10"], chance=row["chance"])
        for row in rows
        if row["precision_at_10"] is not None
    ]
    tail_patch = [_tail_patch(row) for row in rows if row["tail_patch"] is not None]
    summaries = [ScoresArtifact.open(store.storage, row["name"]).read_summary() for row in rankings]
    represented = store.contract["model"]["output"] == REPRESENTATION
    notes = [REPRESENTATION_NOTE if represented else SIGN_NOTE]
    return Summary(
        precision=precision,
        tail_patch=tail_patch,
        comparisons=compare(summaries, seed=store.run["run"]["seed"]),
        notes=[*notes, *([PRECISION_NOTE] if precision else []), *([TAIL_PATCH_NOTE] if tail_patch else [])],
    )


def rankings_of(found: Mapping[str, Any], kernel: str | None) -> list[Mapping[str, Any]]:
    """Return the finished rankings by a kernel, or the only one, in a store's status: that without weights first.

    Raises
    ------
    NotReadyError
        If there are none.
    SpecError
        If there are none of this kernel, or of several and none is named.
    """
    finished = [row for row in found["scores"] if row["committed"] == row["total"]]
    kernels = sorted({row["kernel"] for row in finished})
    if not finished:
        raise NotReadyError(f"{found['store']}: there are no finished scores. Run `gradstore score` first.")
    if kernel is None and len(kernels) > 1:
        raise SpecError(f"{found['store']}: has scores of the kernels {', '.join(kernels)}. Choose one with --kernel.")
    if kernel is not None and kernel not in kernels:
        raise SpecError(f"--kernel: found {kernel!r}; {found['store']} has scores of: {', '.join(kernels)}.")
    rankings = [row for row in finished if row["kernel"] == (kernel or kernels[0])]
    return sorted(rankings, key=lambda row: (row["weights"] is not None, row["name"]))


def lds_pictures(store: FeatureStore) -> list[tuple[str, bytes]]:
    """Return pictures of LDS, what each shows and a PNG, where it was measured and matplotlib is there; pages draw weights themselves."""
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
            if contract["model"]["adapter"] in ("causal_lm", "text_encoder")
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
