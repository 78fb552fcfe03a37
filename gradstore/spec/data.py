"""The tables of run.toml that say what the data is: where it comes from, and which rows each split takes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gradstore.errors import SpecError
from gradstore.spec.section import Section

SPLITS = ("train", "learn", "eval")


class SplitSection(Section):
    """[data.train], [data.learn], [data.eval]: one split of the data. [data] itself may hold shared defaults."""

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
    """[data]: the three splits, and what is done to the documents before they are split."""

    deduplicate: bool = True
    shuffle: bool = True
    train: SplitSection
    learn: SplitSection
    eval: SplitSection

    @model_validator(mode="before")
    @classmethod
    def _share_defaults(cls, values: Any) -> Any:
        """Keys of a split that stand in [data] itself are the defaults of all three."""
        if not isinstance(values, Mapping):
            return values
        shared = {key: value for key, value in values.items() if key in SplitSection.model_fields}
        rest = {key: value for key, value in values.items() if key not in shared}
        for split in SPLITS:
            own = rest.get(split, {})
            rest[split] = {**shared, **own} if isinstance(own, Mapping) else own
        return rest

    def splits(self) -> dict[str, SplitSection]:
        """The splits by name, in the order in which they take their rows."""
        return {name: getattr(self, name) for name in SPLITS}

    def ranges(self) -> dict[str, tuple[int, int | None]]:
        """Rows [start, stop) that each split takes of its source; stop is None for all that is left.

        A split without ``start`` begins where the one before it, of the same source, ended.

        Raises
        ------
        SpecError
            If two splits of one source overlap.
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
                if (last is None or start < last) and (stop is None or first < stop):
                    raise SpecError(
                        f"data.{name}: rows {_range(start, stop)} of {split.source} overlap rows {_range(first, last)} "
                        f"of data.{other}. The three splits have disjoint roles: change start or rows."
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
            f"data.{name}: data.{other} declares no rows, so it takes all of the source that both name. "
            f"Set data.{other}.rows, or give data.{name} another source."
        )
    return stop


def _range(start: int, stop: int | None) -> str:
    return f"[{start}, {'end' if stop is None else stop})"
