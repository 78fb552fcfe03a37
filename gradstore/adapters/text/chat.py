"""Chats as their model reads them, and where in them the assistant speaks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from gradstore.adapters.text.encoding import Rendered
from gradstore.adapters.text.records import ASSISTANT, Document
from gradstore.errors import DataError, SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# How templates mark what the assistant says; transformers looks for it with the same expression.
_MARK: Final = re.compile(r"\{\%-?\s*generation\s*-?\%\}")


def render_chat(tokenizer: PreTrainedTokenizerBase, document: Document, key: str, source: str) -> Rendered:
    """Return a chat rendered by the tokenizer's template, and the spans that the template marks as the assistant's.

    Where a template marks nothing, a turn of the assistant is what is rendered with the turn beyond what is rendered
    without it but with the prompt for it, less the whitespace that ends it: with ChatML the reply and ``<|im_end|>``.
    That holds only if the beginning of a chat is rendered alike whatever follows, which is checked.

    Parameters
    ----------
    tokenizer
        Of the model.
    document
        The chat.
    key
        Where run.toml names the chats, for messages: ``data.train``.
    source
        Where the tokenizer is from, for messages.

    Raises
    ------
    SpecError
        If there is no template, or the assistant's turns cannot be told apart.
    DataError
        If the template refuses the chat.
    """
    template = _template(tokenizer, key, source)
    renderer = _Renderer(tokenizer, template, f"{key}.messages: {document.document_id}")
    messages = document.messages()
    if _MARK.search(template):
        return renderer.render(messages, marked=True)
    whole = renderer.render(messages).text
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = renderer.render(messages[:number], prompted=True).text
        through = renderer.render(messages[: number + 1]).text
        if not (whole.startswith(through) and through.startswith(before)):
            raise SpecError(
                f"{key}.messages: the chat template of {source} renders the beginning of {document.document_id} "
                f"differently when more follows, so its message {number} cannot be told apart. Give the tokenizer a "
                "chat template that marks the assistant's turns with {% generation %} and {% endgeneration %}."
            )
        spans.append((len(before), len(through.rstrip())))
    return Rendered(text=whole, spans=tuple(spans))


class _Renderer:
    """A chat template, as transformers renders it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, named: str) -> None:
        self._special = dict(tokenizer.special_tokens_map)
        self._template = template
        self._named = named

    def render(
        self, messages: Sequence[Mapping[str, str]], *, prompted: bool = False, marked: bool = False
    ) -> Rendered:
        # Not tokenizer.apply_chat_template: its mask of tokens runs to the end of the chat where a marked turn ends with
        # a character that no token is of, such as a space with the tokenizers of GPT-2's kind.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self._template,
                add_generation_prompt=prompted,
                return_assistant_tokens_mask=marked,
                **self._special,
            )
        # A template raises what its author liked.
        except Exception as error:
            raise DataError(
                f"{self._named}: the chat template refuses it: {error}. Remove it or mend its turns."
            ) from error
        return Rendered(text=texts[0], spans=tuple(spans[0]) if marked else ())


def _template(tokenizer: PreTrainedTokenizerBase, key: str, source: str) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise SpecError(
            f"{key}.messages: the tokenizer of {source} has no chat template: {error} Name the instruction-tuned model, "
            "or use prompt and completion columns."
        ) from error
