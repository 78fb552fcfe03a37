"""From what a user's own adapter yields to the examples of the splits: each takes its rows of a source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np

from gradstore.adapters.protocol import Examples, Facts, SourceFacts
from gradstore.errors import DataError
from gradstore.spec import DataSection, key_of, role_of
from gradstore.store.examples import Example, hash_inputs

MASK: Final = "_mask"
"""What the name of an input's mask ends in."""
_KEYS: Final = ("id", "inputs", "label", "text", "size")
# What stands for a source of queries.
_QUERY: Final = "query"
_NUMBERS: Final = "biuf"

Reader = Callable[[str, str], Iterator[Any]]
"""(source, split that names it first) -> what the user's adapter yields."""


def split_own(data: DataSection, seed: int, name: str, read: Reader) -> Examples:
    """Check, order, deduplicate and split what a user's adapter, ``name``, yields for the sources of [data].

    With ``data.shuffle`` the order is that of a keyed hash of the ids, so a source is read whole; without it, as far as
    its splits need. Examples are equal when their inputs are. Rows of a source are counted after duplicates are gone; a
    split takes those that `DataSection.ranges` gives it.

    Raises
    ------
    DataError
        If an example is not what a mapping of one has to be, inputs differ in type or shape, two examples have one id, a
        source has fewer rows than declared, or splits of two roles hold the same inputs.
    """
    ranges, splits = data.ranges(), data.splits()
    sources: dict[str, list[str]] = {}
    for split, section in splits.items():
        sources.setdefault(section.source, []).append(split)
    rows: dict[str, list[Example]] = {}
    facts = []
    for source, names in sources.items():
        taken = _Source(source=source, split=names[0], function=name, data=data, seed=seed)
        stops = [ranges[split][1] for split in names]
        limit = None if None in stops else max(stop for stop in stops if stop is not None)
        examples, found = taken.take(read(source, names[0]), limit)
        facts.append(found)
        for split in names:
            start, stop = ranges[split]
            rows[split] = examples[start:stop]
            _refuse_too_few(split, (start, stop), len(rows[split]), found)
    ordered = {split: rows[split] for split in splits}
    _refuse_different_inputs(ordered)
    _refuse_overlap(ordered)
    return Examples(
        splits=ordered,
        facts=Facts(sources=tuple(facts), rows={split: len(found) for split, found in ordered.items()}),
    )


def own_queries(records: Sequence[Mapping[str, Any]], data: DataSection, seed: int, name: str) -> list[Example]:
    """Return the examples of queries: records as a user's adapter, ``name``, yields them. Nothing of them is cut.

    Raises
    ------
    DataError
        If one is not what a mapping of an example has to be, or inputs differ in type or shape.
    """
    source = _Source(source=_QUERY, split="eval", function=name, data=data, seed=seed)
    examples = [source.example(record, place) for place, record in enumerate(records)]
    _refuse_different_inputs({"eval": examples})
    return examples


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """One source, as the first split that names it reads it."""

    source: str
    split: str
    function: str
    data: DataSection
    seed: int

    def take(self, given: Iterator[Any], limit: int | None) -> tuple[list[Example], SourceFacts]:
        """The first ``limit`` rows, or all, in the order in which splits take them."""
        examples = (self.example(item, place) for place, item in enumerate(given))
        found: list[Example] = []
        counts = {"documents": 0, "duplicates": 0}
        found = list(islice(self._distinct(self._ordered(examples), counts), limit))
        facts = SourceFacts(
            source=self.source,
            documents=counts["documents"],
            duplicates=counts["duplicates"],
            alike=0,
            empty=0,
            short=0,
            noun="examples",
        )
        return found, facts

    def _ordered(self, examples: Iterator[Example]) -> Iterator[Example]:
        if not self.data.shuffle:
            return examples
        key = self.seed.to_bytes(8, "little")

        def place(example: Example) -> bytes:
            name = example.example_id.encode("utf-8", "surrogatepass")
            return hashlib.blake2b(name, digest_size=16, key=key).digest()

        return iter(sorted(examples, key=place))

    def _distinct(self, examples: Iterator[Example], counts: dict[str, int]) -> Iterator[Example]:
        ids: set[str] = set()
        hashes: set[str] = set()
        for example in examples:
            counts["documents"] += 1
            if example.example_id in ids:
                raise DataError(
                    f"{key_of(self.split)}: {self.function} names two examples of {self.source} {example.example_id!r}. Give "
                    "each an id of its own, or none."
                )
            ids.add(example.example_id)
            if self.data.deduplicate and example.content_hash in hashes:
                counts["duplicates"] += 1
                continue
            hashes.add(example.content_hash)
            yield example

    def example(self, given: Any, place: int) -> Example:
        """The example of what the user's adapter yields in some place."""
        where = f"{key_of(self.split)}: example {place} that {self.function} yields for {self.source}"
        if not isinstance(given, Mapping) or "inputs" not in given:
            found = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
            raise DataError(
                f"{where}: found {found or 'nothing'}; accepted: a mapping with inputs, and where wanted id, label, text "
                "and size."
            )
        if unknown := [str(key) for key in given if key not in _KEYS]:
            raise DataError(f"{where} has the unknown key {unknown[0]!r}; accepted: {', '.join(_KEYS)}.")
        example_id = f"{self.source}:{place}" if given.get("id") is None else str(given["id"])
        inputs = _inputs(given["inputs"], f"{where} ({example_id})")
        text, size, label = given.get("text") or "", given.get("size"), given.get("label")
        if not isinstance(text, str):
            raise DataError(f"{where} ({example_id}): text is {type(text).__name__}, not a string.")
        if size is not None and (isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1):
            raise DataError(f"{where} ({example_id}): size is {size!r}; accepted: an integer of at least 1.")
        return Example(
            example_id=example_id,
            source=self.source,
            label=None if label is None else str(label),
            text=text,
            content_hash=hash_inputs(inputs),
            size=max(array.size for array in inputs.values()) if size is None else int(size),
            inputs=inputs,
        )


def _inputs(given: Any, where: str) -> dict[str, np.ndarray]:
    if not isinstance(given, Mapping) or not given:
        raise DataError(f"{where}: inputs are {given!r:.80}; accepted: a mapping of names to arrays.")
    inputs: dict[str, np.ndarray] = {}
    for name, value in given.items():
        if not isinstance(name, str) or name.removesuffix(MASK) in given.keys() - {name}:
            raise DataError(f"{where}: an input is named {name!r}; accepted: a string that is no other's mask.")
        try:
            array = np.array(value)
        # Of an object that calls itself an array, anything.
        except Exception as error:
            raise DataError(f"{where}: input {name!r} makes no array: {error}.") from error
        if array.dtype.kind not in _NUMBERS:
            raise DataError(f"{where}: input {name!r} holds {array.dtype}; accepted: numbers and booleans.")
        if array.size == 0:
            raise DataError(f"{where}: input {name!r} is empty, of shape {list(array.shape)}. Leave the example out.")
        inputs[name] = array
    return inputs


def _refuse_too_few(split: str, bounds: tuple[int, int | None], found: int, facts: SourceFacts) -> None:
    start, stop = bounds
    if found < (1 if stop is None else stop - start):
        raise DataError(
            f"{key_of(split)}.rows: rows [{start:,}, {'end' if stop is None else f'{stop:,}'}) are declared, but there are "
            f"{facts.documents - facts.duplicates:,}: {facts.describe()}. {key_of(split)} would get {found:,}. Declare fewer "
            "rows, or yield more examples."
        )


def _refuse_different_inputs(splits: Mapping[str, Sequence[Example]]) -> None:
    """Inputs of one name are one column of the store and one tensor of a batch; only their first dimension may vary."""
    first = next(iter(splits.values()))[0]
    for split, examples in splits.items():
        for example in examples:
            if example.inputs.keys() != first.inputs.keys():
                raise DataError(
                    f"{key_of(split)}: {example.example_id} has the inputs {', '.join(sorted(example.inputs))}, "
                    f"{first.example_id} {', '.join(sorted(first.inputs))}. Every example has the same."
                )
            for name, array in example.inputs.items():
                ours, theirs = _form(array), _form(first.inputs[name])
                if ours != theirs:
                    raise DataError(
                        f"{key_of(split)}: input {name!r} of {example.example_id} is {ours}, of {first.example_id} {theirs}. "
                        "Inputs of one name have one type and one shape, of which only the first dimension may vary."
                    )


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} [{', '.join(['*', *map(str, array.shape[1:])])}]" if array.ndim else f"{array.dtype} []"


def _refuse_overlap(splits: Mapping[str, Sequence[Example]]) -> None:
    """Splits have disjoint roles (docs/math.md): an example in two of them would attribute a query to itself."""
    seen: dict[str, tuple[str, Example]] = {}
    overlaps: list[tuple[str, Example, str, Example]] = []
    for split, examples in splits.items():
        for example in examples:
            other, theirs = seen.setdefault(example.content_hash, (split, example))
            if role_of(other) != role_of(split):
                overlaps.append((split, example, other, theirs))
    if overlaps:
        split, ours, other, theirs = overlaps[0]
        advice = "set data.deduplicate = true"
        if ours.source != theirs.source:
            advice = "leave them out of one of the sources"
        raise DataError(
            f"{key_of(split)}: {ours.example_id} of {ours.source} has the inputs of {theirs.example_id} of {theirs.source} in "
            f"{key_of(other)}; there are {len(overlaps):,} such examples. The splits must not overlap: {advice}."
        )
