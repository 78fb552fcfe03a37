"""Evaluate tail-patch: what one optimizer step on a query's proponents does to the query, under every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from gradstore.cluster import Engine, Task
from gradstore.errors import SpecError
from gradstore.spec import RunSpec, content_hash
from gradstore.spec.evaluation import MeasuredTailPatchSection
from gradstore.stages.contributions import valid_rows_of
from gradstore.stages.evaluate.methods import Compared, contenders, described
from gradstore.stages.evaluate.told import compared
from gradstore.stages.progress import Progress
from gradstore.stages.score.sources import Method
from gradstore.stages.score.tail_patch import LOG_PROBABILITIES, patch_query
from gradstore.store.artifacts import EvaluationArtifact, PatchedArtifact
from gradstore.store.codecs import plain
from gradstore.store.features import FeatureStore

MEASURE: Final = "tail_patch"
KEY: Final = "evaluate.tail_patch"
_PERCENT: Final = "percent"
_HASH_DIGITS: Final = 16

# By query, the rows of its proponents under some methods.
_Rankings = dict[int, dict[str, list[int]]]


def evaluate_tail_patch(spec: RunSpec, engine: Engine, progress: Progress) -> dict[str, Any]:
    """Measure the tail-patch of every method, as [evaluate.tail_patch] says; return what it amounts to.

    What becomes of a query is committed as soon as it is known, at ``patched/<query>.<hash>``, and the values of all at
    ``evaluations/tail_patch/<method>``; those that are there are not measured again.

    Raises
    ------
    SpecError
        If there is no [evaluate.tail_patch], or the model's output tells no log-probability.
    NotReadyError
        If contributions or weights are missing.
    DataError
        If a query's relative change has no value.
    ContractError
        If it was measured otherwise.
    """
    section = spec.evaluate.tail_patch
    if section is None:
        raise SpecError(f"{KEY}: is missing; accepted: a table [{KEY}] with k, optimizer and learning_rate.")
    store = FeatureStore.open(spec.run.store)
    if (output := store.contract["model"]["output"]) not in LOG_PROBABILITIES:
        raise SpecError(f"{KEY}: the store's output function is {output}, which tells no log-probability.")
    queries = valid_rows_of(store, "eval")[: section.queries].tolist()
    asked, missing = [], []
    for found in contenders(spec, store, engine, progress):
        artifacts = {method: _create(found, method, section) for method in found.methods}
        asked.append(artifacts)
        missing.append((found, [method for method, artifact in artifacts.items() if not artifact.is_complete()]))
    changes = _measure(spec, store, _rankings(missing, queries, section.k), engine, progress)
    tables = []
    for artifacts in asked:
        for method, artifact in artifacts.items():
            if not artifact.is_complete():
                values = [changes[query][method.artifact] for query in queries]
                table = pa.table({"query": pa.array(queries, pa.int64()), _PERCENT: pa.array(values, pa.float64())})
                artifact.write(table, facts={"queries": len(queries)})
            tables.append((described(method), artifact.read().to_pydict()))
    return {
        "store": spec.run.store,
        "measure": MEASURE,
        **section.model_dump(),
        "queries": len(queries),
        "methods": compared(tables, seed=spec.run.seed),
    }


def _create(found: Compared, method: Method, section: MeasuredTailPatchSection) -> EvaluationArtifact:
    settings = {"measure": MEASURE, "step": section.model_dump(), **found.settings(method)}
    return EvaluationArtifact.create(found.store.storage, MEASURE, method.artifact, settings=settings)


def _rankings(missing: Sequence[tuple[Compared, Sequence[Method]]], queries: Sequence[int], k: int) -> _Rankings:
    """Of every query the rows of its proponents under the methods that are not measured yet."""
    rankings: _Rankings = {query: {} for query in queries}
    for found, methods in missing:
        if not methods:
            continue
        for method, of_method in found.rank(methods, k).items():
            for query in queries:
                rankings[query][method.artifact] = of_method.proponents.rows[query].tolist()
    return rankings


def _measure(
    spec: RunSpec, store: FeatureStore, rankings: _Rankings, engine: Engine, progress: Progress
) -> dict[int, dict[str, float]]:
    """What becomes of every query, by method; as tasks of one query each."""
    section = spec.evaluate.tail_patch
    assert section is not None, "it was refused"
    rankings = {query: of_query for query, of_query in rankings.items() if of_query}
    artifacts = {query: _artifact(spec, store, query, of_query) for query, of_query in rankings.items()}
    tasks = [
        Task(
            name=f"tail-patch-{query:06d}",
            function=patch_and_commit,
            arguments=(spec.run.store, spec.model_dump(), query, rankings[query]),
            resources=spec.cluster.model_resources,
        )
        for query, artifact in artifacts.items()
        if not artifact.is_complete()
    ]
    if tasks:
        done = len(artifacts) - len(tasks)
        with progress.stage("tail-patch", len(artifacts), "queries", done) as advance:
            for _ in engine.run(tasks):
                advance(1)
    found = {}
    for query, artifact in artifacts.items():
        table = artifact.read()
        found[query] = dict(zip(table["method"].to_pylist(), table[_PERCENT].to_pylist(), strict=True))
    return found


def patch_and_commit(
    store_url: str, run: Mapping[str, Any], query: int, proponents: Mapping[str, Sequence[int]]
) -> None:
    """Task: the tail-patch of one eval query under some rankings, committed."""
    spec, store = RunSpec.model_validate(run), FeatureStore.open(store_url)
    section = spec.evaluate.tail_patch
    assert section is not None, "it was refused"
    artifact = _artifact(spec, store, query, proponents)
    if artifact.is_complete():
        return
    changes = patch_query(store_url, run, query, proponents, section.model_dump())
    table = pa.table(
        {"method": pa.array([*changes], pa.string()), _PERCENT: pa.array([*changes.values()], pa.float64())}
    )
    artifact.write(table, facts={"rankings": len(changes)})


def _artifact(
    spec: RunSpec, store: FeatureStore, query: int, proponents: Mapping[str, Sequence[int]]
) -> PatchedArtifact:
    """What is known of a query: an artifact for each choice of settings and proponents, so that none is in another's way."""
    section = spec.evaluate.tail_patch
    assert section is not None, "it was refused"
    settings = plain(
        {
            "query": query,
            "step": section.model_dump(exclude={"queries"}),
            "proponents": {name: [*map(int, np.asarray(rows))] for name, rows in proponents.items()},
            "train": store.describe("train"),
            "eval": store.describe("eval"),
        }
    )
    name = f"{query:06d}.{content_hash(settings)[:_HASH_DIGITS]}"
    return PatchedArtifact.create(store.storage, name, settings=settings)
