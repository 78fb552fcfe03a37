"""Writes train examples of the CNN of pipelines/classification that were changed a little, and which was made of which.

runs/ablations/augmented.npz has 200 of them, each mirrored or not and moved by up to two pixels; augmented.csv names the pairs.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from gradstore.errors import GradstoreError
from gradstore.store.features import FeatureStore

NUM_IMAGES = 200
STORE = Path("runs/classification/cnn")


def main(folder: Path) -> None:
    """Write the archive and the pairs, unless they are there."""
    if (folder / "augmented.csv").exists():
        return
    try:
        train = FeatureStore.open(str(STORE)).open_set("train")
        examples = pa.concat_tables(train.read_inputs(number) for number in range(train.info.num_blocks))
    except GradstoreError as error:
        sys.exit(f"{error} It is made by `make tables-classification`, whose train examples are used here.")
    draw = np.random.default_rng(0)
    rows = draw.choice(examples.num_rows, NUM_IMAGES, replace=False)
    images = np.array([np.array(examples["input:image"][row].as_py(), np.uint8) for row in rows]).reshape(-1, 28, 28)
    ids = [examples["example_id"][row].as_py() for row in rows]
    labels = np.array([int(examples["label"][row].as_py()) for row in rows])
    augmented = np.stack([changed(image, draw) for image in images])
    names = [f"{name} augmented" for name in ids]
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "augmented.npz", image=augmented, label=labels, id=np.array(names))
    with (folder / "augmented.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "example"])
        writer.writerows(zip(names, ids, strict=True))


def changed(image: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """An image [28, 28], mirrored or not, and moved by one or two pixels each way."""
    down, right = draw.choice([-2, -1, 1, 2], 2)
    moved = np.roll(np.pad(image, 2), (down, right), (0, 1))[2:-2, 2:-2]
    return moved[:, ::-1] if draw.random() < 1 / 2 else moved


if __name__ == "__main__":
    main(Path("runs/ablations"))
