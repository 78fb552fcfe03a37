"""What the scores are compared with: BM25 over the texts, and chance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def bm25(
    queries: Sequence[str], documents: Sequence[str], k: int
) -> tuple[Int[np.ndarray, "Q K"], Float[np.ndarray, "Q K"]]:
    """Rows and BM25 scores of the k documents that match each query best (Lucene's variant, English stop words).

    Queries are whole texts, tokenised like the documents. Documents without a single word are all matched equally: by 0.
    """
    import bm25s

    words = bm25s.tokenize(list(documents), stopwords="en", show_progress=False)
    if not any(words.ids):
        shape = len(queries), min(k, len(documents))
        return np.tile(np.arange(shape[1]), (shape[0], 1)), np.zeros(shape)
    index = bm25s.BM25(method="lucene")
    index.index(words, show_progress=False)
    tokens = bm25s.tokenize(list(queries), stopwords="en", show_progress=False)
    found = index.retrieve(tokens, k=min(k, len(documents)), show_progress=False)
    return np.asarray(found.documents, np.int64), np.asarray(found.scores, np.float64)


def random_rows(*, num_queries: int, num_rows: int, k: int, seed: int) -> Int[np.ndarray, "Q K"]:
    """Distinct rows for every query, k each, drawn uniformly."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.choice(num_rows, min(k, num_rows), replace=False) for _ in range(num_queries)])
