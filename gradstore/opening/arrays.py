"""Arrays of a store that read, when values are asked for, only the chunks that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from xarray.backends import BackendArray
from xarray.core import indexing

from gradstore.errors import SupersededError
from gradstore.store.artifacts import ContributionArtifact, ScoreMatrixArtifact
from gradstore.store.backend import open_storage
from gradstore.store.blocks import Buffers, in_parallel
from gradstore.store.features import FeatureSet, FeatureStore

# Sets and artifacts that a process keeps open, each with its buffers; one that falls out is opened again when it is read.
_KEPT_OPEN: Final = 8

Values = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What `open` found, as plain values: pickling an array sends this, and whoever reads opens the store himself.

    Attributes
    ----------
    url
        The store.
    names
        (set, member) of features, (kernel, set) of contributions, (kernel.weights, set) of scores.
    generations
        (block, generation) of the committed blocks; of others nothing is read.
    opening
        Tells one opening from another, so that a store that was made anew at the same URL is not mistaken for the old.
    """

    url: str
    names: tuple[str, str]
    generations: tuple[tuple[int, int], ...]
    opening: str


class ChunkReader(Protocol):
    """Reads the chunks of one array."""

    def concurrency(self) -> int:
        """Chunks worth having in flight at once."""

    def read(self, index: tuple[int, ...], take: Callable[[Values], None]) -> None:
        """Give a chunk's values to ``take``, less than a whole chunk where the array ends; not, if it is not committed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupChunks:
    """Chunks of one group's features: the blocks of a set."""

    snapshot: Snapshot
    group: str
    features: int

    def concurrency(self) -> int:
        """See `ChunkReader.concurrency`."""
        return _opened_features(self.snapshot)[0].storage.concurrency

    def read(self, index: tuple[int, ...], take: Callable[[Values], None]) -> None:
        """See `ChunkReader.read`."""
        feature_set, committed, buffers = _opened_features(self.snapshot)
        block = index[0]
        if block not in committed:
            return
        extent = (feature_set.info.block_rows, self.features)
        with buffers.borrow(int(np.prod(extent)) * 4) as buffer:
            out = buffer.view(np.float32).reshape(extent)
            take(feature_set.read_block(block, [self.group], {self.group: out})[self.group])


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionChunks:
    """Chunks of contributions: a tile of queries in a block of examples, all groups."""

    snapshot: Snapshot

    def concurrency(self) -> int:
        """See `ChunkReader.concurrency`."""
        return _opened_contributions(self.snapshot)[0].storage.concurrency

    def read(self, index: tuple[int, ...], take: Callable[[Values], None]) -> None:
        """See `ChunkReader.read`."""
        artifact, committed, buffers = _opened_contributions(self.snapshot)
        tile, block, _ = index
        if block not in committed:
            return
        shape = artifact.shape
        first, last = tile * shape.query_tile, min((tile + 1) * shape.query_tile, shape.queries)
        extent = (last - first, shape.block_rows, len(shape.groups))
        with buffers.borrow(int(np.prod(extent)) * 4) as buffer:
            take(artifact.read(first, last, block, buffer.view(np.float32).reshape(extent)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreChunks:
    """Chunks of a score matrix: all queries, in a block of examples."""

    snapshot: Snapshot

    def concurrency(self) -> int:
        """See `ChunkReader.concurrency`."""
        return _opened_scores(self.snapshot)[0].storage.concurrency

    def read(self, index: tuple[int, ...], take: Callable[[Values], None]) -> None:
        """See `ChunkReader.read`."""
        artifact, committed = _opened_scores(self.snapshot)
        _, block = index
        if block in committed:
            take(artifact.read(block))


class LazyArray(BackendArray):
    """A float32 array of a store as xarray takes it; NaN where nothing is committed.

    Parameters
    ----------
    chunks
        Reads its chunks.
    shape, chunk_shape
        Of the array, and of a whole chunk.
    """

    def __init__(self, chunks: ChunkReader, shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.dtype = np.dtype(np.float32)
        self._chunks = chunks
        self._chunk_shape = chunk_shape

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> Any:
        """Values at the places that ``key`` names along each axis: an integer, a slice or an array of integers."""
        places = [np.arange(length)[part] for length, part in zip(self.shape, key, strict=True)]
        axes = [np.atleast_1d(part) for part in places]
        found = np.full([part.size for part in axes], np.nan, np.float32)
        pieces = [list(_pieces(part, chunk)) for part, chunk in zip(axes, self._chunk_shape, strict=True)]

        def read(one: tuple[_Piece, ...]) -> None:
            def take(values: Values) -> None:
                ends = zip(one, values.shape, strict=True)
                kept = [piece.within < end for piece, end in ends]
                source = _selection([piece.within[mask] for piece, mask in zip(one, kept, strict=True)])
                target = _selection([piece.places[mask] for piece, mask in zip(one, kept, strict=True)])
                found[target] = values[source]

            self._chunks.read(tuple(piece.chunk for piece in one), take)

        in_parallel(read, product(*pieces), threads=self._chunks.concurrency() if found.size else 1)
        return found.reshape([part.size for part in places if part.ndim])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """What one chunk holds of the indices asked for along an axis: their places in the result and within the chunk."""

    chunk: int
    places: Indices
    within: Indices


def _pieces(wanted: Indices, chunk: int) -> Iterator[_Piece]:
    numbers = wanted // chunk
    order = np.argsort(numbers, kind="stable")
    for places in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
        if places.size:
            number = int(numbers[places[0]])
            yield _Piece(chunk=number, places=places, within=wanted[places] - number * chunk)


def _selection(axes: list[Indices]) -> tuple[Any, ...]:
    """Return what numpy takes to select the product of indices: slices, several times as fast, where each is a run."""
    if all(part.size and (np.diff(part) == 1).all() for part in axes):
        return tuple(slice(int(part[0]), int(part[-1]) + 1) for part in axes)
    return np.ix_(*axes)


@lru_cache(maxsize=_KEPT_OPEN)
def _opened_features(snapshot: Snapshot) -> tuple[FeatureSet, frozenset[int], Buffers]:
    feature_set = FeatureStore.open(snapshot.url).open_set(*snapshot.names)
    return feature_set, _unchanged(snapshot, feature_set.info.folder, feature_set.log.pin()), Buffers()


@lru_cache(maxsize=_KEPT_OPEN)
def _opened_contributions(snapshot: Snapshot) -> tuple[ContributionArtifact, frozenset[int], Buffers]:
    artifact = ContributionArtifact.open(open_storage(snapshot.url), *snapshot.names)
    return artifact, _unchanged(snapshot, artifact.folder, artifact.log.pin()), Buffers()


@lru_cache(maxsize=_KEPT_OPEN)
def _opened_scores(snapshot: Snapshot) -> tuple[ScoreMatrixArtifact, frozenset[int]]:
    artifact = ScoreMatrixArtifact.open(open_storage(snapshot.url), *snapshot.names)
    return artifact, _unchanged(snapshot, artifact.folder, artifact.log.pin())


def _unchanged(snapshot: Snapshot, folder: str, now: Mapping[int, int]) -> frozenset[int]:
    """Return the blocks of a snapshot, each of which is read in the snapshot's generation by what was just opened."""
    changed = [block for block, generation in snapshot.generations if now.get(block) != generation]
    if changed:
        raise SupersededError(
            f"{snapshot.url}/{folder}: {len(changed)} blocks, block {changed[0]} among them, were erased or repaired "
            "since the dataset was opened. Open it again."
        )
    return frozenset(block for block, _ in snapshot.generations)
