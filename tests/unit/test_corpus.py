from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.adapters.text.corpus import Corpus, text_digest
from gradstore.adapters.text.records import Document
from gradstore.errors import DataError


def _documents(texts: Sequence[str]) -> list[Document]:
    return [Document(document_id=str(i), text=text, label=None) for i, text in enumerate(texts)]


def _corpus(texts: Sequence[str], *, seed: int = 0, deduplicate: bool = True, shuffle: bool = True) -> Corpus:
    return Corpus(
        source="corpus",
        documents=_documents(texts),
        seed=seed,
        deduplicate=deduplicate,
        shuffle=shuffle,
        counts=Counter(),
    )


def _texts(corpus: Corpus, expected: int | None = None) -> list[str]:
    return [document.text for _, document in corpus.ordered(expected)]


@pytest.mark.parametrize(
    "other", ["the cafe\u0301  sings", " The Café\nsings ", "THE CAFÉ SINGS", "the\u00a0caf\u00e9\t\tsings", "ｔｈｅ café sings"]  # noqa: RUF001
)  # fmt: skip
def test_texts_are_equal_whatever_their_case_spacing_and_unicode_form(other: str) -> None:
    assert text_digest(other, 0) == text_digest("the café sings", 0)


def test_texts_that_read_differently_differ() -> None:
    assert text_digest("the cafe sings", 0) != text_digest("the café sings", 0)
    assert text_digest("no where", 0) != text_digest("nowhere", 0)
    assert text_digest("lone surrogate \ud800", 0) is not None


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_first_of_equal_texts_is_kept_and_the_dropped_are_counted(shuffle: bool) -> None:
    corpus = _corpus(["One", "", "two", "one ", " \n", "TWO", "one"], shuffle=shuffle)

    assert sorted(_texts(corpus)) == ["One", "two"]
    assert corpus.counts == {"documents": 7, "duplicates": 3, "empty": 2}


@pytest.mark.parametrize("shuffle", [False, True])
def test_without_deduplication_only_empty_documents_are_dropped(shuffle: bool) -> None:
    corpus = _corpus(["one", "", "ONE"], shuffle=shuffle, deduplicate=False)

    assert sorted(_texts(corpus)) == ["ONE", "one"]
    assert corpus.counts["duplicates"] == 0


@given(st.permutations([f"text {n}" for n in range(12)]), st.integers(1, 20))
def test_the_shuffled_order_depends_neither_on_the_order_of_files_nor_on_what_is_expected(
    texts: list[str], expected: int
) -> None:
    assert _texts(_corpus(texts), expected) == _texts(_corpus(sorted(texts)), None)


def test_another_seed_gives_another_order_of_the_same_documents() -> None:
    texts = [f"text {n}" for n in range(50)]

    first, second = _texts(_corpus(texts, seed=0)), _texts(_corpus(texts, seed=1))

    assert first != second
    assert sorted(first) == sorted(second) == sorted(texts)
    assert first != texts


def test_unshuffled_documents_stream_in_their_own_order_and_only_as_far_as_they_are_asked_for() -> None:
    corpus = _corpus([f"text {n}" for n in range(100)], shuffle=False)

    stream = corpus.ordered(3)

    assert [next(stream)[1].text for _ in range(3)] == ["text 0", "text 1", "text 2"]
    assert corpus.counts["documents"] == 3


class _Growing:
    """A source that is one document longer, at its beginning, each time it is read."""

    def __init__(self) -> None:
        self.readings = 0

    def __iter__(self) -> Iterator[Document]:
        self.readings += 1
        yield from _documents([f"reading {self.readings}", "a", "b"])


def test_a_source_that_changes_between_two_readings_is_refused() -> None:
    corpus = Corpus(source="corpus", documents=_Growing(), seed=0, deduplicate=True, shuffle=True, counts=Counter())

    with pytest.raises(DataError, match="corpus changed while it was read"):
        list(corpus.ordered(None))
