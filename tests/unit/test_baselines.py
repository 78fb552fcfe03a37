from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from gradstore.stages.score.baselines import bm25, bm25_scores, random_rows, tfidf_scores

DOCUMENTS = [
    "the cat sat on a mat",
    "stock markets fell in London",
    "the striker scored a late goal",
    "a goal for the cat",
]


def test_bm25_finds_the_document_that_shares_rare_words() -> None:
    rows, scores = bm25(["markets in London", "striker goal"], DOCUMENTS, 2)
    assert rows[0, 0] == 1
    assert rows[1].tolist() == [2, 3]
    assert (np.diff(scores, axis=1) <= 0).all()


def test_bm25_keeps_no_more_rows_than_there_are() -> None:
    rows, _ = bm25(["goal"], DOCUMENTS, 10)
    assert sorted(rows[0].tolist()) == [0, 1, 2, 3]


def test_bm25_of_documents_without_words_matches_all_equally() -> None:
    rows, scores = bm25(["goal", ""], ["", "!", "the"], 2)
    assert rows.tolist() == [[0, 1], [0, 1]]
    assert not scores.any()


def test_bm25_of_a_query_without_words_matches_nothing() -> None:
    rows, scores = bm25(["", "goal"], DOCUMENTS, 2)
    assert not scores[0].any()
    assert set(rows[1].tolist()) == {2, 3}


def test_all_bm25_scores_are_those_that_the_best_are_ranked_by() -> None:
    queries = ["markets in London", "striker goal goal", "", "unheard of", "the cat"]
    rows, scores = bm25(queries, DOCUMENTS, 4)

    found = bm25_scores(queries, DOCUMENTS)

    assert found.shape == (5, 4)
    np.testing.assert_allclose(np.take_along_axis(found, rows, 1), scores, rtol=1e-6)
    assert not bm25_scores(["goal", ""], ["", "!", "the"]).any()


def test_random_rows_are_distinct_and_repeatable() -> None:
    rows = random_rows(num_queries=3, num_rows=20, k=10, seed=4)
    assert all(len(set(row)) == 10 for row in rows.tolist())
    assert (rows == random_rows(num_queries=3, num_rows=20, k=10, seed=4)).all()


def words(text: str) -> list[str]:
    """In lower case, of two letters or digits at least, and no stop words."""
    return [word for word in re.findall(r"\w\w+", text.lower()) if word not in ENGLISH_STOP_WORDS]


def cosines_written_out(queries: list[str], documents: list[str]) -> list[list[float]]:
    """Cosines of TF-IDF vectors word by word, with the inverse document frequencies of the documents."""
    having = Counter(word for document in documents for word in {*words(document)})

    def vector(text: str) -> dict[str, float]:
        counts = Counter(word for word in words(text) if word in having)
        return {
            word: count * (math.log((1 + len(documents)) / (1 + having[word])) + 1) for word, count in counts.items()
        }

    def cosine(one: dict[str, float], other: dict[str, float]) -> float:
        lengths = [math.sqrt(sum(value**2 for value in of.values())) for of in (one, other)]
        product = sum(value * other.get(word, 0.0) for word, value in one.items())
        return product / (lengths[0] * lengths[1]) if all(lengths) else 0.0

    return [[cosine(vector(query), vector(document)) for document in documents] for query in queries]


def test_tfidf_scores_are_cosines_that_are_written_out_word_by_word() -> None:
    documents = [*DOCUMENTS, "Goal! GOAL, goal... 2 of 10 goals", "", "?!", "the", "a mat for every cat of the café"]
    queries = ["markets in London London", "STRIKER goal goal", "", "unheard of", "the", "Café cat 10", documents[4]]

    found = tfidf_scores(queries, documents)

    assert found.shape == (7, 9)
    assert found == pytest.approx(np.array(cosines_written_out(queries, documents)), abs=1e-6)
    assert found[6, 4] == pytest.approx(1)
    assert (found[[0, 1, 5]].max(1) > 0.3).all()


def test_tfidf_of_texts_without_words_is_zero() -> None:
    documents = ["the cat", "", "of the", "x"]

    assert tfidf_scores(["", "of the", "cat"], documents).tolist() == [[0] * 4, [0] * 4, [1, 0, 0, 0]]
    assert tfidf_scores(["cat", ""], ["", "!", "the"]).tolist() == [[0] * 3] * 2
