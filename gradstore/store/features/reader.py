"""Streaming features through a few buffers, with the next blocks read while one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.store.alignment import aligned, lines
from gradstore.store.features.chunks import KEPT_SCALES
from gradstore.store.features.feature_set import FeatureSet
from gradstore.store.read_ahead import read_ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Features that were read at once.

    Attributes
    ----------
    block
        The block that they are of.
    member
        The member that they are of.
    rows
        float32 [rows of the block, k_j] by group, in their true scale: views of a buffer that is overwritten when the
        next piece is asked for.
    """

    block: int
    member: str
    rows: dict[str, npt.NDArray[np.float32]]


class BlockReader:
    """Streams the features of blocks, piece by piece, through buffers that are used again and again.

    While a piece is worked on the next ``ahead`` are read, by as many threads as the storage serves requests at once. Every
    checksum is verified. Of every block the generation is read that its set reads.

    Parameters
    ----------
    feature_sets
        The set, or one set as several of its members have it (`FeatureSet.of_member`).
    bundles
        The groups of every piece; by default one bundle of all groups.
    ahead
        Pieces that are read before they are asked for; with 0, reading waits for the work and the work for reading.
    """

    def __init__(
        self, feature_sets: Sequence[FeatureSet], bundles: Sequence[Sequence[str]] | None = None, *, ahead: int = 1
    ) -> None:
        assert feature_sets, "there must be a set to read"
        assert ahead >= 0, "what is asked for cannot be read later"
        self._sets = list(feature_sets)
        info = self._sets[0].info
        self._widths = {array.name: array.features for array in info.arrays}
        self._bundles = [list(self._widths)] if bundles is None else [list(bundle) for bundle in bundles]
        self._num_buffers = ahead + 1
        self._threads = self._sets[0].storage.concurrency
        self._in_place = self._sets[0].reads_in_place
        chunks = {array.name: info.array_layout(array).buffer_bytes for array in info.arrays}
        numbers = {name: 4 * info.block_rows * width for name, width in self._widths.items()}
        # Bytes of every group's part of a buffer.
        self._parts = {name: lines((chunks if self._in_place else numbers)[name]) for name in chunks}
        self._buffer_bytes = max((sum(self._parts[name] for name in bundle) for bundle in self._bundles), default=0)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the buffers: those of the pieces, and, where it is converted, a chunk for each thread, with its rows' scales."""
        info = self._sets[0].info
        read = {name for bundle in self._bundles for name in bundle}
        chunks = [info.array_layout(array).buffer_bytes for array in info.arrays if array.name in read]
        scales = info.scales_layout()
        kept = 0 if scales is None else KEPT_SCALES * len(self._sets) * scales.buffer_bytes
        converted = 0 if self._in_place else self._threads * max(chunks, default=0)
        return self._num_buffers * self._buffer_bytes + converted + kept

    def read(self, blocks: Iterable[int]) -> Generator[Piece, None, None]:
        """Stream the pieces: block by block, in a block bundle by bundle, and each bundle as one set after another has it.

        What is read ahead ends, and its threads with it, when the iterator does: at its end, when it is closed or no longer
        referred to.

        Raises
        ------
        NotReadyError
            At the turn of a block that is not committed.
        ObjectMissingError, IntegrityError
            At the turn of a piece of which a chunk is not what the commit record says.
        """
        records = _Records(blocks)
        places = range(len(records.blocks))
        steps = ((place, bundle, each) for place in places for bundle in self._bundles for each in self._sets)
        buffers = [aligned(self._buffer_bytes, np.uint8) for _ in range(self._num_buffers)]
        return read_ahead(steps, buffers, partial(self._begin, records), threads=self._threads)

    def _begin(
        self,
        records: _Records,
        pool: ThreadPoolExecutor,
        step: tuple[int, Sequence[str], FeatureSet],
        buffer: npt.NDArray[np.uint8],
    ) -> Callable[[], Piece]:
        place, bundle, feature_set = step
        block = records.blocks[place]
        start, stop = feature_set.info.block_range(block)
        rows, memory, first = {}, {}, 0
        for name in bundle:
            memory[name] = buffer[first : first + self._parts[name]]
            numbers = memory[name][: 4 * (stop - start) * self._widths[name]]
            rows[name] = numbers.view(np.float32).reshape(stop - start, self._widths[name])
            first += self._parts[name]
        record = records.of(pool, place, feature_set)

        def read(name: str) -> None:
            # The pool takes its tasks in order, so this one was begun before: the wait ends with a single thread too.
            record.result()
            if self._in_place:
                feature_set.read_in_place(block, name, memory[name])
            else:
                feature_set.read_block(block, [name], rows)

        futures: list[Future[Any]] = [record, *(pool.submit(read, name) for name in bundle)]

        def wait() -> Piece:
            for future in futures:
                future.result()
            return Piece(block=block, member=feature_set.member, rows=rows)

        return wait


class _Records:
    """What all groups of a block need: its record, and its scales where rows have some. Each is asked for once.

    Otherwise every thread would ask for it. It is asked for one block ahead, or else all threads would wait for it.
    """

    def __init__(self, blocks: Iterable[int]) -> None:
        self.blocks = list(blocks)
        self._asked: dict[tuple[int, str], Future[Any]] = {}

    def of(self, pool: ThreadPoolExecutor, place: int, feature_set: FeatureSet) -> Future[Any]:
        """Return what ends when ``feature_set`` has what it needs of the block in a place of the list."""
        for each in range(place, min(place + 2, len(self.blocks))):
            if (each, feature_set.member) not in self._asked:
                asked = pool.submit(feature_set.read_block, self.blocks[each], [])
                self._asked[each, feature_set.member] = asked
        self._asked.pop((place - 1, feature_set.member), None)
        return self._asked[place, feature_set.member]
