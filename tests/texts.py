"""A tokenizer whose tokens can be read: one per character, so that what rows hold is plain to see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradstore.errors import DataError

BEGIN, END = "^", "$"


class CharacterEncoder:
    """Characters as their code points; ``^`` begins a text where special tokens are asked for, and ``$`` ends it."""

    def __init__(self, *, has_end: bool = True) -> None:
        self.has_end = has_end

    def encode(self, texts: Sequence[str], *, special: bool) -> list[np.ndarray]:
        """Return the code points of each text."""
        return [np.array([ord(c) for c in (BEGIN if special else "") + text], np.int32) for text in texts]

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
