"""From documents to their tokens, and which of these count as predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from gradstore.adapters.text.records import Document, Form

TOKENS: Final = "tokens"
"""The input of a text example: int32 [T]."""

PREDICTED: Final = "predicted"
"""The input of an example of which not every token counts: bool [T], True at those that do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """Tokens int32 [T], and bool [T] which of them count as predicted; None where all do."""

    tokens: np.ndarray
    predicted: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A chat as its model reads it, and the characters [start, stop) of each of the assistant's turns."""

    text: str
    spans: tuple[tuple[int, int], ...]


class TextEncoder(Protocol):
    """Turns texts into tokens and back; see `gradstore.adapters.text.tokenizer`."""

    def encode(self, texts: Sequence[str], *, special: bool) -> list[np.ndarray]:
        """Return the int32 tokens of each text, with the special tokens the model expects around it if asked for."""
        ...

    def locate(self, texts: Sequence[str], *, special: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the tokens of each text as `encode` does, and int [T, 2]: the characters [start, stop) they are of."""
        ...

    def render(self, document: Document, key: str) -> Rendered:
        """Return a chat as its model reads it."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """Return the text that the tokens spell."""
        ...

    def end_token(self, key: str) -> int:
        """Return the token that ends a text."""
        ...


def encode_documents(documents: Sequence[Document], form: Form, encoder: TextEncoder, key: str) -> list[Encoded]:
    """Return the tokens of documents, uncut.

    A prompt and its completion are one text, so that their tokens are those the model would read. A token counts as
    predicted if it holds a character of the completion, or of one of the assistant's turns; so does the end token that
    follows a completion. A chat's template says itself what ends a turn.

    Raises
    ------
    SpecError
        If the tokenizer has no chat template, or not one that lets the assistant's turns be told apart.
    DataError
        If the template refuses a chat, or there is no token that ends a completion.
    """
    match form:
        case "text":
            return [
                Encoded(tokens=tokens) for tokens in encoder.encode([item.text for item in documents], special=True)
            ]
        case "completion":
            end = encoder.end_token(f"{key}.completion")
            spans = [[(turn.start, turn.stop) for turn in item.turns[1:]] for item in documents]
            located = encoder.locate([item.text for item in documents], special=True)
            return [_with_end(_marked(*pair, marks), end) for pair, marks in zip(located, spans, strict=True)]
        case "messages":
            rendered = [encoder.render(item, key) for item in documents]
            # A template writes the special tokens itself.
            located = encoder.locate([item.text for item in rendered], special=False)
            return [_marked(*pair, item.spans) for pair, item in zip(located, rendered, strict=True)]


def _marked(tokens: np.ndarray, places: np.ndarray, spans: Sequence[tuple[int, int]]) -> Encoded:
    predicted = np.zeros(len(tokens), bool)
    # Tokenizers of GPT-2's kind leave the space that begins a token out of its place, so a lone space has no width.
    first, end = np.minimum(places[:, 0], places[:, 1] - 1), places[:, 1]
    for start, stop in spans:
        predicted |= (end > start) & (first < stop)
    return Encoded(tokens=tokens, predicted=predicted)


def _with_end(encoded: Encoded, end: int) -> Encoded:
    assert encoded.predicted is not None, "only completions end with a token of their own"
    tokens, predicted = encoded.tokens, encoded.predicted
    # Some tokenizers end every text themselves.
    if not len(tokens) or tokens[-1] != end:
        tokens, predicted = np.append(tokens, np.int32(end)), np.append(predicted, True)
    predicted[-1] = True
    return Encoded(tokens=tokens, predicted=predicted)
