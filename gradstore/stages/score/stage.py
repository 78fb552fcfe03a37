"""The stage: rank the train examples of every eval query, without and with weights, and judge the rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gradstore.cluster import Engine
from gradstore.numerics.scores import Ranked
from gradstore.spec import RunSpec
from gradstore.stages.contributions import StoredContributions, valid_rows_of
from gradstore.stages.progress import Progress
from gradstore.stages.score.baselines import baselines_of, rank_by_baselines
from gradstore.stages.score.matrices import write_matrices
from gradstore.stages.score.sources import Method, Ranks, Source, open_source, weighted_methods
from gradstore.stages.score.tail_patch import LOG_PROBABILITIES, tail_patches
from gradstore.store.artifacts import ScoresArtifact
from gradstore.store.features import FeatureSet, FeatureStore

PRECISION_K = 10


def score(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write the rankings that the store does not hold yet, with precision by label and tail-patch of each.

    With score.matrices also all scores of every weighting. Of a damping sweep every kernel has its own.

    Raises
    ------
    NotReadyError
        If contributions or weights are missing.
    ContractError
        If scores of these names were made otherwise.
    """
    store = FeatureStore.open(spec.run.store)
    for swept in spec.sweep():
        _score(swept, store, engine, progress)


def _score(spec: RunSpec, store: FeatureStore, engine: Engine, progress: Progress) -> None:
    """Rank under one kernel of a sweep."""
    train, queries = store.open_set("train"), store.open_set("eval")
    methods = [*weighted_methods(spec), *baselines_of(queries)]
    source = open_source(spec, store)
    # Where scores alone are made, these are what the rankings come from.
    if spec.score.matrices and spec.contribute.mode == "tensor":
        contributions = StoredContributions.open(store, spec.kernel.name, "eval")
        write_matrices(store, contributions, weighted_methods(spec), progress)
    artifacts = {method: _create(spec, store, source, method) for method in methods}
    artifacts = {method: artifact for method, artifact in artifacts.items() if not artifact.is_complete()}
    if not artifacts:
        return
    valid = source.valid_rows(), valid_rows_of(store, "eval")
    keep = min(max(spec.score.k, PRECISION_K), len(valid[0]))
    ranks = source.rank([*artifacts], keep, progress)
    ranks |= rank_by_baselines(store, [*artifacts], valid[0], keep, seed=spec.run.seed)
    patches = {}
    if store.contract["model"]["output"] in LOG_PROBABILITIES:
        patches = _patch(spec, engine, progress, ranks, valid[1][: spec.score.tail_patch.queries].tolist())
    elif spec.score.tail_patch.queries:
        progress.note(f"tail-patch is not measured: {store.contract['model']['output']} is no log-probability")
    labels, query_labels = _labels(train), _labels(queries)
    judged = {int(query): query_labels[query] for query in valid[1]}
    for method, artifact in artifacts.items():
        found = ranks[method]
        summary = {
            "method": method.name,
            "kernel": method.kernel,
            "weights": method.weights,
            "tail_patch": patches.get(method),
            **_precision(found.proponents, labels, judged, among=valid[0]),
        }
        artifact.write(_table(found), summary, facts={"queries": queries.info.rows})


def _create(spec: RunSpec, store: FeatureStore, source: Source, method: Method) -> ScoresArtifact:
    settings: dict[str, Any] = {
        "method": method.name,
        "k": spec.score.k,
        "tail_patch": spec.score.tail_patch.model_dump(),
        "train": store.describe("train"),
        "eval": store.describe("eval"),
    }
    if method.kernel is not None:
        settings |= source.settings(method)
    return ScoresArtifact.create(store.storage, method.artifact, settings=settings)


def _patch(
    spec: RunSpec, engine: Engine, progress: Progress, ranks: Mapping[Method, Ranks], queries: Sequence[int]
) -> dict[Method, dict[str, Any]]:
    """The tail-patch of each method, of some queries."""
    from gradstore.numerics.metrics import mean_interval

    if not queries:
        return {}
    by_name = {method.artifact: method for method in ranks}
    rows = {method.artifact: found.proponents.rows.tolist() for method, found in ranks.items()}
    measured = {}
    for name, changes in tail_patches(spec, engine, progress, rows, queries).items():
        interval = mean_interval(changes, seed=spec.run.seed)
        measured[by_name[name]] = {
            **spec.score.tail_patch.model_dump(),
            "queries": len(changes),
            "rows": [*queries],
            "percent": changes,
            "mean": interval.mean,
            "low": interval.low,
            "high": interval.high,
        }
    return measured


def _precision(
    ranked: Ranked, train_labels: Sequence[str | None], query_labels: Mapping[int, str | None], *, among: np.ndarray
) -> dict[str, Any]:
    """Label precision@10 of those queries that have a label, their mean, and what chance gives; None without labels."""
    from gradstore.numerics.metrics import chance_precision, precision_at_k

    labelled = [(query, label) for query, label in query_labels.items() if label is not None]
    if not labelled or ranked.rows.shape[1] < PRECISION_K:
        return {"precision_at_10": None, "chance": None, "precisions": None}
    precisions = [
        precision_at_k([train_labels[row] for row in ranked.rows[query]], label, k=PRECISION_K)
        for query, label in labelled
    ]
    chance = chance_precision([train_labels[row] for row in among], [label for _, label in labelled])
    return {
        "precision_at_10": float(np.mean(precisions)),
        "chance": chance,
        "precisions": {"rows": [query for query, _ in labelled], "values": precisions},
    }


def _labels(feature_set: FeatureSet) -> list[str | None]:
    return feature_set.read_column("label")


def _table(ranks: Ranks) -> pa.Table:
    """Proponents and opponents as rows: query, rank (from 1), side, example, score, parts."""
    sides = {"proponent": ranks.proponents, "opponent": ranks.opponents}
    tables = []
    for side, ranked in sides.items():
        if ranked is None:
            continue
        queries, kept = ranked.rows.shape
        tables.append(
            pa.table(
                {
                    "query": pa.array(np.repeat(np.arange(queries), kept), pa.int64()),
                    "rank": pa.array(np.tile(np.arange(1, kept + 1), queries), pa.int32()),
                    "side": pa.array([side] * (queries * kept), pa.string()),
                    "example": pa.array(ranked.rows.reshape(-1), pa.int64()),
                    "score": pa.array(ranked.scores.reshape(-1), pa.float64()),
                    "parts": pa.array(list(ranked.parts.reshape(queries * kept, -1)), pa.list_(pa.float32())),
                }
            )
        )
    return pa.concat_tables(tables)
