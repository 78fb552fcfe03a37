"""Evaluate lds: how well scores predict what models output that were trained on subsets of the train set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from gradstore.cluster import Engine
from gradstore.errors import DataError
from gradstore.spec import RunSpec
from gradstore.stages.contributions import valid_rows_of
from gradstore.stages.evaluate.methods import Compared, contenders, described
from gradstore.stages.evaluate.retraining import Retrained, retrain, section_of
from gradstore.stages.progress import Progress
from gradstore.stages.score.sources import Method
from gradstore.stages.weights import UNWEIGHTED
from gradstore.store.artifacts import EvaluationArtifact
from gradstore.store.features import FeatureStore

MEASURE: Final = "lds"


def evaluate_lds(spec: RunSpec, engine: Engine, progress: Progress) -> dict[str, Any]:
    """Measure the linear datamodeling score of every method, as [evaluate.lds] says; return what it amounts to.

    Models that were trained are kept at ``retrained/<name>``, and at ``evaluations/lds.<name>.<subsets>x<seeds>/<method>`` the
    correlation of every query and what its scores predicted of every subset, by which means and intervals can be computed again.

    Raises
    ------
    SpecError
        If there is no [evaluate.lds], or no such trainer.
    NotReadyError
        If contributions or weights are missing.
    DataError
        If models that were trained output the same for every query.
    ContractError
        If models of this name were trained otherwise.
    """
    store, section = FeatureStore.open(spec.run.store), section_of(spec)
    # Before hours of training.
    found = [*contenders(spec, store)]
    retrained = retrain(spec, engine, progress)
    actual_SQ = retrained.outputs["eval"]
    queries = valid_rows_of(store, "eval")
    kept = queries[np.ptp(actual_SQ[:, queries], axis=0) > 0]
    if not len(kept):
        raise DataError("evaluate.lds: every model outputs the same for every query; their training changes nothing.")
    told: list[dict[str, Any]] = []
    for of_kernel in found:
        predicted = _predicted(of_kernel, retrained, kept, progress)
        told += _compared(predicted, actual_SQ[:, kept], seed=spec.run.seed)
    return {
        "store": spec.run.store,
        "measure": MEASURE,
        "retrained": section.name,
        "subsets": section.subsets,
        "seeds": section.seeds,
        "share": section.share,
        "queries": len(kept),
        "queries_without": store.open_set("eval").info.num_examples - len(kept),
        "methods": told,
    }


def _predicted(
    found: Compared, retrained: Retrained, queries: np.ndarray, progress: Progress
) -> dict[Method, np.ndarray]:
    """What the scores of each method predict of the queries, [Q, S]; measured where the store does not have it."""
    from gradstore.numerics.metrics import SubsetSums, linear_datamodeling_score

    section = section_of(found.spec)
    measure = f"{MEASURE}.{section.name}.{section.subsets}x{section.seeds}"
    artifacts = {
        method: EvaluationArtifact.create(
            found.store.storage,
            measure,
            method.artifact,
            settings={"measure": MEASURE, "evaluated": section.model_dump(), **found.settings(method)},
        )
        for method in found.methods
    }
    missing = [method for method, artifact in artifacts.items() if not artifact.is_complete()]
    if missing:
        rows = found.store.open_set("eval").info.rows
        sums = {method: SubsetSums(retrained.masks, rows) for method in missing}
        for piece in found.scan(missing, progress, MEASURE):
            for method, of_method in sums.items():
                of_method.add(piece.scores[method], piece.rows, piece.first)
        for method, of_method in sums.items():
            predicted_QS = of_method.total()[queries]
            score = linear_datamodeling_score(predicted_QS, retrained.outputs["eval"][:, queries])
            table = pa.table(
                {
                    "query": pa.array(queries, pa.int64()),
                    "correlation": pa.array(score.correlations, pa.float64()),
                    "predicted": pa.array([*predicted_QS], pa.list_(pa.float64())),
                }
            )
            artifacts[method].write(table, facts={"queries": len(queries)})
    return {method: np.array(artifact.read()["predicted"].to_pylist()) for method, artifact in artifacts.items()}


def _compared(predicted: Mapping[Method, np.ndarray], actual_SQ: np.ndarray, *, seed: int) -> Sequence[dict[str, Any]]:
    from gradstore.numerics.metrics import compare_datamodeling

    named = {method.artifact: of_method for method, of_method in predicted.items()}
    (without,) = (method.artifact for method in predicted if method.name == UNWEIGHTED)
    compared = compare_datamodeling(named, actual_SQ, against=without, seed=seed)
    told = []
    for method in predicted:
        interval, difference = compared[method.artifact]
        measured: dict[str, Any] = interval._asdict()
        if method.weights is not None and difference is not None:
            measured["difference"] = difference._asdict()
        told.append({**described(method), "queries": actual_SQ.shape[1], "measures": {MEASURE: measured}})
    return told
