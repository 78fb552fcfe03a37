"""What can be wrong with a store, one entry for each object that is not as it should be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Kind: TypeAlias = Literal[
    "missing object",
    "wrong size",
    "wrong bytes",
    "damaged record",
    "record of another unit",
    "missing record",
    "missing document",
    "damaged document",
    "missing inputs",
    "damaged inputs",
    "missing metadata",
    "wrong metadata",
    "unfinished creation",
    "unfinished append",
    "unfinished erasure",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something wrong with a store.

    Attributes
    ----------
    kind
        What sort of thing it is.
    path
        Path of the object in the store.
    found
        What was found there.
    remedy
        What to do about it.
    """

    kind: Kind
    path: str
    found: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)
