"""Where rankings come from: C, under every weight vector in one read; or scores that were made in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gradstore.numerics.scores import Ranked, Ranking
from gradstore.spec import RunSpec
from gradstore.stages.contributions import Contributions, ScoreMatrix
from gradstore.stages.progress import Progress
from gradstore.stages.weights import UNWEIGHTED, open_weights, read_weights
from gradstore.store.features import FeatureStore


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


def weighted_methods(spec: RunSpec) -> list[Method]:
    """Return the rankings by a run's kernel: unweighted, and under the weights that it learns or was given."""
    names = [*(name for _, name in spec.learn_targets()), *spec.score.weights]
    if spec.contribute.mode == "scores":
        names = [] if spec.contribute.weights is None else [spec.contribute.weights]
    kernel = spec.kernel.name
    weighted = [Method(name=name, kernel=kernel, weights=name) for name in dict.fromkeys(names)]
    return [Method(name=UNWEIGHTED, kernel=kernel), *weighted]


def open_source(spec: RunSpec, store: FeatureStore) -> Source:
    """Open what a run's rankings come from.

    Raises
    ------
    NotReadyError
        If it is not whole, or weights have not been learned.
    ContractError
        If weights are of other groups.
    """
    if spec.contribute.mode == "scores":
        return FromScores(store, weighted_methods(spec))
    for method in weighted_methods(spec):
        read_weights(store, method.weights)
    return FromContributions(store, Contributions.open(store, spec.kernel.name, "eval"))


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
        self._transform = contributions.artifact.settings["transform"]

    def settings(self, method: Method) -> dict[str, Any]:
        """See `Source`."""
        found: dict[str, Any] = {"contributions": dict(self._contributions.artifact.settings)}
        if method.weights is not None:
            found["weights"] = dict(open_weights(self._store, method.weights).settings)
        return found

    def valid_rows(self) -> np.ndarray:
        """See `Source`."""
        return self._contributions.valid_rows()

    def rank(self, methods: Sequence[Method], keep: int, progress: Progress) -> dict[Method, Ranks]:
        """See `Source`."""
        shape = self._contributions.artifact.shape
        vectors = {method: read_weights(self._store, method.weights) for method in methods if method.kernel is not None}
        if not vectors:
            return {}
        parts: dict[Method, list[Ranks]] = {method: [] for method in vectors}
        with progress.stage("score", shape.num_tiles * shape.rows, "rows") as advance:
            for first in range(0, shape.queries, shape.query_tile):
                last = min(first + shape.query_tile, shape.queries)
                for method, ranks in self._rank_tile((first, last), vectors, keep, advance).items():
                    parts[method].append(ranks)
        return {method: _joined(tiles) for method, tiles in parts.items()}

    def _rank_tile(
        self,
        queries: tuple[int, int],
        vectors: Mapping[Method, np.ndarray],
        keep: int,
        advance: Callable[[int], None],
    ) -> dict[Method, Ranks]:
        shape = self._contributions.artifact.shape
        size, groups = queries[1] - queries[0], len(shape.groups)
        rankings = {
            method: Ranking(num_queries=size, num_groups=groups, k=keep, transform=self._transform)
            for method in vectors
        }
        buffers = [np.empty((size, shape.block_rows, groups), np.float32) for _ in range(2)]
        for rows_N, c_QNM in self._contributions.read_blocks(*queries, buffers):
            for method, ranking in rankings.items():
                ranking.update(c_QNM, vectors[method], rows_N)
            advance(len(rows_N))
        return {
            method: Ranks(proponents=ranking.proponents(), opponents=ranking.opponents())
            for method, ranking in rankings.items()
        }


class FromScores:
    """From scores, of which there are no parts.

    Parameters
    ----------
    store, methods
        The store, and the methods of which scores were made.
    """

    def __init__(self, store: FeatureStore, methods: Sequence[Method]) -> None:
        self._matrices = {method: ScoreMatrix.open(store, method.artifact, "eval") for method in methods}

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
