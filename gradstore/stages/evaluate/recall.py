"""Evaluate recall: whether rankings find the train examples that are known to have contributed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from gradstore.cluster import Engine
from gradstore.errors import DataError, SpecError
from gradstore.lines import read_rows
from gradstore.spec import RunSpec, content_hash
from gradstore.spec.evaluation import LABEL, RecallSection
from gradstore.stages.contributions import valid_rows_of
from gradstore.stages.evaluate.methods import Compared, contenders, described
from gradstore.stages.evaluate.told import compared
from gradstore.stages.pairs import hash_pairs, read_pairs, rows_of_pairs
from gradstore.stages.progress import Progress
from gradstore.stages.score.sources import Method
from gradstore.store.artifacts import EvaluationArtifact
from gradstore.store.features import FeatureStore

MEASURE: Final = "recall"
_KEY: Final = "evaluate.recall"


def evaluate_recall(spec: RunSpec, engine: Engine, progress: Progress) -> dict[str, Any]:
    """Measure recall@k, precision@k and the reciprocal rank of every method, as [evaluate.recall] says; return what it amounts to.

    Values of every query are kept at ``evaluations/recall/<method>``, or ``recall.<name>``; those that are there are not
    measured again.

    Raises
    ------
    SpecError
        If there is no [evaluate.recall], or no file that it names.
    NotReadyError
        If contributions or weights are missing.
    DataError
        If no query has a known contributor, or pairs name what is not there.
    ContractError
        If recall was measured otherwise.
    """
    section = spec.evaluate.recall
    if section is None:
        raise SpecError(f'{_KEY}: is missing; accepted: a table [{_KEY}] with pairs = "pairs.jsonl" or by = "label".')
    store = FeatureStore.open(spec.run.store)
    wanted, known = _contributors(section, store)
    queries = [query for query in valid_rows_of(store, "eval").tolist() if len(wanted[query])]
    if not queries:
        raise DataError(f"{_KEY}: no eval query has a known contributor among the valid train examples.")
    tables = []
    for found in contenders(spec, store, engine, progress):
        asked = {method: _create(found, method, section, known) for method in found.methods}
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


def _contributors(section: RecallSection, store: FeatureStore) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Valid train rows that are known to have contributed to each eval query, ascending, and where that is known from."""
    if section.pairs is not None:
        pairs = read_pairs(section.pairs, f"{_KEY}.pairs")
        return rows_of_pairs(store, pairs, "eval"), {"pairs": hash_pairs(pairs)}
    if section.by == LABEL:
        values = {name: store.open_set(name).read_column("label") for name in ("train", "eval")}
        return _sharing(store, values, 'found "label"', "Say in [data] which column holds labels, or give pairs."), {
            "by": LABEL
        }
    assert section.by is not None, "one of pairs and by is given"
    rows = read_rows(section.by, f"{_KEY}.by", ("id", "value"), "row")
    of_ids: dict[str | None, str] = {}
    for where, (example_id, value) in rows:
        if of_ids.setdefault(example_id, value) != value:
            raise DataError(f"{where}: id {example_id!r} has the value {value!r}, and {of_ids[example_id]!r} before.")
    values = {name: [*map(of_ids.get, store.open_set(name).read_column("example_id"))] for name in ("train", "eval")}
    return _sharing(store, values, f"found {section.by}", "Its ids are those of examples, in the column id."), {
        "by": content_hash(sorted({*of_ids.items()}, key=str))
    }


def _sharing(
    store: FeatureStore, values: Mapping[str, Sequence[str | None]], found: str, advice: str
) -> list[np.ndarray]:
    """Valid train rows, ascending, that have the value of each eval query.

    Raises
    ------
    DataError
        If no query has a value that a train example has.
    """
    rows: dict[str | None, list[int]] = {}
    for row in valid_rows_of(store, "train").tolist():
        rows.setdefault(values["train"][row], []).append(row)
    shared = [rows.get(value, []) if value is not None else [] for value in values["eval"]]
    if not any(shared):
        raise DataError(f"{_KEY}.by: {found}, and no eval query has a value that a train example has. {advice}")
    return [np.array(of, np.int64) for of in shared]


def _create(found: Compared, method: Method, section: RecallSection, known: Mapping[str, Any]) -> EvaluationArtifact:
    settings = {"measure": MEASURE, "k": [*section.k], "precision": True, **known, **found.settings(method)}
    measure = MEASURE if section.name is None else f"{MEASURE}.{section.name}"
    return EvaluationArtifact.create(found.store.storage, measure, method.artifact, settings=settings)


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
    """Values of the queries, by their rows in the eval set: recall@k and precision@k for every k, and the reciprocal rank."""
    from gradstore.numerics.metrics import precision_of_ranks, recall_at_k, reciprocal_rank

    columns = {f"recall@{k}": [recall_at_k(ranks[query], k=k) for query in queries] for k in ks}
    columns |= {f"precision@{k}": [precision_of_ranks(ranks[query], k=k) for query in queries] for k in ks}
    columns["reciprocal_rank"] = [reciprocal_rank(ranks[query]) for query in queries]
    return pa.table(
        {
            "query": pa.array(queries, pa.int64()),
            **{name: pa.array(values, pa.float64()) for name, values in columns.items()},
        }
    )
