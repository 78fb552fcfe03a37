from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradstore.adapters.text.encoding import Encoded, encode_documents
from gradstore.adapters.text.records import Document, Form, Turn
from gradstore.adapters.text.tokenizer import TextTokenizer
from gradstore.errors import DataError, SpecError
from tests.models import CHATML, END, MARKED_CHATML, tiny_tokenizer
from tests.texts import CharacterEncoder, spell

SYSTEM, QUESTION, ANSWER, THANKS, WELCOME = (
    ("system", "be brief"),
    ("user", "How many goals?"),
    ("assistant", "The club scored 24."),
    ("user", "é?"),
    ("assistant", "In 1998. \n"),
)


def _document(*turns: tuple[str, str]) -> Document:
    text, placed = "", []
    for role, content in turns:
        placed.append(Turn(role=role, start=len(text), stop=len(text) + len(content)))
        text += content
    return Document(document_id="d0", text=text, label=None, turns=tuple(placed))


def _pair(prompt: str, completion: str) -> Document:
    return _document(("prompt", prompt), ("completion", completion))


def _tokenizer(template: str | None = None, **changes: Any) -> TextTokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return TextTokenizer(tokenizer=tokenizer, source="tiny")


def _encode(tokenizer: TextTokenizer, form: Form, document: Document) -> Encoded:
    (encoded,) = encode_documents([document], form, tokenizer, "data.train")
    return encoded


def _spelled(tokenizer: TextTokenizer, encoded: Encoded) -> tuple[str, str]:
    """All tokens as text, and those that count as predicted."""
    assert encoded.predicted is not None
    assert encoded.predicted.dtype == bool
    decode = tokenizer.tokenizer.decode
    return decode(encoded.tokens.tolist()), decode(encoded.tokens[encoded.predicted].tolist())


def test_texts_have_no_mask() -> None:
    tokenizer = _tokenizer()

    encoded = _encode(tokenizer, "text", Document(document_id="d0", text="The quick brown fox", label=None))

    assert encoded.predicted is None
    assert encoded.tokens.tolist() == tokenizer.tokenizer("The quick brown fox")["input_ids"]


def test_characters_of_a_completion_are_predicted_and_so_is_its_end() -> None:
    (encoded,) = encode_documents([_pair("ab", "cde")], "completion", CharacterEncoder(), "data.train")

    assert spell(encoded.tokens) == "^abcde$"
    assert encoded.predicted is not None
    assert encoded.predicted.tolist() == [False, False, False, True, True, True, True]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("The club", " scored 24 goals."), ("", "She sang."), ("The phone\n", "has two cameras"), ("é", "é")],
)
def test_a_prompt_and_its_completion_are_tokenised_as_one_text(prompt: str, completion: str) -> None:
    tokenizer = _tokenizer()

    encoded = _encode(tokenizer, "completion", _pair(prompt, completion))

    assert encoded.tokens.tolist() == [*tokenizer.tokenizer(prompt + completion)["input_ids"], 0]
    assert _spelled(tokenizer, encoded) == (f"{prompt}{completion}{END}", f"{completion}{END}")


def test_a_token_across_the_boundary_counts_as_predicted() -> None:
    tokenizer = _tokenizer()

    encoded = _encode(tokenizer, "completion", _pair("a t", "he old"))

    # " the" is one token.
    assert _spelled(tokenizer, encoded) == (f"a the old{END}", f" the old{END}")


def test_a_tokenizer_that_ends_texts_itself_ends_a_completion_once() -> None:
    from tokenizers import processors

    tokenizer = _tokenizer()
    tokenizer.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A {END}", special_tokens=[(END, 0)]
    )

    encoded = _encode(tokenizer, "completion", _pair("The club", " scored"))

    assert _spelled(tokenizer, encoded) == (f"{END}The club scored{END}", f" scored{END}")


def test_a_completion_needs_a_token_that_ends_it() -> None:
    with pytest.raises(DataError, match=r"data\.train\.completion: .* tokenizer of tiny has none"):
        _encode(_tokenizer(eos_token=None), "completion", _pair("a", "b"))


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML])
@pytest.mark.parametrize(
    "turns",
    [
        [QUESTION, ANSWER],
        [SYSTEM, QUESTION, ANSWER, THANKS, WELCOME],
        [QUESTION, ANSWER, THANKS],
        [QUESTION, ("user", "And?"), ANSWER, WELCOME],
    ],
)
def test_what_the_assistant_says_is_predicted_with_what_ends_its_turns(
    template: str, turns: list[tuple[str, str]]
) -> None:
    tokenizer = _tokenizer(template)

    encoded = _encode(tokenizer, "messages", _document(*turns))

    text, predicted = _spelled(tokenizer, encoded)
    assert text == "".join(f"<|{role}|>\n{content}{END}\n" for role, content in turns)
    assert encoded.tokens.tolist() == tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert predicted == "".join(content + END for role, content in turns if role == "assistant")


def test_marks_that_end_with_a_space_do_not_reach_into_the_next_turn() -> None:
    from tokenizers import processors

    marked = MARKED_CHATML.replace("{% endgeneration %}", "{{ ' ' }}{% endgeneration %}")
    tokenizer = _tokenizer(marked)
    # As GPT-2's: the place of a token that is a space has no width.
    tokenizer.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)

    encoded = _encode(tokenizer, "messages", _document(QUESTION, ANSWER, THANKS, WELCOME))

    _, predicted = _spelled(tokenizer, encoded)
    assert predicted == f"{ANSWER[1]}{END} {WELCOME[1]}{END} "


def test_an_unmarked_chat_that_begins_with_the_assistant_is_refused_where_its_template_cannot_begin_so() -> None:
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML

    with pytest.raises(DataError, match=r"data\.train\.messages: d0: the chat template refuses it: user first"):
        _encode(_tokenizer(template), "messages", _document(ANSWER))
    assert (
        _spelled(_tokenizer(CHATML), _encode(_tokenizer(CHATML), "messages", _document(ANSWER)))[1] == ANSWER[1] + END
    )


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_it_marks_them() -> None:
    # As templates do that drop the reasoning of all turns but the last.
    template = CHATML.replace("message['content'] +", "(message['content'] if loop.last else '...') +")

    with pytest.raises(SpecError, match=r"the beginning of d0 differently when more follows, so its message 1 .*mark"):
        _encode(_tokenizer(template), "messages", _document(QUESTION, ANSWER, THANKS, WELCOME))


def test_chats_need_a_template() -> None:
    with pytest.raises(SpecError, match=r"data\.train\.messages: the tokenizer of tiny has no chat template"):
        _encode(_tokenizer(), "messages", _document(QUESTION, ANSWER))


def test_many_documents_are_encoded_as_each_alone() -> None:
    tokenizer = _tokenizer(CHATML)
    pairs = [_pair("The club", " scored"), _pair("She", " sang the old song")]

    together = encode_documents(pairs, "completion", tokenizer, "data.train")

    for pair, encoded in zip(pairs, together, strict=True):
        alone = _encode(tokenizer, "completion", pair)
        np.testing.assert_array_equal(encoded.tokens, alone.tokens)
        np.testing.assert_array_equal(encoded.predicted, alone.predicted)
