"""Writes the digits of scikit-learn, 8 x 8 pixels, as an archive of images and labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def main(place: Path) -> None:
    """Write the archive, unless it is there."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    found = load_digits()
    # Pixels are 0 to 16.
    np.savez(place, image=(255 * found.images / 16).round().astype(np.uint8), label=found.target)


if __name__ == "__main__":
    main(Path("runs/diffusion/digits.npz"))
