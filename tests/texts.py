"""A tokenizer whose tokens can be read: one per character, so that what rows hold is plain to see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradstore.adapters.text.encoding import Rendered
from gradstore.adapters.text.generation import Generation
from gradstore.adapters.text.records import ASSISTANT, Document
from gradstore.errors import DataError

BEGIN, END = "^", "$"


class CharacterEncoder:
    """Characters as their code points; ``^`` begins a text where special tokens are asked for, and ``$`` ends it."""

    def __init__(self, *, has_end: bool = True) -> None:
        self.has_end = has_end

    def encode(self, texts: Sequence[str], *, special: bool) -> list[np.ndarray]:
        """Return the code points of each text."""
        return [np.array([ord(c) for c in (BEGIN if special else "") + text], np.int32) for text in texts]

    def locate(self, texts: Sequence[str], *, special: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the code points of each text, and where it has them."""
        located = []
        for text, tokens in zip(texts, self.encode(texts, special=special), strict=True):
            added = len(tokens) - len(text)
            places = [(0, 0)] * added + [(place, place + 1) for place in range(len(text))]
            located.append((tokens, np.array(places, np.int64).reshape(-1, 2)))
        return located

    def render(self, document: Document, key: str) -> Rendered:
        """Return ``<u>question<a>answer`` with the answers marked."""
        text, spans = "", []
        for message in document.messages():
            text += f"<{message['role'][0]}>"
            if message["role"] == ASSISTANT:
                spans.append((len(text), len(text) + len(message["content"])))
            text += message["content"]
        return Rendered(text=text, spans=tuple(spans))

    def decode(self, tokens: np.ndarray) -> str:
        """Return the characters that are no special tokens."""
        return spell(tokens).replace(BEGIN, "").replace(END, "")

    def end_token(self, key: str) -> int:
        """Return ``$``."""
        if not self.has_end:
            raise DataError(f"{key}: no end")
        return ord(END)


def spell(tokens: np.ndarray) -> str:
    """Return all characters of a row."""
    return "".join(map(chr, tokens.tolist()))


class Echo:
    """A writer that counts up from the last token of its prompt, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def write(self, prompt: np.ndarray, generation: Generation, name: str) -> np.ndarray:
        """Return the tokens after the last."""
        self.asked.append((name, spell(prompt)))
        return np.arange(1, generation.new_tokens + 1, dtype=np.int32) + np.int32(prompt[-1])
