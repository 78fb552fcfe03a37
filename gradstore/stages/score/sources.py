"""Where rankings come from: C, under every weight vector in one read of it; or scores that were made in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from gradstore.numerics.scores import Ranked, Ranking, scores_of, transformed
from gradstore.spec import RunSpec
from gradstore.stages.building import open_contributions
from gradstore.stages.contributions import Contributions, Reads, ScoreMatrix
from gradstore.stages.progress import Progress
from gradstore.stages.weights import UNWEIGHTED, open_weights, read_weights
from gradstore.store.features import FeatureStore

BASELINE: Final = "baseline"
"""Stands for the kernel in names of what has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to rank: a kernel with or without weights, or a baseline (kernel None)."""

    name: str
    kernel: str | None = None
    weights: str | None = None

    @property
    def artifact(self) -> str:
        """Name of its artifact below ``scores``."""
        return f"{self.kernel or BASELINE}.{self.name}"


BM25, RANDOM = Method(name="bm25"), Method(name="random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Proponents of every query, and the opponents where a method has them."""

    proponents: Ranked
    opponents: Ranked | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Scores [q, n] of some queries, from the ``first`` on, and some valid rows of ascending numbers, by several methods.

    ``parts`` are the scores of every group alone, [q, n, M]; None where there are no parts.
    """

    first: int
    rows: np.ndarray
    scores: Mapping[Method, np.ndarray]
    parts: np.ndarray | None = None


class Source(Protocol):
    """What ranks the rows of the train set for every eval query."""

    def settings(self, method: Method) -> dict[str, Any]:
        """What the ranking of a method is made from."""
        ...

    def valid_rows(self) -> np.ndarray:
        """Numbers of the valid rows, ascending."""
        ...

    def rank(self, methods: Sequence[Method], keep: int, progress: Progress) -> dict[Method, Ranks]:
        """Rank by those of the methods that have a kernel, keeping some rows on both sides."""
        ...

    def scan(self, methods: Sequence[Method], progress: Progress, stage: str) -> Iterator[Scored]:
        """Yield pieces of the scores by those of the methods that have a kernel: every valid row of every query once."""
        ...


def weighted_methods(spec: RunSpec) -> list[Method]:
    """Return the rankings by a run's kernel: unweighted, and under the weights that it learns or was given."""
    names = [*(name for _, name in spec.learn_targets()), *spec.score.weights]
    if spec.contribute.mode == "scores":
        names = [] if spec.contribute.weights is None else [spec.contribute.weights]
    kernel = spec.kernel.name
    weighted = [Method(name=name, kernel=kernel, weights=name) for name in dict.fromkeys(names)]
    return [Method(name=UNWEIGHTED, kernel=kernel), *weighted]


def open_source(spec: RunSpec, store: FeatureStore, set_name: str = "eval") -> Source:
    """Open what a run's rankings of a set of queries come from.

    Raises
    ------
    NotReadyError
        If it is not whole, or weights have not been learned.
    ContractError
        If weights are of other groups.
    """
    if spec.contribute.mode == "scores":
        return FromScores(store, weighted_methods(spec), set_name)
    for method in weighted_methods(spec):
        read_weights(store, method.weights)
    return FromContributions(store, open_contributions(spec, store, set_name))


class FromContributions:
    """From C, under every weight vector in one read of it.

    Parameters
    ----------
    store
        Where the weights are.
    contributions
        C.
    """

    def __init__(self, store: FeatureStore, contributions: Contributions) -> None:
        self._store = store
        self._contributions = contributions

    def settings(self, method: Method) -> dict[str, Any]:
        """See `Source`."""
        found: dict[str, Any] = {"contributions": dict(self._contributions.settings)}
        if method.weights is not None:
            found["weights"] = dict(open_weights(self._store, method.weights).settings)
        return found

    def valid_rows(self) -> np.ndarray:
        """See `Source`."""
        return self._contributions.valid_rows()

    def rank(self, methods: Sequence[Method], keep: int, progress: Progress) -> dict[Method, Ranks]:
        """See `Source`."""
        vectors = {method: read_weights(self._store, method.weights) for method in methods if method.kernel is not None}
        if not vectors:
            return {}
        # The pieces of one block are of some queries each, always the same ones.
        rankings: dict[int, dict[Method, Ranking]] = {}
        for first, rows_N, c_QNM in Reads(self._contributions, progress, "score").read():
            if first not in rankings:
                rankings[first] = {method: self._ranking(len(c_QNM), keep) for method in vectors}
            for method, ranking in rankings[first].items():
                ranking.update(c_QNM, vectors[method], rows_N)
        return {
            method: _joined([_both_sides(rankings[first][method]) for first in sorted(rankings)]) for method in vectors
        }

    def scan(self, methods: Sequence[Method], progress: Progress, stage: str) -> Iterator[Scored]:
        """See `Source`; all methods in one read of C."""
        vectors = {method: read_weights(self._store, method.weights) for method in methods if method.kernel is not None}
        transform = self._contributions.settings["transform"]
        for first, rows_N, c_QNM in Reads(self._contributions, progress, stage).read():
            yield Scored(
                first=first,
                rows=rows_N,
                scores={method: scores_of(c_QNM, weights_M, transform) for method, weights_M in vectors.items()},
                parts=transformed(c_QNM, transform),
            )

    def _ranking(self, queries: int, keep: int) -> Ranking:
        groups, transform = len(self._contributions.shape.groups), self._contributions.settings["transform"]
        return Ranking(num_queries=queries, num_groups=groups, k=keep, transform=transform)


class FromScores:
    """From scores, of which there are no parts.

    Parameters
    ----------
    store, methods, set_name
        The store, the methods of which scores were made, and of which queries.
    """

    def __init__(self, store: FeatureStore, methods: Sequence[Method], set_name: str) -> None:
        self._matrices = {method: ScoreMatrix.open(store, method.artifact, set_name) for method in methods}

    def settings(self, method: Method) -> dict[str, Any]:
        """See `Source`."""
        return {"score_matrix": dict(self._matrices[method].artifact.settings)}

    def valid_rows(self) -> np.ndarray:
        """See `Source`."""
        return next(iter(self._matrices.values())).valid_rows()

    def rank(self, methods: Sequence[Method], keep: int, progress: Progress) -> dict[Method, Ranks]:
        """See `Source`."""
        found = {}
        asked = [method for method in methods if method in self._matrices]
        rows = sum(self._matrices[method].artifact.shape.num_examples for method in asked)
        with progress.stage("score", rows, "rows") as advance:
            for method in asked:
                matrix = self._matrices[method]
                shape, transform = matrix.artifact.shape, matrix.artifact.settings["transform"]
                ranking = Ranking(num_queries=shape.queries, num_groups=1, k=keep, transform=transform)
                for rows_N, s_QN in matrix.read_blocks():
                    # Scores are the contributions of one group of weight 1.
                    ranking.update(s_QN[:, :, None], np.ones(1), rows_N)
                    advance(len(rows_N))
                sides = (_without_parts(ranking.proponents()), _without_parts(ranking.opponents()))
                found[method] = Ranks(proponents=sides[0], opponents=sides[1])
        return found

    def scan(self, methods: Sequence[Method], progress: Progress, stage: str) -> Iterator[Scored]:
        """See `Source`."""
        asked = [method for method in methods if method in self._matrices]
        first = self._matrices[asked[0]].artifact
        with progress.stage(stage, first.shape.num_examples, "rows") as advance:
            for blocks in zip(*(self._matrices[method].read_blocks() for method in asked), strict=True):
                rows_N, _ = blocks[0]
                scores = {
                    method: transformed(s_QN.astype(np.float64), self._matrices[method].artifact.settings["transform"])
                    for method, (_, s_QN) in zip(asked, blocks, strict=True)
                }
                yield Scored(first=0, rows=rows_N, scores=scores)
                advance(len(rows_N))


def _both_sides(ranking: Ranking) -> Ranks:
    return Ranks(proponents=ranking.proponents(), opponents=ranking.opponents())


def _without_parts(ranked: Ranked) -> Ranked:
    return Ranked(rows=ranked.rows, scores=ranked.scores, parts=ranked.parts[:, :, :0])


def _joined(tiles: Sequence[Ranks]) -> Ranks:
    def join(ranked: Sequence[Ranked]) -> Ranked:
        return Ranked(
            rows=np.concatenate([part.rows for part in ranked]),
            scores=np.concatenate([part.scores for part in ranked]),
            parts=np.concatenate([part.parts for part in ranked]),
        )

    opponents = [tile.opponents for tile in tiles if tile.opponents is not None]
    return Ranks(proponents=join([tile.proponents for tile in tiles]), opponents=join(opponents))
