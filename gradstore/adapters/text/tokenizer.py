"""A transformers tokenizer as the adapters use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from gradstore.adapters.text.chat import render_chat
from gradstore.adapters.text.encoding import Rendered
from gradstore.adapters.text.records import Document
from gradstore.errors import DataError, SpecError
from gradstore.spec import content_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Every kind of text on which tokenizers are known to differ: case, digits, runs of spaces, contractions, accents,
# compatibility forms, other scripts, emoji of several code points, code, control characters.
_PROBE: Final = (
    "Hello hello HELLO, it's the 21st; 1234567.89 isn't 1,234!",
    "  two  spaces\ttabs\r\n\n\nlines \u00a0 ",
    "Grüße, naïve e\u0301 \ufb01 \uff46\uff55\uff4c\uff4c ½ 日本語 русский עברית العربية ไทย 👩‍👩‍👧 🇨🇭",
    "def f(x):\n    return x**2  # <|end|> </s> [SEP]\x00",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTokenizer:
    """Texts to tokens and back; an `adapters.text.encoding.TextEncoder`."""

    tokenizer: PreTrainedTokenizerBase
    source: str

    def encode(self, texts: Sequence[str], *, special: bool) -> list[np.ndarray]:
        """Return the int32 tokens of each text, uncut, with the special tokens the model expects if asked for."""
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.asarray(tokens, np.int32) for tokens in encoded["input_ids"]]

    def locate(self, texts: Sequence[str], *, special: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the tokens of each text, and the characters [start, stop) they are of: [0, 0) for those added to it.

        Raises
        ------
        SpecError
            If the tokenizer cannot tell.
        """
        if not self.tokenizer.is_fast:
            raise SpecError(
                f"model.source: the tokenizer of {self.source} does not tell which characters a token is of, so prompts "
                "cannot be told from completions. Use one with a tokenizer.json."
            )
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        places = [np.asarray(row, np.int64).reshape(-1, 2) for row in encoded["offset_mapping"]]
        return [(np.asarray(row, np.int32), place) for row, place in zip(encoded["input_ids"], places, strict=True)]

    def render(self, document: Document, key: str) -> Rendered:
        """Return a chat as the tokenizer's template renders it; see `render_chat`."""
        return render_chat(self.tokenizer, document, key, self.source)

    def decode(self, tokens: np.ndarray) -> str:
        """Return the text that the tokens spell, without special tokens and without a character cut at the end."""
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)).rstrip("\ufffd")

    def end_token(self, key: str) -> int:
        """Return the token that ends a text.

        Raises
        ------
        DataError
            If the tokenizer has none.
        """
        end = self.tokenizer.eos_token_id
        if end is None:
            raise DataError(
                f"{key}: joined documents and completions end with an end-of-sequence token, and the tokenizer of "
                f'{self.source} has none. Use packing = "document" on texts, or a tokenizer that has one.'
            )
        return int(end)

    def hash(self) -> str:
        """Return a hash of the vocabulary and of how a probe text is cut into it.

        The tokenizer's file is not hashed: it changes with the library's version while the tokens do not.
        """
        tokens = [row.tolist() for special in (True, False) for row in self.encode(_PROBE, special=special)]
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
        return content_hash({"vocabulary": vocabulary, "probe": tokens, "end": self.tokenizer.eos_token_id})
