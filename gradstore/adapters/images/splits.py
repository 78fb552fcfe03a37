"""From labelled images to the examples of the splits: each takes its rows of a source, and no image is in two roles."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradstore.adapters.images.classes import Classes, resolve_classes
from gradstore.adapters.images.entries import Entry, ImageSource
from gradstore.adapters.images.pixels import Preparation
from gradstore.adapters.images.sources import open_images
from gradstore.adapters.protocol import Examples, Facts, SourceFacts
from gradstore.errors import DataError, SpecError
from gradstore.spec import SPLITS, DataSection, key_of, role_of
from gradstore.store.examples import Example, hash_inputs

IMAGE: Final = "image"
"""The input of an image example: uint8 [C, H, W]."""
CLASS: Final = "class"
"""The number of its class: int64, without dimensions."""
TRUE_CLASS: Final = "true_class"
"""The number that it has in the source, where some are given another one on purpose."""

# One token of a batch's budget stands for 8 x 8 pixels.
PIXELS_PER_TOKEN: Final = 64
_READING: Final = ("format", "image", "labels", "label", "id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """The sources of [data], each with its splits and with all that is known of its images before they are decoded."""

    data: DataSection
    sources: Mapping[str, ImageSource]
    entries: Mapping[str, Sequence[Entry]]
    splits: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, data: DataSection, omit: Collection[str] = ()) -> Labelled:
        """Read the labels of all splits but those in ``omit``, which are not read from a source.

        Raises
        ------
        SpecError
            If splits of one source do not read it alike, or keys do not fit the format.
        DataError
            If a source cannot be read, or two of its images have one id.
        """
        origins: dict[tuple[str | None, ...], list[str]] = {}
        for name, split in data.splits().items():
            if name not in omit:
                origins.setdefault(split.origin, []).append(name)
        splits = {names[0]: names for names in origins.values()}
        for names in splits.values():
            _refuse_different_reading(data, names)
        sources = {first: open_images(data.splits()[first], key_of(first)) for first in splits}
        entries = {first: source.entries() for first, source in sources.items()}
        for first, listed in entries.items():
            _refuse_equal_ids(key_of(first), listed)
        return cls(data=data, sources=sources, entries=entries, splits=splits)

    def classes(self, *, declared: Sequence[str] | None, learned: Sequence[str] | None) -> Classes:
        """Return the order of the classes; see `resolve_classes`.

        It is in the feature contract, so that sources which aspects alone have take no part in it.
        """
        taken = [first for first in self.sources if first in SPLITS]
        written = {key_of(first): self.sources[first].names for first in taken}
        return resolve_classes([self.entries[first] for first in taken], written, declared=declared, learned=learned)


def split_images(labelled: Labelled, classes: Classes | None, preparation: Preparation, seed: int) -> Examples:
    """Order, decode, deduplicate and split the images of [data]; without ``classes`` they may lack labels.

    With ``data.shuffle`` the order is that of a keyed hash of the images' ids, so only images that are taken are decoded.
    Images are equal when their prepared pixels are, whatever their class. Rows of a source are counted after duplicates
    are gone; a split takes those that `DataSection.ranges` gives it.

    Raises
    ------
    DataError
        If an image cannot be decoded or has no class, images differ in shape, a source has fewer images than declared, or
        splits of two roles hold the same image.
    """
    data, ranges = labelled.data, labelled.data.ranges()
    examples: dict[str, list[Example]] = {}
    digests: dict[str, list[str]] = {}
    facts = []
    for first, names in labelled.splits.items():
        source = _Source(
            key=key_of(first),
            name=data.splits()[first].source,
            images=labelled.sources[first],
            entries=labelled.entries[first],
            classes=classes,
            preparation=preparation,
        )
        stops = [ranges[name][1] for name in names]
        limit = None if None in stops else max(stop for stop in stops if stop is not None)
        taken = source.take(seed if data.shuffle else None, limit, distinct=data.deduplicate)
        facts.append(taken.facts)
        for name in names:
            start, stop = ranges[name]
            examples[name], digests[name] = taken.examples[start:stop], taken.digests[start:stop]
            _refuse_too_few(name, (start, stop), len(examples[name]), taken)
    ordered = {name: examples[name] for name in data.splits() if name in examples}
    _refuse_different_shapes(ordered)
    _refuse_overlap(data, ordered, digests)
    return Examples(
        splits=ordered,
        facts=Facts(sources=tuple(facts), rows={name: len(found) for name, found in ordered.items()}),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """The rows of a source up to the last that a split takes, and the digests of their pixels."""

    examples: list[Example]
    digests: list[str]
    facts: SourceFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """One source of images."""

    key: str
    name: str
    images: ImageSource
    entries: Sequence[Entry]
    classes: Classes | None
    preparation: Preparation

    def take(self, seed: int | None, limit: int | None, *, distinct: bool) -> _Taken:
        """Decode images in their order, or the seed's, until there are ``limit`` rows."""
        order = self._order(seed)
        examples: list[Example] = []
        digests: list[str] = []
        seen: set[str] = set()
        duplicates = position = 0
        while position < len(order) and (limit is None or len(examples) < limit):
            # A few more than are missing, so that some duplicates cost no second reading.
            missing = len(order) if limit is None else limit - len(examples)
            chosen = order[position : position + missing + missing // 16 + 1]
            decoded = self._decode(chosen)
            for place in chosen:
                pixels = decoded.pop(place)
                if limit is not None and len(examples) == limit:
                    break
                position += 1
                digest = hash_inputs({IMAGE: pixels})
                if distinct and digest in seen:
                    duplicates += 1
                    continue
                seen.add(digest)
                examples.append(self._example(self.entries[place], pixels))
                digests.append(digest)
        facts = SourceFacts(
            source=self.name, documents=position, duplicates=duplicates, alike=0, empty=0, short=0, noun="images"
        )
        return _Taken(examples=examples, digests=digests, facts=facts)

    def _order(self, seed: int | None) -> list[int]:
        places = list(range(len(self.entries)))
        if seed is None:
            return places
        key = seed.to_bytes(8, "little")
        keyed = [
            hashlib.blake2b(entry.image_id.encode("utf-8", "surrogatepass"), digest_size=16, key=key).digest()
            for entry in self.entries
        ]
        return sorted(places, key=keyed.__getitem__)

    def _decode(self, places: Sequence[int]) -> dict[int, np.ndarray]:
        ascending = sorted(places)
        return {
            place: self.preparation(pixels, f"{self.key}: {self.entries[place].image_id}")
            for place, pixels in zip(ascending, self.images.pixels(ascending), strict=True)
        }

    def _example(self, entry: Entry, pixels: np.ndarray) -> Example:
        inputs, label = {IMAGE: pixels}, None if entry.label is None else str(entry.label)
        if self.classes is not None:
            number = self.classes.number(entry, self.key)
            inputs[CLASS], label = np.array(number, np.int64), self.classes.name(number)
        return Example(
            example_id=entry.image_id,
            source=self.name,
            label=label,
            text=entry.text,
            content_hash=hash_inputs(inputs),
            size=_tokens(pixels),
            inputs=inputs,
        )


def blank_image(preparation: Preparation) -> Example | None:
    """A black image of the first class of the shape that all images are brought to; None where they keep their own."""
    if preparation.size is None or preparation.channels is None:
        return None
    pixels = np.zeros((preparation.channels, *preparation.size), np.uint8)
    inputs: dict[str, np.ndarray] = {IMAGE: pixels, CLASS: np.array(0, np.int64)}
    return Example(
        example_id="",
        source="",
        label=None,
        text="",
        content_hash=hash_inputs(inputs),
        size=_tokens(pixels),
        inputs=inputs,
    )


def _tokens(pixels: np.ndarray) -> int:
    _, height, width = pixels.shape
    return max(1, int(height * width) // PIXELS_PER_TOKEN)


def _refuse_different_reading(data: DataSection, names: Sequence[str]) -> None:
    first, *others = names
    for other in others:
        for option in _READING:
            ours, theirs = getattr(data.splits()[other], option), getattr(data.splits()[first], option)
            if ours != theirs:
                raise SpecError(
                    f"{key_of(other)}.{option}: found {ours!r}, but {key_of(first)} of the same source has {theirs!r}. "
                    "Splits that share a source must read it alike."
                )


def _refuse_equal_ids(key: str, entries: Sequence[Entry]) -> None:
    seen: set[str] = set()
    for entry in entries:
        if entry.image_id in seen:
            raise DataError(
                f"{key}.id: {entry.image_id!r} names two images. Choose a column whose values differ, or leave id out."
            )
        seen.add(entry.image_id)


def _refuse_too_few(name: str, bounds: tuple[int, int | None], found: int, taken: _Taken) -> None:
    start, stop = bounds
    if found < (1 if stop is None else stop - start):
        raise DataError(
            f"{key_of(name)}.rows: rows [{start:,}, {'end' if stop is None else f'{stop:,}'}) are declared, but there are "
            f"{len(taken.examples):,}: {taken.facts.describe()}. {key_of(name)} would get {found:,}. "
            "Declare fewer rows, or give a larger source."
        )


def _refuse_different_shapes(splits: Mapping[str, Sequence[Example]]) -> None:
    examples = [example for found in splits.values() for example in found]
    first, shape = examples[0], examples[0].inputs[IMAGE].shape
    for example in examples:
        if (found := example.inputs[IMAGE].shape) != shape:
            raise DataError(
                f"{example.example_id} of {example.source} is {list(found)} [channels, height, width], "
                f"{first.example_id} of {first.source} {list(shape)}; all images must have one shape. Set "
                "model.options.size = [height, width], and model.options.channels = 3 or 1."
            )


def _refuse_overlap(
    data: DataSection, splits: Mapping[str, Sequence[Example]], digests: Mapping[str, Sequence[str]]
) -> None:
    """Splits have disjoint roles (docs/math.md): an image in two of them would attribute a query to itself."""
    seen: dict[str, tuple[str, str]] = {}
    overlaps: list[tuple[str, str, str, str]] = []
    for name, examples in splits.items():
        for example, digest in zip(examples, digests[name], strict=True):
            other, its_image = seen.setdefault(digest, (name, example.example_id))
            if role_of(other) != role_of(name):
                overlaps.append((name, example.example_id, other, its_image))
    if overlaps:
        name, image, other, its_image = overlaps[0]
        sources = {split: section.source for split, section in data.splits().items()}
        advice = "set data.deduplicate = true"
        if sources[name] != sources[other]:
            advice = "take them out of one of the sources"
        raise DataError(
            f"{key_of(name)}: {image} of {sources[name]} has the pixels of {its_image} of {sources[other]} in "
            f"{key_of(other)}; there are {len(overlaps):,} such images. The splits must not overlap: {advice}."
        )
