"""What every stored type does to scores, and blosc to bytes, of a store of float32 features with sets train and eval.

    python -m tests.benchmarks.bench_dtypes STORE

Train features are rounded through each type and back, as featurize and the later stages do, kernels are built of what is
left, and the scores of every query are compared with those of the float32 features. Queries stay in float32, as stored.
Where the features are matrices, the same is done of rank-c factors of them, of queries too. gradstore/plan/dtypes.py
repeats the figures.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numcodecs import blosc

from gradstore.numerics.factors import expand
from gradstore.numerics.kernel import Block, GramSum, Identity, Kernel, spectrum
from gradstore.numerics.projection.lorif import factorised
from gradstore.store.dtypes import DTYPES, Rounding, nearest_scale
from gradstore.store.features import FeatureSet, FeatureStore

KERNELS: Mapping[str, Kernel] = {"identity": Identity(), "block": Block(damping=0.1)}
TOP = 10
FACTORS = (1, 4)
Features = Mapping[str, np.ndarray]
Shapes = Mapping[str, Sequence[tuple[int, int]]]


@dataclass(frozen=True, kw_only=True)
class Compared:
    """How far scores [Q, N] are from others.

    Attributes
    ----------
    relative
        Root mean square of the differences, over that of the others.
    spearman
        Rank correlation over the examples, mean over the queries.
    overlap
        Share of the ten highest examples that both have, mean over the queries.
    """

    relative: float
    spearman: float
    overlap: float


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Features that were stored and read: numbers lost, bytes, and what blosc makes of the bytes."""

    features: Features
    rounding: Rounding
    bytes: int
    blosc_bytes: int


def main(url: str) -> None:
    """Print all figures as JSON."""
    store = FeatureStore.open(url)
    train, queries = (read_all(store.open_set(name)) for name in ("train", "eval"))
    expected = {kind: scores(kind, train, queries) for kind in KERNELS}
    shapes = {array.name: [part.shape for part in array.parts] for array in store.open_set("train").info.arrays}
    found = {}
    for name in DTYPES:
        rounded = round_trip(name, train)
        found[name] = measure(rounded, rounded.features, queries, expected)
    for factors in FACTORS:
        ours = factorise(train, shapes, factors)
        theirs = multiplied_out(factorise(queries, shapes, factors), shapes, factors)
        for name in DTYPES:
            rounded = round_trip(name, ours)
            whole = multiplied_out(rounded.features, shapes, factors)
            found[f"{name}, {factors} factors"] = measure(rounded, whole, theirs, expected)
    print(json.dumps(found, indent=1))


def measure(
    rounded: Rounded, features: Features, queries: Features, expected: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Figures of train features that were rounded, and are ``features`` as kernels see them."""
    return {
        "bytes": rounded.bytes,
        "blosc": rounded.blosc_bytes / rounded.bytes,
        "rounding": asdict(rounded.rounding),
        "scores": {kind: asdict(compare(scores(kind, features, queries), expected[kind])) for kind in KERNELS},
    }


def read_all(feature_set: FeatureSet) -> dict[str, np.ndarray]:
    """Features of a set by group, float32 [N, k_j]."""
    blocks = [feature_set.read_block(block) for block in range(feature_set.info.num_blocks)]
    return {array.name: np.concatenate([block[array.name] for block in blocks]) for array in feature_set.info.arrays}


def round_trip(name: str, train: Features) -> Rounded:
    """Store features in a type, with the scales that featurize would find, and read them."""
    dtype, read = DTYPES[name], {}
    rounding, stored_bytes, packed_bytes = Rounding(), 0, 0
    for group, values in train.items():
        scale = nearest_scale(math.sqrt(np.square(values, dtype=np.float64).mean()))
        stored, scales = np.empty(values.shape, dtype.numpy_dtype), dtype.scale_of(values, scale)
        rounding += dtype.encode(values, scales, stored)
        read[group] = np.empty_like(values)
        dtype.decode(stored, scales, read[group])
        stored_bytes += stored.nbytes
        packed_bytes += len(blosc.compress(stored, b"lz4", 5, blosc.BITSHUFFLE, typesize=dtype.item_bytes))
    return Rounded(features=read, rounding=rounding, bytes=stored_bytes, blosc_bytes=packed_bytes)


def factorise(features: Features, shapes: Shapes, factors: int) -> dict[str, np.ndarray]:
    """Rank-c factors of every part's matrix, part after part."""
    found = {}
    for group, rows in features.items():
        pieces, start = [], 0
        for height, width in shapes[group]:
            matrices = torch.from_numpy(rows[:, start : start + height * width]).reshape(-1, height, width)
            pieces.append(factorised(matrices, factors).numpy())
            start += height * width
        found[group] = np.concatenate(pieces, axis=1)
    return found


def multiplied_out(features: Features, shapes: Shapes, factors: int) -> dict[str, np.ndarray]:
    """The matrices that factors stand for."""
    return {group: expand(rows, shapes[group], [factors] * len(shapes[group])) for group, rows in features.items()}


def scores(kind: str, train: Features, queries: Features) -> np.ndarray:
    """Scores [Q, N]: the sum over groups of <K_j psi_q, phi_n>."""
    kernel, total = KERNELS[kind], np.zeros(())
    for group, rows in train.items():
        found = queries[group]
        if kernel.damped_by is not None:
            gram = GramSum(rows.shape[1])
            gram.add(rows)
            found = spectrum(gram.total()).precondition(found, kernel.damped_by)
        total = total + found.astype(np.float64) @ rows.T
    return total


def compare(found: np.ndarray, expected: np.ndarray) -> Compared:
    """Compare scores [Q, N] with others."""
    tops = [np.argsort(-each, axis=1)[:, :TOP].tolist() for each in (found, expected)]
    # No two scores of a query are equal, so places are ranks.
    ranks = [each.argsort(1).argsort(1) for each in (found, expected)]
    return Compared(
        relative=float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())),
        spearman=float(np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(*ranks, strict=True)])),
        overlap=float(np.mean([len(set(ours) & set(theirs)) / TOP for ours, theirs in zip(*tops, strict=True)])),
    )


if __name__ == "__main__":
    main(sys.argv[1])
