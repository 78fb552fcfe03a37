"""From documents to the examples of the splits: each takes its rows of a source, and no document is in two roles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from gradstore.adapters.protocol import Examples, Facts, SourceFacts
from gradstore.adapters.text.corpus import Corpus
from gradstore.adapters.text.documents import DocumentReader
from gradstore.adapters.text.encoding import PREDICTED, TOKENS, TextEncoder
from gradstore.adapters.text.generation import Writer, generated_rows, resolve_generation
from gradstore.adapters.text.packing import Packer, Row
from gradstore.adapters.text.records import resolve_form
from gradstore.errors import DataError, SpecError
from gradstore.spec import SPLITS, DataSection, SplitSection, key_of, role_of
from gradstore.store.examples import Example, hash_inputs

_READING: Final = ("format", "encoding", "text", "prompt", "completion", "messages", "label", "id", "packing")


def split_examples(data: DataSection, seed: int, encoder: TextEncoder, writer: Writer) -> Examples:
    """Read, deduplicate, order, tokenise and split the documents of [data].

    Rows of a source are documents, or the rows cut from joined documents, counted after duplicates, empty and too short
    documents are gone. A split takes the rows that `DataSection.ranges` gives it. Of a split with a table ``generate``
    the rows are prompts, which ``writer`` continues; they may be those of data.train.

    Raises
    ------
    SpecError
        If splits of one source do not read and cut it alike.
    DataError
        If the source cannot be read, has fewer rows than declared, or splits of two roles hold the same text.
    """
    ranges, splits = data.ranges(), data.splits()
    generations = {name: resolve_generation(split, key_of(name)) for name, split in splits.items()}
    prompted = [name for name, generation in generations.items() if generation and generation.prompts == "train"]
    sources: dict[tuple[str | None, ...], list[str]] = {}
    for name, split in splits.items():
        if name not in prompted:
            sources.setdefault(split.origin, []).append(name)
    rows: dict[str, list[Row]] = {}
    facts = []
    for names in sources.values():
        source = _Source(data=data, seed=seed, ranges={name: ranges[name] for name in names})
        taken, found = source.take(encoder)
        rows |= taken
        facts.append(found)
    rows |= {name: _rows_of_train(rows["train"], name, ranges[name]) for name in prompted}
    for name, generation in generations.items():
        if generation is not None:
            rows[name] = list(generated_rows(rows[name], generation, splits[name].length, key_of(name), writer))
    origins = {name: data.train.source if name in prompted else split.source for name, split in splits.items()}
    examples = {
        name: [_example(row, origins[name], split.length, encoder) for row in rows[name]]
        for name, split in splits.items()
    }
    _refuse_overlap(origins, rows, examples, prompted)
    return Examples(
        splits=examples,
        facts=Facts(sources=tuple(facts), rows={name: len(found) for name, found in examples.items()}),
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
            unpredicted=counts["unpredicted"],
            first_empty=tuple(corpus.empty),
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
            form=resolve_form(split, self._key()),
            key=self._key(),
            length=shortest,
            distinct=shortest if self.data.deduplicate else None,
            counts=corpus.counts,
        )
        if split.packing == "document":
            return packer.separate()
        return packer.joined(
            end=encoder.end_token(f"{self._key()}.packing"),
            length=split.length,
            # Those of splits that every run has keep roles apart, and aspects that are added leave rows as they are.
            boundaries=frozenset(
                row for name in self.ranges if name in SPLITS for row in self.ranges[name] if row is not None
            ),
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
                        f"{key_of(other)}.{option}: found {ours!r}, but {key_of(name)} of the same source has {theirs!r}. "
                        "Splits that share a source must read and cut it alike."
                    )
        return first

    def _key(self) -> str:
        return key_of(next(iter(self.ranges)))

    def _refuse_too_few(self, taken: Mapping[str, list[Row]], available: int, facts: SourceFacts) -> None:
        for name, (start, stop) in self.ranges.items():
            declared = None if stop is None else stop - start
            if len(taken[name]) < (declared or 1):
                raise DataError(
                    f"{key_of(name)}.rows: rows [{start:,}, {'end' if stop is None else f'{stop:,}'}) are declared, but "
                    f"there are {available:,}: {facts.describe()}. {key_of(name)} would get {len(taken[name]):,}. "
                    "Declare fewer rows, or give a larger source."
                )


def _rows_of_train(rows: Sequence[Row], name: str, bounds: tuple[int, int | None]) -> list[Row]:
    start, stop = bounds
    assert stop is not None, "a split that is generated says how many rows it has"
    if stop > len(rows):
        raise DataError(
            f"{key_of(name)}.rows: prompts [{start:,}, {stop:,}) of data.train are declared, but it has {len(rows):,} rows. "
            "Declare fewer."
        )
    return list(rows[start:stop])


def _refuse_equal_ids(taken: Mapping[str, list[Row]], key: str, split: SplitSection) -> None:
    seen: dict[str, Row] = {}
    for row in (row for rows in taken.values() for row in rows):
        # Aspects may share rows.
        if seen.setdefault(row.row_id, row) is not row:
            raise DataError(
                f"{key}.id: {row.row_id!r} names two documents of {split.source} in column {split.id!r}. "
                "Choose a column whose values differ, or leave id out."
            )


def _refuse_overlap(
    sources: Mapping[str, str],
    rows: Mapping[str, Sequence[Row]],
    examples: Mapping[str, Sequence[Example]],
    prompted: Sequence[str],
) -> None:
    """Splits have disjoint roles (docs/math.md): a text in two of them would attribute a query to itself.

    Splits in ``prompted`` begin as training examples do, on purpose.
    """
    seen: dict[bytes | str, tuple[str, str]] = {}
    overlaps: list[tuple[str, str, str, str]] = []
    for name in sources:
        for row, example in zip(rows[name], examples[name], strict=True):
            # Of the tokens alone: which of them count as predicted does not make another text.
            digest = hash_inputs({TOKENS: example.inputs[TOKENS]})
            keys: list[tuple[bytes | str, str]] = [*row.documents, (digest, example.example_id)]
            for key, document in keys:
                other, its_document = seen.setdefault(key, (name, document))
                if role_of(other) != role_of(name) and not (name in prompted and other == "train"):
                    overlaps.append((name, document, other, its_document))
                    break
    if overlaps:
        name, document, other, its_document = overlaps[0]
        advice = "set data.deduplicate = true"
        if sources[name] != sources[other]:
            advice = "take them out of one of the sources"
        raise DataError(
            f"{key_of(name)}: {document} of {sources[name]} equals {its_document} of "
            f"{sources[other]} in {key_of(other)}, as far as it is read; there are {len(overlaps):,} such examples. "
            f"The splits must not overlap: {advice}."
        )


def _example(row: Row, source: str, length: int, encoder: TextEncoder) -> Example:
    tokens = row.tokens[:length]
    inputs = {TOKENS: tokens}
    if row.predicted is not None:
        inputs[PREDICTED] = row.predicted[:length]
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
