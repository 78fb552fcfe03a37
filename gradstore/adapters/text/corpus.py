"""The documents of one source, without its empty ones and duplicates, in the order in which splits take them."""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from gradstore.adapters.text.records import Document
from gradstore.errors import DataError

DIGEST_BYTES = 16
# Documents that are left out and told by name.
NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The documents of one source.

    Attributes
    ----------
    source
        The source as run.toml names it, for messages.
    documents
        The documents in the source's own order; iterated twice or more when they are shuffled.
    seed
        The run's seed.
    deduplicate
        Whether only the first document of each normalised text is kept.
    shuffle
        Whether the order is that of a keyed hash of the texts: it depends on the seed and the texts alone, not on the
        order of files. Otherwise documents stream in the source's own order.
    counts
        What was met so far: ``documents``, ``duplicates``, ``empty``.
    empty
        The ids of the first documents that are empty.
    """

    source: str
    documents: Iterable[Document]
    seed: int
    deduplicate: bool
    shuffle: bool
    counts: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)

    def ordered(self, expected: int | None) -> Iterator[tuple[bytes, Document]]:
        """Yield (digest of the normalised text, document) in the order in which splits take them.

        ``expected`` is how many the caller thinks to need, None for all. When shuffled, that many texts are held at a
        time; should more be needed, the source is read again.

        Raises
        ------
        DataError
            If the source changes between two readings.
        """
        return self._shuffled(expected) if self.shuffle else self._streamed()

    def _streamed(self) -> Iterator[tuple[bytes, Document]]:
        seen: set[bytes] = set()
        for _, digest, document in self._digested():
            if self.deduplicate and digest in seen:
                self.counts["duplicates"] += 1
                continue
            if self.deduplicate:
                seen.add(digest)
            yield digest, document

    def _digested(self) -> Iterator[tuple[int, bytes, Document]]:
        for ordinal, document in enumerate(self.documents):
            self.counts["documents"] += 1
            digest = text_digest(document.text, self.seed)
            if digest is None:
                self.counts["empty"] += 1
                if len(self.empty) < NAMED:
                    self.empty.append(document.document_id)
            else:
                yield ordinal, digest, document

    def _shuffled(self, expected: int | None) -> Iterator[tuple[bytes, Document]]:
        ordinals, digests = self._index()
        start, size = 0, len(ordinals) if expected is None else expected
        while start < len(ordinals):
            yield from self._fetch(ordinals[start : start + size], digests[start : start + size])
            start, size = start + size, 2 * size

    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """Ordinals and digests in shuffled order: 24 bytes for each document, whatever its length."""
        ordinals, content = array("q"), bytearray()
        for ordinal, digest, _ in self._digested():
            ordinals.append(ordinal)
            content += digest
        digests = np.frombuffer(bytes(content), "<u8").reshape(-1, 2)
        # The digest is keyed with the seed, so its order is the shuffle. The sort is stable: of equal texts the first
        # in the source comes first.
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        if self.deduplicate and len(order):
            first = np.ones(len(order), bool)
            first[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
            self.counts["duplicates"] += int(len(order) - first.sum())
            order = order[first]
        return np.asarray(ordinals, np.int64)[order], digests[order]

    def _fetch(self, ordinals: np.ndarray, digests: np.ndarray) -> list[tuple[bytes, Document]]:
        places = {int(ordinal): place for place, ordinal in enumerate(ordinals)}
        found: dict[int, tuple[bytes, Document]] = {}
        for ordinal, document in enumerate(self.documents):
            if (place := places.get(ordinal)) is None:
                continue
            digest = digests[place].tobytes()
            if text_digest(document.text, self.seed) != digest:
                break
            found[place] = (digest, document)
            if len(found) == len(places):
                return [found[place] for place in range(len(places))]
        raise DataError(f"{self.source} changed while it was read. Run the command again when it is at rest.")


def text_digest(text: str, seed: int) -> bytes | None:
    """Return a keyed hash of the normalised text, None for an empty one.

    Texts are equal when they are so after Unicode NFKC, case folding and collapsing of whitespace.
    """
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    if not normalised:
        return None
    # Lone surrogates, which JSON may hold, are no reason to fail here.
    content = normalised.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES, key=seed.to_bytes(8, "little")).digest()
