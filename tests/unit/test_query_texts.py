"""New queries as examples: texts, completions and chats, read and cut as the store's own queries are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gradstore.adapters.text.queries import query_examples
from gradstore.errors import DataError
from gradstore.spec import SplitSection
from gradstore.store.examples import Example, hash_inputs
from tests.texts import CharacterEncoder, spell

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def made(record: Mapping[str, Any], *, truncate: bool = False, **split: Any) -> Example:
    section = SplitSection(source="eval", **{"length": 10, **split})
    (example,) = query_examples([record], split=section, encoder=CharacterEncoder(), truncate=truncate)
    return example


def predicted(example: Example) -> str:
    return spell(example.inputs["tokens"][example.inputs["predicted"]])


def test_a_text_has_the_tokens_that_the_stores_texts_have() -> None:
    example = made({"text": "abc"})
    assert spell(example.inputs["tokens"]) == "^abc"
    assert [*example.inputs] == ["tokens"]
    assert (example.example_id, example.text, example.label, example.size) == ("query-1", "abc", None, 4)
    assert example.content_hash == hash_inputs(example.inputs)
    assert example.inputs["tokens"].dtype == np.int32


def test_a_text_of_joined_documents_is_bare_and_ended() -> None:
    assert spell(made({"text": "abc"}, packing="concatenate").inputs["tokens"]) == "abc$"


def test_of_a_prompt_with_a_completion_the_completion_is_predicted() -> None:
    example = made({"prompt": "ab", "completion": "cd"})
    assert spell(example.inputs["tokens"]) == "^abcd$"
    assert predicted(example) == "cd$"
    assert example.text == "abcd"


def test_of_a_chat_the_replies_are_predicted() -> None:
    example = made({"messages": MESSAGES}, length=20)
    assert spell(example.inputs["tokens"]) == "<u>hi<a>ho"
    assert predicted(example) == "ho"


@pytest.mark.parametrize("packing", ["document", "concatenate"])
def test_any_form_can_be_asked_of_any_store(packing: str) -> None:
    assert predicted(made({"prompt": "ab", "completion": "cd"}, packing=packing)) == "cd$"


def test_columns_may_have_the_names_that_the_split_gives_them() -> None:
    assert made({"body": "abc", "id": 3}, text="body").text == "abc"
    # Of a record that could be read in two ways, the split's own.
    both = {"text": "abc", "question": "ab", "answer": "cd"}
    assert made(both, prompt="question", completion="answer").text == "abcd"
    assert made({"text": "abc", "prompt": "ab"}).text == "abc"


def test_a_query_that_is_longer_than_the_stores_is_refused_with_both_lengths_or_cut_on_demand() -> None:
    with pytest.raises(DataError, match=r"query-1: has 12 tokens; the store's queries have at most 10 .*--truncate"):
        made({"text": "abcdefghijk"})

    example = made({"text": "abcdefghijk"}, truncate=True)

    assert spell(example.inputs["tokens"]) == "^abcdefghi"
    assert example.text == "abcdefghi"


@pytest.mark.parametrize(
    ("record", "match"),
    [
        ({"text": ""}, "query-1: is empty"),
        ({"text": " \n"}, "query-1: is empty"),
        ({"text": None}, "query-1: is empty"),
        ({"text": "a\udcff"}, r"query-1: .* character 1 is '\\udcff', half of a character"),
        ({"prompt": "ab", "completion": ""}, "query-1: is empty, or nothing in it is predicted"),
        ({"messages": MESSAGES[:1]}, "query-1: is empty, or nothing in it is predicted"),
        ({"prompt": "abcdefghijkl", "completion": "m"}, "query-1: none of its first 10 tokens is predicted"),
        ({}, "query-1: found nothing; accepted: text, or prompt and completion, or messages"),
        ({"prompt": "ab"}, "query-1: found 'prompt'; accepted"),
        ({"text": 3}, "query-1.text: 'text' of .* is int, not text"),
    ],
)
def test_a_record_that_is_no_query_is_refused(record: Mapping[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        made(record, truncate=True)


def test_each_of_several_records_is_told_by_its_number() -> None:
    section = SplitSection(source="eval", length=10)
    with pytest.raises(DataError, match="query-2: is empty"):
        query_examples([{"text": "a"}, {"text": ""}], split=section, encoder=CharacterEncoder(), truncate=False)


def test_of_a_text_beside_a_completion_every_token_is_said_to_count() -> None:
    section = SplitSection(source="eval", length=10)
    records = [{"text": "abc"}, {"prompt": "ab", "completion": "cd"}]
    text, completion = query_examples(records, split=section, encoder=CharacterEncoder(), truncate=False)
    assert predicted(text) == "^abc"
    assert predicted(completion) == "cd$"
    assert {*text.inputs} == {*completion.inputs}


def test_a_text_of_one_token_predicts_nothing() -> None:
    section = SplitSection(source="eval", length=10, packing="document")

    class Bare(CharacterEncoder):
        def encode(self, texts: Any, *, special: bool) -> list[np.ndarray]:
            return super().encode(texts, special=False)

    with pytest.raises(DataError, match="query-1: none of its first 1 tokens is predicted"):
        query_examples([{"text": "a"}], split=section, encoder=Bare(), truncate=False)
