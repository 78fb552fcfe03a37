"""The methods that an evaluation compares, and their scores as they stream by: a run's rankings, and what stands beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np

from gradstore.cluster import Engine
from gradstore.numerics.generator import derive_key, stretches
from gradstore.numerics.scores import Ranked
from gradstore.spec import RunSpec
from gradstore.stages.embeddings import embedding_settings, has_embeddings, similarities
from gradstore.stages.evaluate.cosine import COSINE, cosine_source, has_cosine
from gradstore.stages.progress import Progress
from gradstore.stages.score.baselines import (
    TFIDF,
    bm25_scores,
    rank_by_baselines,
    require_tfidf,
    texts_of,
    tfidf_scores,
)
from gradstore.stages.score.sources import (
    BM25,
    RANDOM,
    Method,
    Ranks,
    Scored,
    Source,
    open_source,
    weighted_methods,
)
from gradstore.stages.weights import candidate_names
from gradstore.store.features import FeatureStore

EMBEDDING: Final = Method(name="embedding")
_WORDS: Final = 4


# Without slots: what is made for some baselines is made once.
@dataclass(frozen=True, kw_only=True)
class Compared:
    """The methods of one kernel, with the baselines beside them, and what their scores come from.

    Attributes
    ----------
    spec, store, engine, progress
        The run, of one kernel of a sweep, its store, who computes what baselines need, and who is told.
    source
        Scores by the kernel.
    methods
        Those that have a kernel, then the baselines.
    set_name
        The queries: those of eval, which are reported, or of another set, by which something is chosen.
    """

    spec: RunSpec
    store: FeatureStore
    engine: Engine
    progress: Progress
    source: Source
    methods: tuple[Method, ...]
    set_name: str = "eval"

    def settings(self, method: Method) -> dict[str, Any]:
        """What the scores of a method are made from."""
        found = {"train": self.store.describe("train"), self.set_name: self.store.describe(self.set_name)}
        if method.kernel is not None:
            return found | self.source.settings(method)
        if method == EMBEDDING:
            return found | embedding_settings(self.spec, self.store)
        return found | ({"seed": self.spec.run.seed} if method == RANDOM else {})

    def scan(self, methods: Sequence[Method], stage: str) -> Iterator[Scored]:
        """Yield pieces of the scores by some of the methods, not all in every piece: every valid row of every query once for each."""
        of_kernel = [method for method in methods if method.kernel is not None]
        beside = [method for method in methods if method in (BM25, TFIDF, RANDOM, EMBEDDING)]
        if of_kernel or beside:
            # Where baselines alone are asked for, some kernel gives the pieces.
            for piece in self.source.scan(of_kernel or [self.methods[0]], self.progress, stage):
                scores = {method: piece.scores[method] for method in of_kernel}
                queries = range(piece.first, piece.first + len(next(iter(piece.scores.values()))))
                scores |= {method: self._beside(method, queries, piece.rows) for method in beside}
                yield replace(piece, scores=scores)
        if COSINE in methods:
            with cosine_source(self.spec, self.progress) as source:
                yield from source.scan(self.progress, stage)

    def rank(self, methods: Sequence[Method], keep: int) -> dict[Method, Ranks]:
        """Rank the valid rows by some of the methods, keeping the best of every query."""
        rows_N = self.source.valid_rows()
        keep = min(keep, len(rows_N))
        found = self.source.rank(methods, keep, self.progress)
        found |= rank_by_baselines(self.store, methods, rows_N, keep, seed=self.spec.run.seed)
        if COSINE in methods:
            with cosine_source(self.spec, self.progress) as source:
                found[COSINE] = source.rank(keep, self.progress)
        if EMBEDDING in methods:
            found[EMBEDDING] = _ranks(self._similarities[:, rows_N], rows_N, keep)
        if TFIDF in methods:
            found[TFIDF] = _ranks(self._by_tfidf, rows_N, keep)
        return found

    def _beside(self, method: Method, queries: range, rows: np.ndarray) -> np.ndarray:
        """Scores [q, n] of some queries and rows by a baseline."""
        if method == RANDOM:
            return np.stack([self._random(query, rows) for query in queries])
        some = slice(queries.start, queries.stop)
        if method == EMBEDDING:
            return self._similarities[some, rows].astype(np.float64)
        places = np.searchsorted(self.source.valid_rows(), rows)
        by_words = self._by_tfidf if method == TFIDF else self._by_bm25
        return np.asarray(by_words[some, places].astype(np.float64))

    @cached_property
    def _by_bm25(self) -> np.ndarray:
        """BM25 scores [Q, n] of the valid rows."""
        return bm25_scores(*self._texts())

    @cached_property
    def _by_tfidf(self) -> np.ndarray:
        """Cosines of TF-IDF [Q, n] of the valid rows."""
        return tfidf_scores(*self._texts())

    def _texts(self) -> tuple[list[str], list[str]]:
        """Texts of the queries, and of the valid rows."""
        texts = texts_of(self.store.open_set("train"))
        return texts_of(self.store.open_set("eval")), [texts[row] for row in self.source.valid_rows()]

    @cached_property
    def _similarities(self) -> np.ndarray:
        """Similarities of embeddings [Q, rows]."""
        return similarities(self.spec, self.store, self.engine, self.progress)

    def _random(self, query: int, rows: np.ndarray) -> np.ndarray:
        """Uniform numbers of a query and some rows, the same in whatever pieces they are asked for."""
        first, last = int(rows[0]) // _WORDS, int(rows[-1]) // _WORDS + 1
        key = derive_key(self.spec.run.seed, "evaluate", f"random {query}")
        (drawn,) = stretches(key, [(first, last)])
        return np.asarray(drawn[rows - first * _WORDS] / 2.0**64)


def _ranks(scores_QN: np.ndarray, rows_N: np.ndarray, keep: int) -> Ranks:
    """The best of some rows for every query; of equal ones the first."""
    places = np.argsort(-scores_QN, axis=1, kind="stable")[:, :keep]
    scores = np.take_along_axis(scores_QN, places, 1).astype(np.float64)
    return Ranks(proponents=Ranked(rows=rows_N[places], scores=scores, parts=np.empty((*places.shape, 0), np.float32)))


def contenders(spec: RunSpec, store: FeatureStore, engine: Engine, progress: Progress) -> Iterator[Compared]:
    """Yield the methods of every kernel of a run, of the eval queries; the baselines belong to the first.

    Raises
    ------
    SpecError
        If a baseline that is named needs what is not installed.
    NotReadyError
        If contributions or weights are missing.
    """
    baselines = _baselines(spec, store)
    for place, swept in enumerate(spec.sweep()):
        methods = (*weighted_methods(swept), *(baselines if place == 0 else ()))
        source = open_source(swept, store)
        yield Compared(spec=swept, store=store, engine=engine, progress=progress, source=source, methods=methods)


def _baselines(spec: RunSpec, store: FeatureStore) -> tuple[Method, ...]:
    """Those baselines that the run asks for and its examples have: images have no words, and not every model embeds."""
    if TFIDF.name in spec.evaluate.baselines:
        require_tfidf()
    output, has_texts = store.contract["model"].get("output"), any(texts_of(store.open_set("eval")))
    there_is = {
        BM25: has_texts,
        TFIDF: has_texts,
        EMBEDDING: has_embeddings(spec),
        COSINE: has_cosine(spec, output),
        RANDOM: True,
    }
    return tuple(method for method in there_is if there_is[method] and method.name in spec.evaluate.baselines)


def candidates(
    spec: RunSpec, store: FeatureStore, engine: Engine, progress: Progress, set_name: str
) -> Iterator[Compared]:
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
        yield Compared(
            spec=swept,
            store=store,
            engine=engine,
            progress=progress,
            source=source,
            methods=(*methods, *others),
            set_name=set_name,
        )


def described(method: Method) -> Mapping[str, str | None]:
    """Name, kernel and weights of a method, as they are told."""
    return {"method": method.name, "kernel": method.kernel, "weights": method.weights}
