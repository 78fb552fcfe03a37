"""A perceptron that is trained on the digits of scikit-learn, and a run.toml that attributes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from tests.runs import write_run

DAMPING = 0.1
_NETWORK = """
from torch import nn

def perceptron():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10))
"""


def write_digits(folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write the images, the module of the network and a run.toml into a folder, which must be on Python's path."""
    (folder / "digit_perceptron.py").write_text(_NETWORK)
    found = load_digits()
    np.savez(folder / "digits.npz", image=(15 * found.images).astype(np.uint8), label=found.target)
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "digits", "store": str(folder / "store"), "seed": 4},
        "model": {
            "adapter": "image_classifier",
            "source": "digit_perceptron:perceptron",
            "weights": str(folder / "trained.safetensors"),
            "precision": "float32",
        },
        "data": {"source": "digits.npz"},
        "data.learn": {"rows": 10},
        "data.eval": {"rows": 10},
        "features": {"dtype": "float32", "projection": {"kind": "identity"}},
        "kernel": {"kind": "block", "damping": DAMPING},
        "learn": {"k": 2, "epochs": 2},
        "cluster": {"workers": 1, "memory_per_worker": "4GiB", "device": "cpu"},
    }
    for table, values in changes.items():
        tables.setdefault(table, {}).update(values)
    return write_run(folder / "run.toml", tables)
