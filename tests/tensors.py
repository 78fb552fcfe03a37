"""Small tensors C [Q, N, M] for the learner, and what gives them piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gradstore.numerics.learner import KeptRows

Reader = Callable[[], Iterator[tuple[int, np.ndarray, np.ndarray]]]


def contributions(num_queries: int = 6, num_rows: int = 60, num_groups: int = 5) -> np.ndarray:
    """C of a signal that groups share in unlike measure, and of noise."""
    draw = np.random.default_rng(1)
    signal = draw.standard_normal((num_queries, num_rows, 1)) ** 3 * draw.random(num_groups)
    noise = draw.standard_normal((num_queries, num_rows, num_groups)) * (0.5 + 3 * draw.random(num_groups))
    return (signal + noise).astype(np.float32)


def moments(c: np.ndarray) -> np.ndarray:
    """A_q in float64."""
    c = c.astype(np.float64)
    return np.asarray(c.transpose(0, 2, 1) @ c)


def reader(c: np.ndarray, rows: int = 16, queries: int | None = None, seed: int | None = None) -> Reader:
    """Gives pieces of so many rows and queries: in order, or with a seed in another order at each read."""
    reads, step = 0, queries or max(1, len(c))

    def read() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        nonlocal reads
        reads += 1
        pieces = [(q, n) for q in range(0, len(c), step) for n in range(0, c.shape[1], rows)]
        if seed is not None:
            np.random.default_rng([seed, reads]).shuffle(pieces)
        for q, n in pieces:
            yield q, np.arange(n, min(n + rows, c.shape[1])), c[q : q + step, n : n + rows]

    return read


def keep(c: np.ndarray, rows: Sequence[int]) -> KeptRows:
    """Some rows of every query."""
    chosen = np.array(rows, np.int64)
    return KeptRows([chosen] * len(c), [c_nm[chosen] for c_nm in c], num_groups=c.shape[2])
