"""What a block kernel costs beside the two products that others pay for one: 20,000 rows, 8 groups x 256, 64 queries.

kernel-block   CPU seconds in which the kernel of every group is built and applied (symmetric updates of its Gram matrix in
               float64 over products of 2,048 rows, its eigendecomposition in float64, the queries preconditioned) to those
               of two products in float32, which is what is paid where rows are preconditioned: the Gram matrix of all rows
               as a plain product, and the product of every row with an inverse. **The decomposition is on our side only**:
               the inverse of the other side is given. Beside it are the ratio without the decomposition, what the
               decomposition takes of the whole, and the ratio to the two products and an inverse in float64.

Both sides do their work in one process, on one thread, in turn; a ratio is that of the medians over the rounds. The rows are in
memory: reading is measured by itself (bench_store).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from gradstore.numerics.kernel import Damping, GramSum, Spectrum, Vectors, spectrum

TARGET = 0.5
ROWS, GROUPS, WIDTH, QUERIES = 20_000, 8, 256, 64
# As many as the plan gives a block of such rows; smaller ones are gathered first, which costs a copy.
BLOCK_ROWS = 2048
SEED = 7
DAMPING = Damping(value=0.1)

Features = Mapping[str, np.ndarray]


def rows(*, rounds: int = 5) -> list[dict[str, Any]]:
    """Measure the row and return {name, ratio, target, better}, with other figures beside."""
    rng = np.random.default_rng(SEED)
    names = [f"layers.{index}" for index in range(GROUPS)]
    train = {name: rng.standard_normal((ROWS, WIDTH), dtype=np.float32) for name in names}
    queries = {name: rng.standard_normal((QUERIES, WIDTH), dtype=np.float32) for name in names}
    # numpy takes two factors for one by their memory.
    same = {name: values.copy() for name, values in train.items()}
    grams = {name: _gram(values) for name, values in train.items()}
    spectra = {name: _decomposed(gram) for name, gram in grams.items()}
    inverses = {name: _inverse(gram).astype(np.float32) for name, gram in grams.items()}
    passes: dict[str, Callable[[], object]] = {
        "gram": lambda: [_gram(values) for values in train.values()],
        "decomposed": lambda: [_decomposed(gram) for gram in grams.values()],
        "applied": lambda: _apply(spectra, queries),
        "two products": lambda: _two_products(train, same, inverses),
        "inverse": lambda: [_inverse(gram) for gram in grams.values()],
    }
    with threadpool_limits(1):
        seconds = _alternate(passes, rounds)
    without = seconds["gram"] + seconds["applied"]
    ours = without + seconds["decomposed"]
    return [
        {
            "name": "kernel-block",
            "ratio": round(ours / seconds["two products"], 3),
            "target": TARGET,
            "better": "lower",
            "peers": {
                "without the decomposition": round(without / seconds["two products"], 3),
                "share of the decomposition": round(seconds["decomposed"] / ours, 3),
                "to two products and an inverse": round(ours / (seconds["two products"] + seconds["inverse"]), 3),
            },
        }
    ]


def _gram(values: np.ndarray) -> np.ndarray:
    total = GramSum(values.shape[1])
    for start in range(0, len(values), BLOCK_ROWS):
        total.add(values[start : start + BLOCK_ROWS])
    return total.total()


def _decomposed(gram: np.ndarray) -> Spectrum:
    """The spectrum as it is stored: its vectors in float32."""
    found = spectrum(gram)
    assert isinstance(found.basis, Vectors)
    return Spectrum(eigenvalues=found.eigenvalues, basis=Vectors(found.basis.vectors.astype(np.float32)))


def _apply(spectra: Mapping[str, Spectrum], queries: Features) -> list[np.ndarray]:
    return [spectra[name].precondition(values, DAMPING) for name, values in queries.items()]


def _inverse(gram: np.ndarray) -> np.ndarray:
    return np.linalg.inv(gram + DAMPING.value * np.trace(gram) / len(gram) * np.eye(len(gram)))


def _two_products(train: Features, same: Features, inverses: Features) -> None:
    """The Gram matrix of every group, by a product that does not know its factors to be one, and its rows preconditioned."""
    preconditioned = np.empty((ROWS, WIDTH), np.float32)
    for name, values in train.items():
        np.matmul(values.T, same[name])
        np.matmul(values, inverses[name], out=preconditioned)


def _alternate(passes: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of every pass over the rounds, after one that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, run in passes.items():
            started = time.process_time()
            run()
            if number:
                found[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in found.items()}
