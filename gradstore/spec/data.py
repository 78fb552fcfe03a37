"""The tables of run.toml that say what the data is: where it comes from, and which rows each split takes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gradstore.errors import SpecError
from gradstore.spec.section import NAME, Section

SPLITS = ("train", "learn", "eval")
"""Splits that every run has; those of aspects follow them."""
_ASPECT = "learn-"
# How examples are cut is in the feature contract, which an aspect that is added to a store must leave as it is.
_CUT = ("length", "packing")


def role_of(split: str) -> str:
    """What a split is for: train, learn or eval. That of an aspect is for learning."""
    return "learn" if split.startswith(_ASPECT) else split


def key_of(split: str) -> str:
    """Where run.toml says what a split is: data.learn; of the split learn-style data.aspects.style."""
    return f"data.aspects.{split.removeprefix(_ASPECT)}" if split.startswith(_ASPECT) else f"data.{split}"


class SplitSection(Section):
    """[data.train], [data.learn], [data.eval], [data.aspects.NAME]: one split; [data] itself may hold shared defaults."""

    source: str = Field(min_length=1)
    format: Literal["auto", "text", "jsonl", "parquet", "datasets", "images", "idx", "npz"] = "auto"
    subset: str | None = None
    split: str | None = None
    encoding: str | Annotated[list[str], Field(min_length=1)] = "utf-8"
    text: str = "text"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    image: str = "image"
    labels: str | None = None
    label: str | None = None
    id: str | None = None
    packing: Literal["document", "concatenate"] = "document"
    length: int = Field(default=512, ge=2)
    start: int | None = Field(default=None, ge=0)
    rows: int | None = Field(default=None, ge=1)
    generate: dict[str, Any] | None = None

    @property
    def origin(self) -> tuple[str | None, ...]:
        """What tells the sources of two splits apart; rows that the model writes on from those of train have no source."""
        if self.generate is not None and self.generate.get("prompts") == "train":
            return ("rows of data.train",)
        return (self.source, self.subset, self.split)


class DataSection(Section):
    """[data]: the splits, and what is done to the documents before they are split.

    ``aspects`` are further sets of queries to learn from, each of which varies one thing only: style, subject, background.
    """

    deduplicate: bool = True
    shuffle: bool = True
    train: SplitSection
    learn: SplitSection
    eval: SplitSection
    aspects: dict[str, SplitSection] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _share_defaults(cls, values: Any) -> Any:
        """Keys of a split that stand in [data] itself are the defaults of all; aspects are cut as data.learn is."""
        if not isinstance(values, Mapping):
            return values
        shared = {key: value for key, value in values.items() if key in SplitSection.model_fields}
        rest = {key: value for key, value in values.items() if key not in shared}

        def filled(own: Any, defaults: Mapping[str, Any]) -> Any:
            return {**defaults, **own} if isinstance(own, Mapping) else own

        for split in SPLITS:
            rest[split] = filled(rest.get(split, {}), shared)
        if isinstance(aspects := rest.get("aspects"), Mapping):
            learn = rest["learn"] if isinstance(rest["learn"], Mapping) else {}
            defaults = {**shared, **{key: learn[key] for key in _CUT if key in learn}}
            rest["aspects"] = {name: filled(own, defaults) for name, own in aspects.items()}
        return rest

    @model_validator(mode="after")
    def _check_aspects(self) -> DataSection:
        for name, aspect in self.aspects.items():
            if name in SPLITS or not re.fullmatch(NAME, name):
                taken = ", which is another split's" if name in SPLITS else ""
                raise SpecError(
                    f"data.aspects: found the name {name!r}{taken}; accepted: letters, digits, and after the first - "
                    f"and _, but none of {', '.join(SPLITS)}."
                )
            for key in _CUT:
                found, wanted = getattr(aspect, key), getattr(self.learn, key)
                if found != wanted:
                    raise SpecError(
                        f"data.aspects.{name}.{key}: found {found!r}; aspects are cut as data.learn is, which has {wanted!r}. "
                        "Leave it out."
                    )
        return self

    def splits(self) -> dict[str, SplitSection]:
        """The splits by name, in the order in which they take their rows.

        Aspects come last, so that one that is added leaves all others as they are.
        """
        aspects = {_ASPECT + name: aspect for name, aspect in self.aspects.items()}
        return {**{name: getattr(self, name) for name in SPLITS}, **aspects}

    def query_sets(self) -> tuple[str, ...]:
        """The splits whose examples are queries."""
        return tuple(name for name in self.splits() if name != "train")

    def learn_sets(self) -> tuple[str, ...]:
        """The splits that weights are learned from, each its own: data.learn and all aspects."""
        return tuple(name for name in self.splits() if role_of(name) == "learn")

    def ranges(self) -> dict[str, tuple[int, int | None]]:
        """Rows [start, stop) that each split takes of its source; stop is None for all that is left.

        A split without ``start`` begins where the one before it, of the same source, ended. Aspects may share rows with
        one another and with data.learn.

        Raises
        ------
        SpecError
            If two splits of one source overlap that have different roles.
        """
        taken: dict[tuple[str | None, ...], list[tuple[str, int, int | None]]] = {}
        ranges: dict[str, tuple[int, int | None]] = {}
        for name, split in self.splits().items():
            earlier = taken.setdefault(split.origin, [])
            start = split.start
            if start is None:
                start = _after(name, earlier)
            stop = None if split.rows is None else start + split.rows
            for other, first, last in earlier:
                if role_of(other) == role_of(name):
                    continue
                if (last is None or start < last) and (stop is None or first < stop):
                    raise SpecError(
                        f"{key_of(name)}: rows {_range(start, stop)} of {split.source} overlap rows {_range(first, last)} "
                        f"of {key_of(other)}. Splits have disjoint roles: change start or rows."
                    )
            earlier.append((name, start, stop))
            ranges[name] = (start, stop)
        return ranges


def _after(name: str, earlier: list[tuple[str, int, int | None]]) -> int:
    if not earlier:
        return 0
    other, _, stop = earlier[-1]
    if stop is None:
        raise SpecError(
            f"{key_of(name)}: {key_of(other)} declares no rows, so it takes all of the source that both name. "
            f"Set {key_of(other)}.rows, or give {key_of(name)} another source."
        )
    return stop


def _range(start: int, stop: int | None) -> str:
    return f"[{start}, {'end' if stop is None else stop})"
