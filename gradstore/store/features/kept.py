"""Reading features again and again: the first blocks stay in memory, as far as it goes, and the rest streams by."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice

from gradstore.store.features.feature_set import FeatureSet
from gradstore.store.features.reader import BlockReader, Piece


class Room:
    """Memory for what is kept to be read again: who comes first takes it, and none gives way to another.

    Parameters
    ----------
    memory_bytes
        How much there is.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._left = memory_bytes

    def has(self, num_bytes: int) -> bool:
        """Whether so much is left."""
        return num_bytes <= self._left

    def take(self, num_bytes: int) -> None:
        """Take so much of it for good."""
        self._left -= num_bytes


class KeptBlocks:
    """Features of whole blocks that stay in memory once they were read, in float32.

    Where not all have room, those of the first blocks stay: each reading in order would push out what the next begins with.

    Parameters
    ----------
    room
        Memory for them.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._pieces: dict[int, list[Piece]] = {}

    def find(self, block: int) -> list[Piece] | None:
        """Return the pieces of a block, in the order in which they were read; None if it is not kept."""
        return self._pieces.get(block)

    def has_room(self, num_bytes: int) -> bool:
        """Whether a block of this size can be kept."""
        return self._room.has(num_bytes)

    def keep(self, block: int, pieces: list[Piece]) -> None:
        """Keep the pieces of a block, whose memory is theirs alone."""
        self._room.take(sum(rows.nbytes for piece in pieces for rows in piece.rows.values()))
        self._pieces[block] = pieces


class KeepingReader:
    """Gives the pieces that a `BlockReader` gives, those of kept blocks from memory; and keeps blocks as they go by.

    Parameters
    ----------
    kept
        What is kept: of these sets in these bundles alone.
    feature_sets, bundles
        See `BlockReader`.
    """

    def __init__(self, kept: KeptBlocks, feature_sets: Sequence[FeatureSet], bundles: Sequence[Sequence[str]]) -> None:
        self._kept = kept
        self._pieces = len(feature_sets) * len(bundles)
        self._reader = BlockReader(feature_sets, bundles)
        self._info = feature_sets[0].info
        self._row_bytes = 4 * len(feature_sets) * sum(array.features for array in self._info.arrays)

    def read(self, blocks: Iterable[int]) -> Generator[Piece, None, None]:
        """See `BlockReader.read`."""
        blocks = list(blocks)
        with closing(self._reader.read([block for block in blocks if self._kept.find(block) is None])) as streamed:
            for block in blocks:
                yield from self._kept.find(block) or self._keeping(block, islice(streamed, self._pieces))

    def _keeping(self, block: int, pieces: Iterable[Piece]) -> Generator[Piece, None, None]:
        start, stop = self._info.block_range(block)
        keeps = self._kept.has_room((stop - start) * self._row_bytes)
        copies = []
        for piece in pieces:
            if keeps:
                copies.append(replace(piece, rows={name: rows.copy() for name, rows in piece.rows.items()}))
            yield piece
        if keeps:
            self._kept.keep(block, copies)
