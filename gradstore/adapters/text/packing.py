"""From documents to rows of tokens: one row per document, or documents joined and cut into rows of one length."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import numpy as np

from gradstore.adapters.text.encoding import Encoded, TextEncoder, encode_documents
from gradstore.adapters.text.records import Document, Form

_DOCUMENTS_AT_ONCE: Final = 64
SHORTEST: Final = 2
"""Tokens of the shortest row: one to be predicted, and one to predict it from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of tokens and where they are from.

    Attributes
    ----------
    row_id
        The document's id; for joined documents with ``@`` and the token of that document with which the row begins.
    tokens
        int32 [T].
    predicted
        bool [T]: which tokens count as predicted; None where all do.
    label
        The label that all documents of the row share, or None.
    documents
        Digests and ids of the documents that the row holds some of.
    text
        The text of the row where it is a whole document, else None: it is what the tokens spell.
    """

    row_id: str
    tokens: np.ndarray
    label: str | None
    documents: tuple[tuple[bytes, str], ...]
    text: str | None
    predicted: np.ndarray | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Packer:
    """Turns documents into rows.

    Attributes
    ----------
    documents
        Digests of the documents' texts, and the documents.
    encoder
        What turns texts into tokens.
    form
        What the documents are; those that are joined are texts.
    key
        Where run.toml names the documents, for messages: ``data.train``.
    length
        Tokens of a document that every split reads; None for all.
    distinct
        Rows whose first ``distinct`` tokens an earlier row has are dropped: cut to that length they would be one example
        twice. None keeps them.
    counts
        What was dropped: ``alike`` rows, documents too ``short`` to predict a token, and those ``unpredicted`` of which
        no token that counts lies within ``length``.
    """

    documents: Iterable[tuple[bytes, Document]]
    encoder: TextEncoder
    form: Form = "text"
    key: str = "data"
    length: int | None = None
    distinct: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    _seen: set[bytes] = field(default_factory=set, init=False)

    def separate(self) -> Iterator[Row]:
        """Yield one row per document, uncut."""
        for digest, document, encoded in self._encoded():
            if len(encoded.tokens) < SHORTEST:
                self.counts["short"] += 1
            elif encoded.predicted is not None and not encoded.predicted[1 : self.length].any():
                self.counts["unpredicted"] += 1
            elif self._is_new(encoded.tokens):
                yield Row(
                    row_id=document.document_id,
                    tokens=encoded.tokens,
                    predicted=encoded.predicted,
                    label=document.label,
                    documents=((digest, document.document_id),),
                    text=document.text,
                )

    def joined(self, *, end: int, length: int, boundaries: frozenset[int]) -> Iterator[Row]:
        """Yield rows of ``length`` tokens, cut from the documents joined with the ``end`` token; what is left is dropped.

        Before a row whose index is in ``boundaries`` the rest of a document that was cut is skipped, so that no document
        has tokens on both sides.
        """
        pieces: list[_Piece] = []
        held = rows = 0
        for digest, document, tokens in self._bare():
            ended = np.append(tokens, np.int32(end))
            start = 0
            while start < len(ended):
                piece = _Piece(
                    digest=digest, document=document, start=start, tokens=ended[start : start + length - held]
                )
                pieces.append(piece)
                start, held = start + len(piece.tokens), held + len(piece.tokens)
                if held < length:
                    continue
                row = _joined_row(pieces)
                pieces, held = [], 0
                if self._is_new(row.tokens):
                    yield row
                    rows += 1
                    if rows in boundaries:
                        break

    def _is_new(self, tokens: np.ndarray) -> bool:
        if self.distinct is None:
            return True
        beginning = hashlib.blake2b(tokens[: self.distinct].tobytes(), digest_size=16).digest()
        if beginning in self._seen:
            self.counts["alike"] += 1
            return False
        self._seen.add(beginning)
        return True

    def _encoded(self) -> Iterator[tuple[bytes, Document, Encoded]]:
        for batch in self._batches():
            documents = [document for _, document in batch]
            encoded = encode_documents(documents, self.form, self.encoder, self.key)
            for (digest, document), row in zip(batch, encoded, strict=True):
                yield digest, document, row

    def _bare(self) -> Iterator[tuple[bytes, Document, np.ndarray]]:
        """The tokens of texts without special ones around them."""
        for batch in self._batches():
            encoded = self.encoder.encode([document.text for _, document in batch], special=False)
            for (digest, document), tokens in zip(batch, encoded, strict=True):
                yield digest, document, tokens

    def _batches(self) -> Iterator[list[tuple[bytes, Document]]]:
        remaining = iter(self.documents)
        while batch := list(islice(remaining, _DOCUMENTS_AT_ONCE)):
            yield batch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Tokens of one document inside a row, and where in the document they start."""

    digest: bytes
    document: Document
    start: int
    tokens: np.ndarray


def _joined_row(pieces: Sequence[_Piece]) -> Row:
    labels = {piece.document.label for piece in pieces}
    return Row(
        row_id=f"{pieces[0].document.document_id}@{pieces[0].start}",
        tokens=np.concatenate([piece.tokens for piece in pieces]),
        label=labels.pop() if len(labels) == 1 else None,
        documents=tuple((piece.digest, piece.document.document_id) for piece in pieces),
        text=None,
    )
