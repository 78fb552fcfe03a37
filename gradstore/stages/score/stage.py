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
from gradstore.stages.contributions import Contributions
from gradstore.stages.progress import Progress
from gradstore.stages.score.baselines import bm25, random_rows
from gradstore.stages.score.tail_patch import LOG_PROBABILITIES, tail_patches
from gradstore.store.artifacts import ScoresArtifact, WeightsArtifact
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
    contributions = Contributions.open(store, spec.kernel.name, "eval")
    _weights(store, spec.learn.name)
    train, queries = store.open_set("train"), store.open_set("eval")
    methods = [
        Method(name=UNWEIGHTED, kernel=spec.kernel.name),
        Method(name=spec.learn.name, kernel=spec.kernel.name, weights=spec.learn.name),
        # Images without captions have no words to compare.
        *([Method(name="bm25")] if any(_texts(queries)) else []),
        Method(name="random"),
    ]
    artifacts = {method: _create(spec, store, contributions, method) for method in methods}
    artifacts = {method: artifact for method, artifact in artifacts.items() if not artifact.is_complete()}
    if not artifacts:
        return
    valid = contributions.valid_rows(), _valid_queries(store)
    keep = min(max(spec.score.k, PRECISION_K), len(valid[0]))
    ranks = _rank_by_scores(store, contributions, [*artifacts], keep, progress)
    ranks |= _rank_by_baselines(spec, [*artifacts], (train, valid[0]), queries, keep)
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


def _create(spec: RunSpec, store: FeatureStore, contributions: Contributions, method: Method) -> ScoresArtifact:
    settings: dict[str, Any] = {
        "method": method.name,
        "k": spec.score.k,
        "tail_patch": spec.score.tail_patch.model_dump(),
        "train": store.describe("train"),
        "eval": store.describe("eval"),
    }
    if method.kernel is not None:
        settings["contributions"] = dict(contributions.artifact.settings)
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
    contributions: Contributions,
    methods: Sequence[Method],
    keep: int,
    progress: Progress,
) -> dict[Method, Ranks]:
    """Rank under every weight vector in one read of C."""
    shape = contributions.artifact.shape
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
    contributions: Contributions,
    queries: tuple[int, int],
    vectors: Mapping[Method, np.ndarray],
    keep: int,
    advance: Callable[[int], None],
) -> dict[Method, Ranks]:
    shape = contributions.artifact.shape
    size, groups = queries[1] - queries[0], len(shape.groups)
    rankings = {method: Ranking(num_queries=size, num_groups=groups, k=keep) for method in vectors}
    buffers = [np.empty((size, shape.block_rows, groups), np.float32) for _ in range(2)]
    for rows_N, c_QNM in contributions.read_blocks(*queries, buffers):
        for method, ranking in rankings.items():
            ranking.update(c_QNM, vectors[method], rows_N)
        advance(len(rows_N))
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
    spec: RunSpec, methods: Sequence[Method], train: tuple[FeatureSet, np.ndarray], queries: FeatureSet, keep: int
) -> dict[Method, Ranks]:
    """Rank the valid rows, the second of ``train``, as the scores do."""
    found = {}
    feature_set, valid = train
    for method in methods:
        if method.name == "bm25" and method.kernel is None:
            texts = _texts(feature_set)
            places, scores = bm25(_texts(queries), [texts[row] for row in valid], keep)
        elif method.name == "random" and method.kernel is None:
            places = random_rows(num_queries=queries.info.rows, num_rows=len(valid), k=keep, seed=spec.run.seed)
            scores = np.zeros(places.shape)
        else:
            continue
        parts = np.empty((*places.shape, 0), np.float32)
        found[method] = Ranks(proponents=Ranked(rows=valid[places], scores=scores, parts=parts))
    return found


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
            "percent": changes,
            "mean": interval.mean,
            "low": interval.low,
            "high": interval.high,
        }
    return measured


def _precision(
    ranked: Ranked, train_labels: Sequence[str | None], query_labels: Mapping[int, str | None], *, among: np.ndarray
) -> dict[str, float | None]:
    """Label precision@10, mean over those queries that have a label, and what chance gives; None without labels."""
    from gradstore.numerics.metrics import chance_precision, precision_at_k

    labelled = [(query, label) for query, label in query_labels.items() if label is not None]
    if not labelled or ranked.rows.shape[1] < PRECISION_K:
        return {"precision_at_10": None, "chance": None}
    precisions = [
        precision_at_k([train_labels[row] for row in ranked.rows[query]], label, k=PRECISION_K)
        for query, label in labelled
    ]
    chance = chance_precision([train_labels[row] for row in among], [label for _, label in labelled])
    return {"precision_at_10": float(np.mean(precisions)), "chance": chance}


def _valid_queries(store: FeatureStore) -> np.ndarray:
    """Numbers of the eval queries that are valid in every member: others are ranked by zeros, and judged by nothing."""
    members = store.open_set("eval").info.members
    return np.flatnonzero(np.logical_and.reduce([store.open_set("eval", member).valid_rows() for member in members]))


def _labels(feature_set: FeatureSet) -> list[str | None]:
    return feature_set.read_column("label")


def _texts(feature_set: FeatureSet) -> list[str]:
    """Texts by row; "" where a row is in a gap or erased."""
    texts = [""] * feature_set.info.rows
    for block in range(feature_set.info.num_blocks):
        found = feature_set.read_inputs(block)["text"].to_pylist()
        texts[slice(*feature_set.info.block_range(block))] = [text or "" for text in found]
    return texts


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
