"""C as the learner sees it: of the queries that weights are learned from, numbered anew, and with noise where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from gradstore.stages.contributions import Piece, Reads

Noise = Callable[[Callable[[], Iterator[Piece]]], Callable[[], Iterator[Piece]]]
"""Makes a reader of noisy contributions of a reader of others, the same at each read."""


class LearnedFrom:
    """C of some queries, of which those that are held out are none.

    Parameters
    ----------
    reads
        Reads of C of all queries.
    queries
        Numbers of the queries to learn from [L], ascending: they are numbered from 0 up.

    Attributes
    ----------
    noise
        What is added to C.
    """

    def __init__(self, reads: Reads, queries: np.ndarray) -> None:
        self.reads = reads
        self.queries = queries
        self.noise: Noise | None = None

    def read(self) -> Iterator[Piece]:
        """Pieces that hold every valid row of every query once."""
        return self._of(self.reads.read)

    def read_range(self, first: int, last: int) -> Iterator[Piece]:
        """The same of the queries from ``first`` to ``last``; no read of C is counted."""
        numbers = self.queries[first:last]
        return self._of(lambda: self.reads.contributions.read(int(numbers[0]), int(numbers[-1]) + 1))

    def _of(self, read: Callable[[], Iterator[Piece]]) -> Iterator[Piece]:
        for start, rows_N, c_QNM in (self.noise(read) if self.noise else read)():
            first, last = np.searchsorted(self.queries, [start, start + len(c_QNM)])
            numbers = self.queries[first:last]
            # Neighbours stay together, which are views of the piece.
            for run in np.split(np.arange(len(numbers)), np.flatnonzero(np.diff(numbers) != 1) + 1):
                if len(run):
                    place = numbers[run[0]] - start
                    yield int(first + run[0]), rows_N, c_QNM[place : place + len(run)]


class TileReader:
    """Gives the valid rows of C_q piece by piece; holds the tile that q is in, because visits stay inside a tile."""

    def __init__(self, learned_from: LearnedFrom, size: int, advance: Callable[[int], None]) -> None:
        self._learned_from = learned_from
        self._size = size
        self._advance = advance
        self._tile = -1
        self._held: list[list[np.ndarray]] = []

    def read(self, query: int) -> Iterator[np.ndarray]:
        """Pieces [rows, M] of one query's contributions, in row order."""
        self._advance(1)
        if query // self._size != self._tile:
            self._tile = query // self._size
            first = self._tile * self._size
            last = min(first + self._size, len(self._learned_from.queries))
            self._held = [[] for _ in range(first, last)]
            for start, _, c_QNM in self._learned_from.read_range(first, last):
                for place, c_NM in enumerate(c_QNM, start - first):
                    self._held[place].append(c_NM.copy())
        yield from self._held[query % self._size]
