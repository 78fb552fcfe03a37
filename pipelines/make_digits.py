"""Writes the digits of scikit-learn, 8 x 8 pixels, as archives for the studies: as they are, and turned, where how far is known.

runs/digits.npz has all 1,797. Of the first 1,300, runs/digits/turned.npz has each as it is turned by some quarters, which
runs/digits/turns.csv tells. The others are queries that vary one thing only: runs/digits/upright.npz has them as they are, and
runs/digits/sevens.npz every seven turned in all four ways.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

NUM_TURNED = 1300
SEVEN = 7


def main(folder: Path) -> None:
    """Write what is missing."""
    found = load_digits()
    # Pixels are 0 to 16.
    images, labels = (255 * found.images / 16).round().astype(np.uint8), found.target
    ids = np.array([f"digit {row}" for row in range(len(images))])
    turns = np.random.default_rng(0).integers(0, 4, NUM_TURNED)
    turned = np.stack([np.rot90(image, turn) for image, turn in zip(images, turns, strict=False)])
    (sevens,) = np.nonzero(labels[NUM_TURNED:] == SEVEN)
    sevens += NUM_TURNED
    in_all_ways = np.concatenate([np.rot90(images[sevens], turn, axes=(1, 2)) for turn in range(4)])
    archives = {
        "digits.npz": (images, labels, ids),
        "digits/turned.npz": (turned, labels[:NUM_TURNED], ids[:NUM_TURNED]),
        "digits/upright.npz": (images[NUM_TURNED:], labels[NUM_TURNED:], ids[NUM_TURNED:]),
        "digits/sevens.npz": (
            in_all_ways,
            np.tile(labels[sevens], 4),
            np.array([f"{name} turned {turn}" for turn in range(4) for name in ids[sevens]]),
        ),
    }
    (folder / "digits").mkdir(parents=True, exist_ok=True)
    for name, (image, label, identifier) in archives.items():
        if not (folder / name).exists():
            np.savez(folder / name, image=image, label=label, id=identifier)
    with (folder / "digits" / "turns.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "value"])
        writer.writerows((ids[row], f"{90 * turn} degrees") for row, turn in enumerate(turns))


if __name__ == "__main__":
    main(Path("runs"))
