"""What was measured by `gradstore evaluate`, read from a store: tables of the methods of one kernel and the baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from gradstore.stages.evaluate import ACCURACY, compared, compared_detection, described
from gradstore.stages.report.data import TAIL_PATCH, MeasuredRow, MeasuredTable
from gradstore.stages.report.datamodeling import compared_two_way
from gradstore.stages.score.sources import BASELINE, Method
from gradstore.stages.weights import UNWEIGHTED
from gradstore.store.artifacts import EvaluationArtifact, list_artifacts
from gradstore.store.features import FeatureStore

_HUNDRED: Final = 100.0
_PERCENT: Final = "percent"
_OF_LEARN: Final = ".learn"
_GROUPS: Final = "groups"
_OF_BOTH: Final = " (intervals: of the queries and of the subsets)"
_OF_QUERIES_ALONE: Final = (
    " (intervals: of the queries alone, which are too narrow; the models' outputs are not at hand)"
)
# By what the name of a measure begins with: what it is called, and what it says.
_ABOUT: Final[Mapping[str, tuple[str, str]]] = {
    "lds": (
        "LDS",
        "rank correlation, times 100, of scores with what models output that were trained on subsets",
    ),
    "recall": (
        "Known contributors",
        "where rankings put the train examples that are known to have contributed, times 100",
    ),
    "tail_patch": TAIL_PATCH,
    "mislabel": (
        "Wrong labels",
        "how surely self-influence comes before that of examples whose label is right, times 100",
    ),
}
_ABOUT_ACCURACY: Final = (
    "Subsets in the right order",
    "of every two subsets, how often scores say rightly which of them a query is better off with, times 100: 50 is chance",
)
# Measures that need no name beside that of the evaluation.
_ONLY: Final = (_PERCENT, "correlation", "lds")


def evaluated_kernels(store: FeatureStore) -> list[str]:
    """Return the kernels of whose rankings something was measured."""
    kernels = {_parsed(item.name)[1] for item in list_artifacts(store.storage) if item.kind == "evaluation"}
    return sorted(kernels - {BASELINE})


def measured_tables(store: FeatureStore, kernel: str) -> list[MeasuredTable]:
    """Return what was measured of the rankings of a kernel, and of baselines, a table for each evaluation and measure."""
    seed = int(store.run["run"]["seed"])
    by_evaluation: dict[str, list[tuple[Method, pa.Table]]] = {}
    for item in list_artifacts(store.storage):
        if item.kind != "evaluation" or item.committed < item.total:
            continue
        evaluation, of_kernel, weights = _parsed(item.name)
        # What is chosen by is not what is reported; groups have a picture.
        if evaluation.endswith(_OF_LEARN) or weights == _GROUPS or of_kernel not in (kernel, BASELINE):
            continue
        table = EvaluationArtifact.open(store.storage, *item.name.split("/")).read()
        by_evaluation.setdefault(evaluation, []).append((_method(of_kernel, weights), table))
    return [
        table
        for evaluation, found in sorted(by_evaluation.items())
        for table in _tables(store, evaluation, found, seed)
    ]


def _parsed(name: str) -> tuple[str, str, str]:
    """An evaluation, a kernel or `BASELINE`, and weights or what stands beside, of an artifact's name."""
    evaluation, _, method = name.partition("/")
    kernel, _, weights = method.partition(".")
    return evaluation, kernel, weights


def _method(kernel: str, name: str) -> Method:
    if kernel == BASELINE:
        return Method(name=name)
    return Method(name=name, kernel=kernel, weights=None if name == UNWEIGHTED else name)


def _tables(
    store: FeatureStore, evaluation: str, found: Sequence[tuple[Method, pa.Table]], seed: int
) -> Iterator[MeasuredTable]:
    """Tables of one evaluation: without weights first, baselines last."""
    kind, _, name = evaluation.partition(".")
    (title, about), intervals = _ABOUT[kind], ""
    found = sorted(found, key=lambda item: (item[0].kernel is None, item[0].weights is not None, item[0].name))
    if kind == "mislabel":
        # Baselines may have been measured of other examples, by another kernel's settings.
        looked = found[0][1].select(["example", "wrong"])
        found = [(method, table) for method, table in found if table.select(["example", "wrong"]).equals(looked)]
        told = compared_detection(found, looked["wrong"].to_numpy(), seed=seed)
    else:
        two_way = compared_two_way(store, evaluation, found, seed=seed) if kind == "lds" else None
        told = two_way or compared([(described(method), _values(table)) for method, table in found], seed=seed)
        if kind == "lds":
            intervals = _OF_QUERIES_ALONE if two_way is None else _OF_BOTH
    measures = dict.fromkeys(measure for row in told for measure in row["measures"])
    for measure in measures:
        rows = [row for row in told if measure in row["measures"]]
        factor = 1.0 if measure == _PERCENT else _HUNDRED
        shown, says = title if measure in _ONLY else f"{title}, {measure.replace('_', ' ')}", about
        if measure == ACCURACY:
            shown, says = _ABOUT_ACCURACY
        yield MeasuredTable(
            title=f"{shown} ({name})" if name else shown,
            about=says + intervals,
            rows=[_row(row, row["measures"][measure], factor) for row in rows],
            noun="examples" if kind == "mislabel" else "queries",
        )


def _values(table: pa.Table) -> dict[str, list[Any]]:
    """Columns of numbers; a query of which a method says nothing counts as 0."""
    found = {}
    for name in table.column_names:
        if pa.types.is_integer(table[name].type):
            found[name] = table[name].to_pylist()
        elif pa.types.is_floating(table[name].type):
            found[name] = np.nan_to_num(table[name].to_numpy()).tolist()
    return found


def _row(row: Mapping[str, Any], told: Mapping[str, Any], factor: float) -> MeasuredRow:
    mean, low, high = (factor * told[key] for key in ("mean", "low", "high"))
    difference = told.get("difference")
    return MeasuredRow(
        method="BM25" if row["method"] == "bm25" else row["method"],
        mean=mean,
        ci_low=low,
        ci_high=high,
        queries=row["queries"],
        difference=None
        if difference is None
        else (factor * difference["mean"], factor * difference["low"], factor * difference["high"]),
    )
