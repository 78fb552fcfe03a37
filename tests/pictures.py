"""Small labelled images for the tests, and the files that sources keep them in."""

from __future__ import annotations

import gzip
import io
import json
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CLASSES = ("bird", "cat", "dog")


def draw(count: int, shape: tuple[int, ...] = (8, 8, 3), *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random uint8 images [count, *shape], and their class numbers 0, 1, 2, 0, ..."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)
    return images, np.arange(count) % len(CLASSES)


def encode(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """An image file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_folder(folder: Path, images: np.ndarray, classes: np.ndarray) -> Path:
    """One folder per class, one PNG file per image."""
    for row, (pixels, number) in enumerate(zip(images, classes, strict=True)):
        path = folder / CLASSES[number] / f"{row:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(pixels))
    return folder


def write_npz(path: Path, images: np.ndarray, classes: np.ndarray) -> Path:
    """An archive with the arrays image, label and name."""
    names = np.array([f"picture-{row}" for row in range(len(images))])
    np.savez_compressed(path, image=images, label=classes, name=names)
    return path


def write_idx(path: Path, values: np.ndarray) -> Path:
    """An IDX file of bytes, packed where its name ends in .gz."""
    header = struct.pack(">4B", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(
    path: Path, files: Sequence[bytes | None], labels: Sequence[object], *, names: Sequence[str] | None = None
) -> Path:
    """A table as `datasets` saves it: structs of bytes and path, and numbered classes with their names."""
    image = pa.array(
        [{"bytes": content, "path": f"{row}.png"} for row, content in enumerate(files)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": image, "label": pa.array(labels), "key": [f"k{row}" for row in range(len(files))]})
    if names is not None:
        features = {"info": {"features": {"label": {"names": list(names), "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(features).encode()})
    pq.write_table(table, path, row_group_size=3)
    return path
