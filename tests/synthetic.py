"""Synthetic runs in small, made in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gradstore.spec import RunSpec
from gradstore.stages.featurize import featurize
from gradstore.stages.progress import Progress
from gradstore.stages.synth import SynthSettings, make_folder
from gradstore.store.features import FeatureStore
from tests.runs import InThisProcess

SMALL: dict[str, Any] = {
    "store": None,
    "rows": 80,
    "queries": 6,
    "learn_queries": 5,
    "groups": 8,
    "features": 12,
    "topics": 4,
    "contributors": 2,
    "noisy": 0.5,
    "seed": 0,
    "dtype": "float16",
    "block_rows": 16,
    "kernel": "identity",
    "workers": 1,
    "memory_per_worker": "4GiB",
}


def make(folder: Path, **changes: Any) -> RunSpec:
    """Write the folder of a small synthetic run."""
    return make_folder(SynthSettings(folder=folder, **{**SMALL, **changes}))


def synthesized(folder: Path, engine: Any = None, **changes: Any) -> FeatureStore:
    """Write the folder of a small synthetic run and its features."""
    spec = make(folder, **changes)
    featurize(spec, engine or InThisProcess(), Progress(quiet=True))  # type: ignore[arg-type]
    return FeatureStore.open(spec.run.store)


def features_of(store: FeatureStore, set_name: str) -> dict[str, np.ndarray]:
    """Features of a set, as they are stored, by group."""
    feature_set = store.open_set(set_name)
    # A block is read into memory that the next one takes.
    blocks = [
        {name: rows.copy() for name, rows in feature_set.read_block(block).items()}
        for block in range(feature_set.info.num_blocks)
    ]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
