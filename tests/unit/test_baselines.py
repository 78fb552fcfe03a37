from __future__ import annotations

import numpy as np

from gradstore.stages.score.baselines import bm25, bm25_scores, random_rows

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
