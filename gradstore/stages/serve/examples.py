"""Examples as a reader sees them: a list of the queries, and pictures of images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from gradstore.errors import NotReadyError, SpecError
from gradstore.stages.report.formatting import one_line
from gradstore.store.examples import INPUT, from_table
from gradstore.store.features import FeatureStore

_IMAGE = f"{INPUT}image"
_EXCERPT = 160
# A picture of few pixels is drawn larger, each pixel as a square.
_LEAST_SIDE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A query in a list: its row in the eval set, its id and label, the beginning of its text, and what it is found by."""

    row: int
    query_id: str
    label: str | None
    excerpt: str
    searched: str


# Without slots: what is read for some pages is read once.
@dataclass(frozen=True, kw_only=True)
class Examples:
    """The examples of a store; with ``redact`` without their texts and pictures."""

    store: FeatureStore
    redact: bool = False

    @cached_property
    def with_images(self) -> frozenset[str]:
        """The sets whose examples are images, whose pixels the store keeps."""
        if self.redact:
            return frozenset()
        return frozenset(name for name in ("train", "eval") if _is_of_images(self.store.open_set(name).read_inputs(0)))

    @cached_property
    def queries(self) -> Sequence[Listed]:
        """All queries of the eval set, in its order; those that are erased are left out."""
        evaluated, found = self.store.open_set("eval"), []
        for block in range(evaluated.info.num_blocks):
            table = evaluated.read_inputs(block).select(["row", "example_id", "label", "text"])
            for row in table.to_pylist():
                if row["example_id"] is not None:
                    text = "" if self.redact else row["text"]
                    listed = Listed(
                        row=row["row"],
                        query_id=one_line(row["example_id"], 200),
                        label=None if row["label"] is None else one_line(row["label"], 60),
                        excerpt=one_line(text, _EXCERPT),
                        searched=f"{row['example_id']}\n{row['label'] or ''}\n{text}".casefold(),
                    )
                    found.append(listed)
        return found

    def find(self, wanted: str) -> Sequence[Listed]:
        """Return the queries whose text, label or id holds a text, whatever its case."""
        wanted = wanted.strip().casefold()
        return [query for query in self.queries if wanted in query.searched]

    def address(self, set_name: str, row: int) -> str | None:
        """Where the picture of an example is."""
        return f"/images/{set_name}/{row}.png" if set_name in self.with_images else None

    def picture(self, set_name: str, row: int) -> bytes:
        """Return the pixels of an example as PNG.

        Raises
        ------
        NotReadyError
            If there is no such example, or it is no image.
        SpecError
            If Pillow is not installed.
        """
        if set_name not in self.store.set_names():
            raise NotReadyError(f"{self.store.storage.url}: has no set {set_name}.")
        info = self.store.open_set(set_name).info
        if not 0 <= row < info.rows:
            raise NotReadyError(f"features/{set_name}: has no row {row}; it has {info.rows:,}.")
        block = row // info.block_rows
        start, _ = info.block_range(block)
        one = self.store.open_set(set_name).read_inputs(block).slice(row - start, 1)
        if self.redact or not _is_of_images(one) or one["example_id"].to_pylist() in ([], [None]):
            raise NotReadyError(f"features/{set_name}: row {row} is no image.")
        (example,) = from_table(one)
        return _png(example.inputs["image"])


def _is_of_images(table: pa.Table) -> bool:
    """Whether examples have pixels uint8 [C, H, W]; an adapter of one's own may call anything an image."""
    if _IMAGE not in table.column_names:
        return False
    levels, kind = 0, table[_IMAGE].type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        levels, kind = levels + 1, kind.value_type
    return levels == 3 and bool(pa.types.is_uint8(kind))


def _png(pixels: np.ndarray) -> bytes:
    """Pixels uint8 [C, H, W] as PNG; of several channels the first three."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise SpecError("serve: Pillow is not installed here: pip install 'gradstore[images]'.") from error
    channels, height, width = pixels.shape
    picture = Image.fromarray(pixels[0] if channels < 3 else np.ascontiguousarray(pixels[:3].transpose(1, 2, 0)))
    larger = max(1, _LEAST_SIDE // max(height, width))
    if larger > 1:
        picture = picture.resize((width * larger, height * larger), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
