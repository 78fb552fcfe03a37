"""The chunks of a block: features as they are stored in the set's dtype, and read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradstore.errors import IntegrityError
from gradstore.store.blocks import Buffers, ObjectEntry, in_parallel, read_chunk
from gradstore.store.codecs import Payload, decode_chunk, encode_chunk
from gradstore.store.commits import CommitLog, Record
from gradstore.store.dtypes import DTYPES, Rounding, Scale
from gradstore.store.features.info import FeatureArray, SetInfo
from gradstore.store.layout import ArrayLayout, chunk_path

Put = Callable[[str, Payload], ObjectEntry]
"""Stores an object of a block, by its path in the storage, and returns what is there now."""
Features = Mapping[str, npt.NDArray[np.float32]]

# Blocks whose scales are kept while their groups are read one after another.
KEPT_SCALES: Final = 4
# Bytes that come in the time of a request, up to which no other is sent meanwhile.
_QUICK_REQUEST: Final = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenChunks:
    """The chunks of a block that were stored.

    Attributes
    ----------
    objects
        Their entries, by path inside the set.
    rounding
        What of the numbers was lost.
    saturated_groups
        Groups in which some number was beyond the range of the dtype.
    finite_rows
        Rows of the block, bool, in which every feature is finite.
    """

    objects: Mapping[str, ObjectEntry]
    rounding: Rounding
    saturated_groups: Sequence[str]
    finite_rows: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """The chunk of one group; ``scale`` is its rows' or the whole array's."""

    entry: ObjectEntry
    scale: Scale
    rounding: Rounding
    finite_rows: npt.NDArray[np.bool_] | None


class FeatureChunks:
    """Writes and reads the chunks of one member of a feature set, by several threads at once.

    Parameters
    ----------
    info, member
        The set, and which of its members.
    log
        The commit records of the member's blocks.
    buffers
        The memory that chunks are encoded in and read into.
    """

    def __init__(self, info: SetInfo, member: str, log: CommitLog, buffers: Buffers) -> None:
        self._storage = log.storage
        self._info = info
        self._member = member
        self._log = log
        self._dtype = DTYPES[info.dtype]
        self._arrays = {array.name: array for array in info.arrays}
        self._columns = {array.name: column for column, array in enumerate(info.arrays)}
        self._scales_layout = info.scales_layout()
        self._buffers = buffers
        self._kept_scales = lru_cache(maxsize=KEPT_SCALES)(self._read_scales)
        # Attributes and an encoded name cost as much as reading a small chunk.
        self._layout = cache(lambda name: info.array_layout(self._arrays[name]))
        self._array_path = cache(lambda name: info.array_path(member, name))

    def write(self, block: int, features: Features, put: Put) -> WrittenChunks:
        """Encode the features of a block, float32 [rows, k_j] of every group, and store each chunk with ``put``."""
        arrays = self._info.arrays
        written = in_parallel(
            lambda array: self._write_group(block, array, features[array.name], put),
            arrays,
            threads=self._storage.concurrency,
        )
        objects = {self._path(array.name, block): item.entry for array, item in zip(arrays, written, strict=True)}
        if self._scales_layout is not None:
            path = chunk_path(self._info.scales_path(self._member), block, 0)
            scales = np.stack([np.asarray(item.scale, np.float32) for item in written], axis=1)
            objects[path] = put(self._place(path), encode_chunk(scales, self._scales_layout))
        finite_rows = np.ones(len(next(iter(features.values()))), bool)
        for item in written:
            if item.finite_rows is not None:
                finite_rows &= item.finite_rows
        return WrittenChunks(
            objects=objects,
            rounding=sum((item.rounding for item in written), Rounding()),
            saturated_groups=[
                array.name for array, item in zip(arrays, written, strict=True) if item.rounding.saturated
            ],
            finite_rows=finite_rows,
        )

    def read(self, record: Record, into: Features) -> None:
        """Read groups of a committed block into contiguous float32 arrays [rows, k_j], checksums verified.

        Raises
        ------
        SupersededError
            If the block was taken back since the record was read.
        ObjectMissingError, IntegrityError
            If a chunk is missing, or not what the record says.
        """
        # Once and before the groups, each of which would read them otherwise.
        scales = None if self._scales_layout is None else self._kept_scales(record.unit, record.generation)

        def read_group(name: str) -> None:
            path, layout = self._path(name, record.unit), self._layout(name)
            with self._buffers.borrow(layout.buffer_bytes) as buffer:
                stored = self._read_into(record, path, layout, buffer)
                self._decode(name, stored, scales, into[name])

        in_parallel(read_group, into, threads=self._storage.concurrency)

    def read_rows(self, record: Record, rows: Sequence[int], into: Features) -> None:
        """Read some rows of groups of a committed block into contiguous float32 arrays [rows, k_j].

        Where it takes less, these rows alone are read of a chunk, and its checksum, which is of the whole, says nothing of
        them: the caller must know one of every row.

        It raises what `read` does.
        """
        scales = None if self._scales_layout is None else self._kept_scales(record.unit, record.generation)[rows]

        def read_ranges(name: str) -> None:
            layout, place = self._layout(name), self._place(self._path(name, record.unit))
            stored = np.empty((len(rows), *layout.chunk_shape[1:]), layout.stored_dtype)
            a_row, memory = stored[0].nbytes, stored.data.cast("B")
            ranges = [(a_row * row, memory[a_row * at : a_row * (at + 1)]) for at, row in enumerate(rows)]
            self._log.read(record, place, lambda: self._storage.read_ranges(place, ranges))
            self._decode(name, stored, scales, into[name])

        def read_whole(name: str) -> None:
            layout = self._layout(name)
            with self._buffers.borrow(layout.buffer_bytes) as buffer:
                stored = self._read_into(record, self._path(name, record.unit), layout, buffer)
                self._decode(name, stored[rows], scales, into[name])

        ranged = [name for name in into if self._takes_less(self._layout(name), len(rows))]
        # Requests that take little are not worth a thread.
        waiting = self._storage.request_bytes > _QUICK_REQUEST
        in_parallel(read_ranges, ranged, threads=self._storage.concurrency if waiting else 1)
        in_parallel(read_whole, [name for name in into if name not in ranged], threads=self._storage.concurrency)

    def _takes_less(self, layout: ArrayLayout, rows: int) -> bool:
        """Whether reading rows by ranges takes less than reading the chunk; compressed ones have no ranges."""
        a_row = layout.raw_bytes // layout.chunk_shape[0]
        asked = self._storage.request_bytes
        return layout.compression == "none" and rows * (a_row + asked) < layout.raw_bytes + asked

    @property
    def are_as_they_read(self) -> bool:
        """Whether the bytes of a chunk are the float32 numbers that it reads as, before its checksum."""
        return self._info.dtype == "float32" and self._info.compression == "none"

    def read_in_place(self, record: Record, name: str, memory: npt.NDArray[np.uint8]) -> None:
        """Read a group of a committed block, whose chunks are as they read, to the beginning of a chunk's memory.

        It raises what `read` does.
        """
        assert self.are_as_they_read, "chunks are converted"
        self._read_into(record, self._path(name, record.unit), self._layout(name), memory)

    def read_as_they_are(self, block: int, into: Features) -> dict[str, str]:
        """Read groups of a block that no record speaks for, each chunk sound in itself; return its crc32c, by path.

        Raises
        ------
        ObjectMissingError, IntegrityError
            If a chunk is missing or damaged.
        """
        scales = None
        if self._scales_layout is not None:
            path = chunk_path(self._info.scales_path(self._member), block, 0)
            scales, _ = self._read_alone(path, self._scales_layout)
        crcs = {}
        for name, out in into.items():
            path = self._path(name, block)
            stored, crcs[path] = self._read_alone(path, self._layout(name))
            self._decode(name, stored, scales, out)
            if scales is not None:
                # Where the scales are still those of before.
                out[(stored[: len(out)] == self._layout(name).fill_value).all(axis=1)] = np.nan
        return crcs

    def _write_group(self, block: int, array: FeatureArray, values: npt.NDArray[np.float32], put: Put) -> _Group:
        layout, scale = self._layout(array.name), self._dtype.scale_of(values, array.scale)
        with self._buffers.borrow(layout.raw_bytes) as buffer:
            chunk = buffer.view(layout.stored_dtype).reshape(layout.chunk_shape)
            rounding = self._dtype.encode(values, scale, chunk[: len(values)])
            chunk[len(values) :] = layout.fill_value
            entry = put(self._place(self._path(array.name, block)), encode_chunk(chunk, layout))
        finite_rows = None if rounding.finite else np.logical_and.reduce(np.isfinite(values), axis=1)
        return _Group(entry=entry, scale=scale, rounding=rounding, finite_rows=finite_rows)

    def _read_scales(self, block: int, generation: int) -> npt.NDArray[np.float32]:
        """Scales [rows of a chunk, groups] of a block, in memory of their own."""
        assert self._scales_layout is not None
        path = chunk_path(self._info.scales_path(self._member), block, 0)
        buffer = np.empty(self._scales_layout.buffer_bytes, np.uint8)
        return self._read_into(self._log.record(block, generation), path, self._scales_layout, buffer)

    def _read_into(
        self, record: Record, path: str, layout: ArrayLayout, buffer: npt.NDArray[np.uint8]
    ) -> npt.NDArray[Any]:
        place, entry, remedy = self._place(path), record.objects[path], self._log.remedy()
        return self._log.read(
            record, place, lambda: read_chunk(self._storage, place, entry, layout, buffer, remedy=remedy)
        )

    def _read_alone(self, path: str, layout: ArrayLayout) -> tuple[npt.NDArray[Any], str]:
        place = self._place(path)
        # A kept copy may be of an earlier generation, and sound in itself.
        self._storage.forget(place)
        decoded = decode_chunk(np.frombuffer(self._storage.read(place), np.uint8), layout)
        if decoded is None:
            raise IntegrityError(f"{self._storage.url}/{place}: is damaged. {self._log.remedy()}")
        return decoded

    def _decode(
        self,
        name: str,
        stored: npt.NDArray[Any],
        scales: npt.NDArray[np.float32] | None,
        out: npt.NDArray[np.float32],
    ) -> None:
        rows = len(out)
        scale = self._arrays[name].scale if scales is None else scales[:rows, self._columns[name]]
        self._dtype.decode(stored[:rows], scale, out)

    def _path(self, name: str, block: int) -> str:
        return chunk_path(self._array_path(name), block, 0)

    def _place(self, path: str) -> str:
        return f"{self._info.folder}/{path}"
