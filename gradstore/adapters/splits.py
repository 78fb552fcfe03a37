"""From documents to the examples of the three splits: each takes its rows of a source, and no document is in two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol

import numpy as np

from gradstore.adapters.corpus import Corpus
from gradstore.adapters.documents import DocumentReader
from gradstore.adapters.packing import Encoder, Packer, Row
from gradstore.adapters.protocol import Examples, Facts, SourceFacts
from gradstore.errors import DataError, SpecError
from gradstore.spec import DataSection, SplitSection
from gradstore.store.examples import Example, hash_inputs

TOKENS: Final = "tokens"
"""The input of a text example: int32 [T]."""

_READING: Final = ("format", "encoding", "text", "label", "id", "packing")


class TextEncoder(Encoder, Protocol):
    """Turns texts into tokens and back."""

    def decode(self, tokens: np.ndarray) -> str:
        """Return the text that the tokens spell."""
        ...

    def end_token(self, key: str) -> int:
        """Return the token that ends a text."""
        ...


def split_examples(data: DataSection, seed: int, encoder: TextEncoder) -> Examples:
    """Read, deduplicate, order, tokenise and split the documents of [data].

    Rows of a source are documents, or the rows cut from joined documents, counted after duplicates, empty and too short
    documents are gone. A split takes the rows that `DataSection.ranges` gives it.

    Raises
    ------
    SpecError
        If splits of one source do not read and cut it alike.
    DataError
        If the source cannot be read, has fewer rows than declared, or two splits hold the same text.
    """
    ranges = data.ranges()
    sources: dict[tuple[str | None, ...], list[str]] = {}
    for name, split in data.splits().items():
        sources.setdefault(split.origin, []).append(name)
    rows: dict[str, list[Row]] = {}
    facts = []
    for names in sources.values():
        source = _Source(data=data, seed=seed, ranges={name: ranges[name] for name in names})
        taken, found = source.take(encoder)
        rows |= taken
        facts.append(found)
    splits = {
        name: [_example(row, split.source, split.length, encoder) for row in rows[name]]
        for name, split in data.splits().items()
    }
    _refuse_overlap(data, rows, splits)
    return Examples(
        splits=splits,
        facts=Facts(sources=tuple(facts), rows={name: len(examples) for name, examples in splits.items()}),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """One source, and the rows [start, stop) that splits take of it."""

    data: DataSection
    seed: int
    ranges: Mapping[str, tuple[int, int | None]]

    def take(self, encoder: TextEncoder) -> tuple[dict[str, list[Row]], SourceFacts]:
        """Return the rows of each split, and what was read and dropped."""
        split = self._common_split()
        stops = [stop for _, stop in self.ranges.values()]
        limit = None if None in stops else max(stop for stop in stops if stop is not None)
        counts: Counter[str] = Counter()
        corpus = Corpus(
            source=split.source,
            documents=DocumentReader(split=split, key=self._key(), streamed=not self.data.shuffle),
            seed=self.seed,
            deduplicate=self.data.deduplicate,
            shuffle=self.data.shuffle,
            counts=counts,
        )
        taken: dict[str, list[Row]] = {name: [] for name in self.ranges}
        available = 0
        for row in islice(self._rows(corpus, split, limit, encoder), limit):
            for name, (start, stop) in self.ranges.items():
                if start <= available and (stop is None or available < stop):
                    taken[name].append(row)
            available += 1
        facts = SourceFacts(
            source=split.source,
            documents=counts["documents"],
            duplicates=counts["duplicates"],
            alike=counts["alike"],
            empty=counts["empty"],
            short=counts["short"],
        )
        self._refuse_too_few(taken, available, facts)
        _refuse_equal_ids(taken, self._key(), split)
        return taken, facts

    def _rows(self, corpus: Corpus, split: SplitSection, limit: int | None, encoder: TextEncoder) -> Iterator[Row]:
        # A few more than the rows, so that some documents that are too short cost no second reading.
        documents = corpus.ordered(None if limit is None else limit + limit // 16 + 1)
        # The shortest cut of the splits: whichever of them take two rows, the rows differ.
        shortest = min(self.data.splits()[name].length for name in self.ranges)
        packer = Packer(
            documents=documents,
            encoder=encoder,
            distinct=shortest if self.data.deduplicate else None,
            counts=corpus.counts,
        )
        if split.packing == "document":
            return packer.separate()
        return packer.joined(
            end=encoder.end_token(f"{self._key()}.packing"),
            length=split.length,
            boundaries=frozenset(row for bounds in self.ranges.values() for row in bounds if row is not None),
        )

    def _common_split(self) -> SplitSection:
        """One split's section; the others must read and cut the source alike, or its rows would not be comparable."""
        name, *others = self.ranges
        splits = self.data.splits()
        first = splits[name]
        for other in others:
            for option in (*_READING, *(["length"] if first.packing == "concatenate" else [])):
                ours, theirs = getattr(splits[other], option), getattr(first, option)
                if ours != theirs:
                    raise SpecError(
                        f"data.{other}.{option}: found {ours!r}, but data.{name} of the same source has {theirs!r}. "
                        "Splits that share a source must read and cut it alike."
                    )
        return first

    def _key(self) -> str:
        return f"data.{next(iter(self.ranges))}"

    def _refuse_too_few(self, taken: Mapping[str, list[Row]], available: int, facts: SourceFacts) -> None:
        for name, (start, stop) in self.ranges.items():
            declared = None if stop is None else stop - start
            if len(taken[name]) < (declared or 1):
                raise DataError(
                    f"data.{name}.rows: rows [{start:,}, {'end' if stop is None else f'{stop:,}'}) are declared, but "
                    f"there are {available:,}: {facts.describe()}. data.{name} would get {len(taken[name]):,}. "
                    "Declare fewer rows, or give a larger source."
                )


def _refuse_equal_ids(taken: Mapping[str, list[Row]], key: str, split: SplitSection) -> None:
    seen: set[str] = set()
    for row in (row for rows in taken.values() for row in rows):
        if row.row_id in seen:
            raise DataError(
                f"{key}.id: {row.row_id!r} names two documents of {split.source} in column {split.id!r}. "
                "Choose a column whose values differ, or leave id out."
            )
        seen.add(row.row_id)


def _refuse_overlap(
    data: DataSection, rows: Mapping[str, Sequence[Row]], examples: Mapping[str, Sequence[Example]]
) -> None:
    """The three splits have disjoint roles (docs/math.md): a text in two of them would attribute a query to itself."""
    seen: dict[bytes | str, tuple[str, str]] = {}
    overlaps: list[tuple[str, str, str, str]] = []
    for name in data.splits():
        for row, example in zip(rows[name], examples[name], strict=True):
            keys: list[tuple[bytes | str, str]] = [*row.documents, (example.content_hash, example.example_id)]
            for key, document in keys:
                other, its_document = seen.setdefault(key, (name, document))
                if other != name:
                    overlaps.append((name, document, other, its_document))
                    break
    if overlaps:
        name, document, other, its_document = overlaps[0]
        splits = data.splits()
        sources_differ = splits[name].source != splits[other].source
        advice = "take them out of one of the sources" if sources_differ else "set data.deduplicate = true"
        raise DataError(
            f"data.{name}: {document} of {splits[name].source} equals {its_document} of "
            f"{splits[other].source} in data.{other}, as far as it is read; there are {len(overlaps):,} such examples. "
            f"The splits must not overlap: {advice}."
        )


def _example(row: Row, source: str, length: int, encoder: TextEncoder) -> Example:
    tokens = row.tokens[:length]
    inputs = {TOKENS: tokens}
    whole = row.text is not None and len(tokens) == len(row.tokens)
    return Example(
        example_id=row.row_id,
        source=source,
        label=row.label,
        text=row.text if whole and row.text is not None else encoder.decode(tokens),
        content_hash=hash_inputs(inputs),
        size=len(tokens),
        inputs=inputs,
    )
