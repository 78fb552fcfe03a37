"""What a source of images says of each before it is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One image of a source.

    Attributes
    ----------
    image_id
        What the image is called in its source: a path, a path and a row, or the value of an id column.
    label
        The number or the name of its class; None where the source has none.
    text
        A caption, or nothing.
    """

    image_id: str
    label: int | str | None
    text: str = ""


class ImageSource(Protocol):
    """A source of images, whose entries are known before any image is decoded."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of their numbers, where the source says so."""
        ...

    def entries(self) -> list[Entry]:
        """Return every image's name and label, in the order of the source; no image is read."""
        ...

    def pixels(self, places: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the images at ascending places of `entries`: [H, W], [H, W, C] or [C, H, W]."""
        ...
