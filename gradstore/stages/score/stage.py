"""The stage: rank the train examples of every eval query, without and with weights, and judge the rankings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from gradstore.cluster import Engine
from gradstore.errors import NotReadyError
from gradstore.numerics.scores import Ranked, Ranking
from gradstore.spec import RunSpec
from gradstore.stages.learn import open_contributions
from gradstore.stages.progress import Progress
from gradstore.stages.score.baselines import bm25, random_rows
from gradstore.stages.score.tail_patch import tail_patches
from gradstore.store.artifacts import ContributionArtifact, ScoresArtifact, WeightsArtifact
from gradstore.store.features import FeatureSet, FeatureStore

UNWEIGHTED = "unweighted"
PRECISION_K = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to rank: a kernel with or without weights, or a baseline (kernel None)."""

    name: str
    kernel: str | None = None
    weights: str | None = None

    @property
    def artifact(self) -> str:
        """Name of its artifact below ``scores``."""
        return f"{self.kernel or 'baseline'}.{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Proponents of every query, and the opponents where a method has them."""

    proponents: Ranked
    opponents: Ranked | None = None


def score(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write the rankings that the store does not hold yet, with precision by label and tail-patch of each.

    Raises
    ------
    NotReadyError
        If contributions or weights are missing.
    ContractError
        If scores of these names were made otherwise.
    """
    store = FeatureStore.open(spec.run.store)
    contributions = open_contributions(store, spec.kernel.name, "eval")
    _weights(store, spec.learn.name)
    methods = [
        Method(name=UNWEIGHTED, kernel=spec.kernel.name),
        Method(name=spec.learn.name, kernel=spec.kernel.name, weights=spec.learn.name),
        Method(name="bm25"),
        Method(name="random"),
    ]
    artifacts = {method: _create(spec, store, contributions, method) for method in methods}
    artifacts = {method: artifact for method, artifact in artifacts.items() if not artifact.is_complete()}
    if not artifacts:
        return
    train, queries = store.open_set("train"), store.open_set("eval")
    keep = min(max(spec.score.k, PRECISION_K), train.info.rows)
    ranks = _rank_by_scores(store, contributions, [*artifacts], keep, progress)
    ranks |= _rank_by_baselines(spec, [*artifacts], train, queries, keep)
    patches = _patch(spec, engine, progress, ranks)
    labels = _labels(train), _labels(queries)
    for method, artifact in artifacts.items():
        found = ranks[method]
        summary = {
            "method": method.name,
            "kernel": method.kernel,
            "weights": method.weights,
            "tail_patch": patches.get(method),
            **_precision(found.proponents, *labels),
        }
        artifact.write(_table(found), summary, facts={"queries": queries.info.rows})


def _create(spec: RunSpec, store: FeatureStore, contributions: ContributionArtifact, method: Method) -> ScoresArtifact:
    settings: dict[str, Any] = {
        "method": method.name,
        "k": spec.score.k,
        "tail_patch": spec.score.tail_patch.model_dump(),
        "train": store.open_set("train").info.data_hash,
        "eval": store.open_set("eval").info.data_hash,
    }
    if method.kernel is not None:
        settings["contributions"] = dict(contributions.settings)
    if method.weights is not None:
        settings["weights"] = dict(_weights(store, method.weights).settings)
    return ScoresArtifact.create(store.storage, method.artifact, settings=settings)


def _weights(store: FeatureStore, name: str) -> WeightsArtifact:
    artifact = WeightsArtifact.open(store.storage, name)
    if not artifact.is_complete():
        raise NotReadyError(f"weights/{name}: not learned to the end. Run `gradstore learn` again.")
    return artifact


def _rank_by_scores(
    store: FeatureStore,
    contributions: ContributionArtifact,
    methods: Sequence[Method],
    keep: int,
    progress: Progress,
) -> dict[Method, Ranks]:
    """Rank under every weight vector in one read of C."""
    shape = contributions.shape
    vectors = {}
    for method in methods:
        if method.weights is not None:
            vectors[method] = np.asarray(_weights(store, method.weights).read()["weight"].to_numpy(), np.float64)
        elif method.kernel is not None:
            vectors[method] = np.full(len(shape.groups), 1 / len(shape.groups))
    if not vectors:
        return {}
    parts: dict[Method, list[Ranks]] = {method: [] for method in vectors}
    with progress.stage("score", shape.num_tiles * shape.rows, "rows") as advance:
        for first in range(0, shape.queries, shape.query_tile):
            last = min(first + shape.query_tile, shape.queries)
            for method, ranks in _rank_tile(contributions, (first, last), vectors, keep, advance).items():
                parts[method].append(ranks)
    return {method: _joined(tiles) for method, tiles in parts.items()}


def _rank_tile(
    contributions: ContributionArtifact,
    queries: tuple[int, int],
    vectors: Mapping[Method, np.ndarray],
    keep: int,
    advance: Callable[[int], None],
) -> dict[Method, Ranks]:
    shape = contributions.shape
    size, groups = queries[1] - queries[0], len(shape.groups)
    rankings = {method: Ranking(num_queries=size, num_groups=groups, k=keep) for method in vectors}
    buffer = np.empty((size, shape.block_rows, groups), np.float32)
    for block, c_QNM in enumerate(contributions.read_blocks(*queries, buffer)):
        start, stop = shape.block_range(block)
        for method, ranking in rankings.items():
            ranking.update(c_QNM, vectors[method], np.arange(start, stop))
        advance(stop - start)
    return {
        method: Ranks(proponents=ranking.proponents(), opponents=ranking.opponents())
        for method, ranking in rankings.items()
    }


def _joined(tiles: Sequence[Ranks]) -> Ranks:
    def join(ranked: Sequence[Ranked]) -> Ranked:
        return Ranked(
            rows=np.concatenate([part.rows for part in ranked]),
            scores=np.concatenate([part.scores for part in ranked]),
            parts=np.concatenate([part.parts for part in ranked]),
        )

    opponents = [tile.opponents for tile in tiles if tile.opponents is not None]
    return Ranks(proponents=join([tile.proponents for tile in tiles]), opponents=join(opponents))


def _rank_by_baselines(
    spec: RunSpec, methods: Sequence[Method], train: FeatureSet, queries: FeatureSet, keep: int
) -> dict[Method, Ranks]:
    found = {}
    for method in methods:
        if method.name == "bm25" and method.kernel is None:
            rows, scores = bm25(_texts(queries), _texts(train), keep)
        elif method.name == "random" and method.kernel is None:
            rows = random_rows(num_queries=queries.info.rows, num_rows=train.info.rows, k=keep, seed=spec.run.seed)
            scores = np.zeros(rows.shape)
        else:
            continue
        parts = np.empty((*rows.shape, 0), np.float32)
        found[method] = Ranks(proponents=Ranked(rows=rows, scores=scores, parts=parts))
    return found


def _patch(
    spec: RunSpec, engine: Engine, progress: Progress, ranks: Mapping[Method, Ranks]
) -> dict[Method, dict[str, Any]]:
    from gradstore.numerics.metrics import mean_interval

    if spec.score.tail_patch.queries == 0:
        return {}
    by_name = {method.artifact: method for method in ranks}
    rows = {method.artifact: found.proponents.rows.tolist() for method, found in ranks.items()}
    measured = {}
    for name, changes in tail_patches(spec, engine, progress, rows).items():
        interval = mean_interval(changes, seed=spec.run.seed)
        measured[by_name[name]] = {
            **spec.score.tail_patch.model_dump(),
            "queries": len(changes),
            "percent": changes,
            "mean": interval.mean,
            "low": interval.low,
            "high": interval.high,
        }
    return measured


def _precision(
    ranked: Ranked, train_labels: Sequence[str | None], query_labels: Sequence[str | None]
) -> dict[str, float | None]:
    """Label precision@10, mean over the queries that have a label, and what chance gives; None without labels."""
    from gradstore.numerics.metrics import chance_precision, precision_at_k

    labelled = [(query, label) for query, label in enumerate(query_labels) if label is not None]
    if not labelled or ranked.rows.shape[1] < PRECISION_K:
        return {"precision_at_10": None, "chance": None}
    precisions = [
        precision_at_k([train_labels[row] for row in ranked.rows[query]], label, k=PRECISION_K)
        for query, label in labelled
    ]
    chance = chance_precision(train_labels, [label for _, label in labelled])
    return {"precision_at_10": float(np.mean(precisions)), "chance": chance}


def _labels(feature_set: FeatureSet) -> list[str | None]:
    labels: list[str | None] = feature_set.read_examples(["label"])["label"].to_pylist()
    return labels


def _texts(feature_set: FeatureSet) -> list[str]:
    blocks = range(feature_set.info.num_blocks)
    return [text for block in blocks for text in feature_set.read_inputs(block)["text"].to_pylist()]


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
