"""The methods that an evaluation compares, and their scores as they stream by: a run's rankings, and what stands beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from gradstore.numerics.generator import derive_key, stretches
from gradstore.spec import RunSpec
from gradstore.stages.progress import Progress
from gradstore.stages.score.baselines import baselines_of, bm25_scores, texts_of
from gradstore.stages.score.sources import BM25, RANDOM, Method, Scored, Source, open_source, weighted_methods
from gradstore.stages.weights import candidate_names
from gradstore.store.features import FeatureStore

_WORDS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """The methods of one kernel, with the baselines beside them, and what their scores come from.

    Attributes
    ----------
    spec, store
        The run, of one kernel of a sweep, and its store.
    source
        Scores by the kernel.
    methods
        Those that have a kernel, then the baselines.
    set_name
        The queries: those of eval, which are reported, or of another set, by which something is chosen.
    """

    spec: RunSpec
    store: FeatureStore
    source: Source
    methods: tuple[Method, ...]
    set_name: str = "eval"

    def settings(self, method: Method) -> dict[str, Any]:
        """What the scores of a method are made from."""
        found = {"train": self.store.describe("train"), self.set_name: self.store.describe(self.set_name)}
        if method.kernel is not None:
            return found | self.source.settings(method)
        return found | ({"seed": self.spec.run.seed} if method == RANDOM else {})

    def scan(self, methods: Sequence[Method], progress: Progress, stage: str) -> Iterator[Scored]:
        """Yield pieces of the scores by some of the methods: every valid row of every query once."""
        by_words = self._by_words() if BM25 in methods else None
        rows = self.source.valid_rows()
        # Where baselines alone are asked for, some kernel gives the pieces.
        of_kernel = [method for method in methods if method.kernel is not None] or [self.methods[0]]
        for piece in self.source.scan(of_kernel, progress, stage):
            scores = {method: piece.scores[method] for method in of_kernel if method in methods}
            queries = range(piece.first, piece.first + len(next(iter(piece.scores.values()))))
            if by_words is not None:
                places = np.searchsorted(rows, piece.rows)
                scores[BM25] = by_words[queries.start : queries.stop, places].astype(np.float64)
            if RANDOM in methods:
                scores[RANDOM] = np.stack([self._random(query, piece.rows) for query in queries])
            yield replace(piece, scores=scores)

    def _by_words(self) -> np.ndarray:
        """BM25 scores [Q, n] of the valid rows."""
        train, queries = self.store.open_set("train"), self.store.open_set("eval")
        texts = texts_of(train)
        return bm25_scores(texts_of(queries), [texts[row] for row in self.source.valid_rows()])

    def _random(self, query: int, rows: np.ndarray) -> np.ndarray:
        """Uniform numbers of a query and some rows, the same in whatever pieces they are asked for."""
        first, last = int(rows[0]) // _WORDS, int(rows[-1]) // _WORDS + 1
        key = derive_key(self.spec.run.seed, "evaluate", f"random {query}")
        (drawn,) = stretches(key, [(first, last)])
        return np.asarray(drawn[rows - first * _WORDS] / 2.0**64)


def contenders(spec: RunSpec, store: FeatureStore) -> Iterator[Compared]:
    """Yield the methods of every kernel of a run, of the eval queries; the baselines belong to the first.

    Raises
    ------
    NotReadyError
        If contributions or weights are missing.
    """
    baselines = baselines_of(store.open_set("eval"))
    for place, swept in enumerate(spec.sweep()):
        methods = (*weighted_methods(swept), *(baselines if place == 0 else ()))
        yield Compared(spec=swept, store=store, source=open_source(swept, store), methods=methods)


def candidates(spec: RunSpec, store: FeatureStore, set_name: str) -> Iterator[Compared]:
    """Yield what may be chosen by the queries of a set: every kernel, without weights, with its own, and with their candidates.

    Raises
    ------
    NotReadyError
        If contributions or weights are missing.
    """
    for swept in spec.sweep():
        methods = weighted_methods(swept)
        others = [
            Method(name=name, kernel=swept.kernel.name, weights=name)
            for method in methods
            if method.weights is not None
            for name in candidate_names(store, method.weights)
        ]
        source = open_source(swept, store, set_name)
        yield Compared(spec=swept, store=store, source=source, methods=(*methods, *others), set_name=set_name)


def described(method: Method) -> Mapping[str, str | None]:
    """Name, kernel and weights of a method, as they are told."""
    return {"method": method.name, "kernel": method.kernel, "weights": method.weights}
