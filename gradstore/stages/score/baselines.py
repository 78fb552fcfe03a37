"""What the scores are compared with: BM25 and TF-IDF over the texts, and chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from jaxtyping import Float, Int

from gradstore.errors import SpecError
from gradstore.numerics.scores import Ranked
from gradstore.stages.score.sources import BM25, RANDOM, Method, Ranks
from gradstore.store.features import FeatureSet, FeatureStore

TFIDF: Final = Method(name="tfidf")
"""Only where evaluate.baselines names it."""


def texts_of(feature_set: FeatureSet) -> list[str]:
    """Texts by row; "" where a row is in a gap or erased."""
    texts = [""] * feature_set.info.rows
    for block in range(feature_set.info.num_blocks):
        found = feature_set.read_inputs(block)["text"].to_pylist()
        texts[slice(*feature_set.info.block_range(block))] = [text or "" for text in found]
    return texts


def baselines_of(queries: FeatureSet) -> tuple[Method, ...]:
    """Return the baselines of some queries: images without captions have no words to compare."""
    return (BM25, RANDOM) if any(texts_of(queries)) else (RANDOM,)


def rank_by_baselines(
    store: FeatureStore, methods: Sequence[Method], rows_N: Int[np.ndarray, " N"], keep: int, *, seed: int
) -> dict[Method, Ranks]:
    """Rank some train rows, the valid ones, by those of the methods that are baselines."""
    found = {}
    for method in methods:
        queries = store.open_set("eval")
        if method == BM25:
            texts = texts_of(store.open_set("train"))
            places, scores = bm25(texts_of(queries), [texts[row] for row in rows_N], keep)
        elif method == RANDOM:
            places = random_rows(num_queries=queries.info.rows, num_rows=len(rows_N), k=keep, seed=seed)
            scores = np.zeros(places.shape)
        else:
            continue
        parts = np.empty((*places.shape, 0), np.float32)
        found[method] = Ranks(proponents=Ranked(rows=rows_N[places], scores=scores, parts=parts))
    return found


def bm25(
    queries: Sequence[str], documents: Sequence[str], k: int
) -> tuple[Int[np.ndarray, "Q K"], Float[np.ndarray, "Q K"]]:
    """Rows and BM25 scores of the k documents that match each query best (Lucene's variant, English stop words).

    Queries are whole texts, tokenised like the documents. Documents without a single word are all matched equally: by 0.
    """
    index = _index(documents)
    if index is None:
        shape = len(queries), min(k, len(documents))
        return np.tile(np.arange(shape[1]), (shape[0], 1)), np.zeros(shape)
    found = index.retrieve(_words(queries), k=min(k, len(documents)), show_progress=False)
    return np.asarray(found.documents, np.int64), np.asarray(found.scores, np.float64)


def bm25_scores(queries: Sequence[str], documents: Sequence[str]) -> Float[np.ndarray, "Q N"]:
    """BM25 scores of all documents for every query, as `bm25` ranks by them."""
    index, scores_QN = _index(documents), np.zeros((len(queries), len(documents)), np.float32)
    if index is not None:
        for query, words in enumerate(_words(queries, ids=False)):
            # Words that no document has match none.
            known = [word for word in words if word in index.vocab_dict]
            if known:
                scores_QN[query] = index.get_scores(known)
    return scores_QN


def _index(documents: Sequence[str]) -> Any:
    """An index of documents; None where none has a word."""
    import bm25s

    words = _words(documents)
    if not any(words.ids):
        return None
    index = bm25s.BM25(method="lucene")
    index.index(words, show_progress=False)
    return index


def _words(texts: Sequence[str], *, ids: bool = True) -> Any:
    import bm25s

    return bm25s.tokenize(list(texts), stopwords="en", return_ids=ids, show_progress=False)


def tfidf_scores(queries: Sequence[str], documents: Sequence[str]) -> Float[np.ndarray, "Q N"]:
    r"""Cosines of the TF-IDF vectors of all documents and every query, as scikit-learn makes them; 0 of a text without words.

    .. math:: x_t(d) = n_t(d) \left(\ln \frac{1 + N}{1 + N_t} + 1\right)

    for n_t(d) times that d has the word t, which N_t of the N documents have. Words are in lower case, of at least two letters or
    digits, and none of the English stop words; those that no document has do not count.

    Raises
    ------
    SpecError
        If scikit-learn is not installed.
    """
    scores_QN = np.zeros((len(queries), len(documents)), np.float32)
    vectorizer = _vectorizer()
    words_of = vectorizer.build_analyzer()
    if any(words_of(text) for text in documents):
        by_word = vectorizer.fit_transform(documents).T.tocsr()
        vectors = vectorizer.transform(queries)
        # A query at a time, as scores that are not zero take more as a sparse matrix than as a dense one.
        for query in range(len(queries)):
            scores_QN[query] = (vectors[query : query + 1] @ by_word).toarray()[0]
    return scores_QN


def require_tfidf() -> None:
    """Refuse TF-IDF where it cannot be made.

    Raises
    ------
    SpecError
        If scikit-learn is not installed.
    """
    _vectorizer()


def _vectorizer() -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ModuleNotFoundError as error:
        raise SpecError(
            "evaluate.baselines: found \"tfidf\", and scikit-learn is not installed here: pip install 'gradstore[baselines]'."
        ) from error
    return TfidfVectorizer(stop_words="english")


def random_rows(*, num_queries: int, num_rows: int, k: int, seed: int) -> Int[np.ndarray, "Q K"]:
    """Distinct rows for every query, k each, drawn uniformly."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.choice(num_rows, min(k, num_rows), replace=False) for _ in range(num_queries)])
