"""Evaluate recall: whether rankings find the train examples that are known to have contributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gradstore.cluster import Engine
from gradstore.errors import DataError, SpecError
from gradstore.spec import RunSpec
from gradstore.stages.contributions import valid_rows_of
from gradstore.stages.evaluate.methods import Compared, contenders, described
from gradstore.stages.evaluate.told import compared
from gradstore.stages.pairs import hash_pairs, read_pairs, rows_of_pairs
from gradstore.stages.progress import Progress
from gradstore.stages.score.sources import Method
from gradstore.store.artifacts import EvaluationArtifact
from gradstore.store.features import FeatureStore

MEASURE = "recall"


def evaluate_recall(spec: RunSpec, engine: Engine, progress: Progress) -> dict[str, Any]:
    """Measure recall@k and the reciprocal rank of every method, as [evaluate.recall] says; return what it amounts to.

    Values of every query are kept at ``evaluations/recall/<method>``; those that are there are not measured again.

    Raises
    ------
    SpecError
        If there is no [evaluate.recall].
    NotReadyError
        If contributions or weights are missing.
    DataError
        If no query has a known contributor, or pairs name what is not there.
    ContractError
        If recall was measured otherwise.
    """
    section = spec.evaluate.recall
    if section is None:
        raise SpecError(
            'evaluate.recall: is missing; accepted: a table [evaluate.recall] with pairs = "pairs.jsonl" or by = "label".'
        )
    store = FeatureStore.open(spec.run.store)
    wanted, known = _contributors(spec, store)
    queries = [query for query in valid_rows_of(store, "eval").tolist() if len(wanted[query])]
    if not queries:
        raise DataError("evaluate.recall: no eval query has a known contributor among the valid train examples.")
    tables = []
    for found in contenders(spec, store, engine, progress):
        asked = {method: _create(found, method, known, section.k) for method in found.methods}
        missing = [method for method, artifact in asked.items() if not artifact.is_complete()]
        if missing:
            for method, ranks in _ranks(found, missing, wanted).items():
                table = _table(queries, ranks, section.k)
                asked[method].write(table, facts={"queries": len(queries)})
        tables += [(described(method), artifact.read().to_pydict()) for method, artifact in asked.items()]
    contributors = int(np.median([len(wanted[query]) for query in queries]))
    return {
        "store": spec.run.store,
        "measure": MEASURE,
        "queries": len(queries),
        "queries_without": len(wanted) - len(queries),
        "contributors": contributors,
        "methods": compared(tables, seed=spec.run.seed),
    }


def _contributors(spec: RunSpec, store: FeatureStore) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Valid train rows that are known to have contributed to each eval query, ascending, and where that is known from."""
    section = spec.evaluate.recall
    assert section is not None, "it was refused"
    if section.pairs is not None:
        pairs = read_pairs(section.pairs, "evaluate.recall.pairs")
        return rows_of_pairs(store, pairs, "eval"), {"pairs": hash_pairs(pairs)}
    labels = store.open_set("train").read_column("label")
    rows: dict[str, list[int]] = {}
    for row in valid_rows_of(store, "train").tolist():
        rows.setdefault(labels[row], []).append(row)
    of_queries = store.open_set("eval").read_column("label")
    if not any(label in rows for label in of_queries if label is not None):
        raise DataError(
            'evaluate.recall.by: found "label", and no eval query has a label that a train example has. Say in [data] which '
            "column holds labels, or give pairs."
        )
    found = [rows.get(label, []) if label is not None else [] for label in of_queries]
    return [np.array(of, np.int64) for of in found], {"by": "label"}


def _create(found: Compared, method: Method, known: Mapping[str, Any], ks: Sequence[int]) -> EvaluationArtifact:
    settings = {"measure": MEASURE, "k": [*ks], **known, **found.settings(method)}
    return EvaluationArtifact.create(found.store.storage, MEASURE, method.artifact, settings=settings)


def _ranks(found: Compared, methods: Sequence[Method], wanted: Sequence[np.ndarray]) -> dict[Method, list[np.ndarray]]:
    """Ranks of the contributors of each query under some methods, in two reads of the scores."""
    from gradstore.numerics.metrics import RankSearch

    searches = {method: RankSearch(wanted) for method in methods}
    for piece in found.scan(methods, MEASURE):
        for method, scores in piece.scores.items():
            searches[method].find(scores, piece.rows, piece.first)
    for piece in found.scan(methods, MEASURE):
        for method, scores in piece.scores.items():
            searches[method].count(scores, piece.rows, piece.first)
    return {method: search.ranks() for method, search in searches.items()}


def _table(queries: Sequence[int], ranks: Sequence[np.ndarray], ks: Sequence[int]) -> pa.Table:
    """Values of the queries, by their rows in the eval set: recall@k for every k, and the reciprocal rank."""
    from gradstore.numerics.metrics import recall_at_k, reciprocal_rank

    recalls = {f"recall@{k}": [recall_at_k(ranks[query], k=k) for query in queries] for k in ks}
    return pa.table(
        {
            "query": pa.array(queries, pa.int64()),
            **{name: pa.array(values, pa.float64()) for name, values in recalls.items()},
            "reciprocal_rank": pa.array([reciprocal_rank(ranks[query]) for query in queries], pa.float64()),
        }
    )
