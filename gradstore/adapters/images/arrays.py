"""Images in arrays: IDX files (MNIST and its kin) and npz archives, read row by row."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gradstore.adapters.files import Files, some
from gradstore.adapters.images.entries import Entry
from gradstore.adapters.locations import resolve_location
from gradstore.errors import DataError, SpecError
from gradstore.spec import SplitSection

_IDX_TYPES: Final = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_DAMAGED: Final = (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """An array behind a stream that stands at its first value; rows are read one after the other."""

    stream: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    where: str

    def read(self, places: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the rows at ascending places."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        next_place = 0
        for place in places:
            # Relative, as a stream that is unpacked has no other way; it reads what it passes.
            self.stream.seek((place - next_place) * row_bytes, 1)
            content = self.stream.read(row_bytes)
            if len(content) < row_bytes:
                raise DataError(f"{self.where} ends in its row {place:,} of {self.shape[0]:,}. Fetch or copy it again.")
            yield np.frombuffer(content, self.dtype).reshape(self.shape[1:])
            next_place = place + 1

    def all(self) -> np.ndarray:
        """The whole array; for labels."""
        content = self.stream.read(math.prod(self.shape) * self.dtype.itemsize)
        if len(content) < math.prod(self.shape) * self.dtype.itemsize:
            raise DataError(f"{self.where} is shorter than its header says. Fetch or copy it again.")
        return np.frombuffer(content, self.dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdxImages:
    """An IDX file of images, plain or packed (.gz), and one of labels beside it."""

    split: SplitSection
    key: str

    names: tuple[str, ...] | None = None

    def entries(self) -> list[Entry]:
        """Return every image's name and label, in order; no image is read."""
        if self.split.label is not None or self.split.id is not None:
            raise SpecError(
                f"{self.key}: IDX files have no columns. Found label = {self.split.label!r}, id = {self.split.id!r}; "
                "accepted: labels = the file of labels."
            )
        with self._rows(self.split.source, "source") as images:
            count, name = images.shape[0], images.where
        labels: Sequence[Any] = [None] * count
        if self.split.labels is not None:
            with self._rows(self.split.labels, "labels") as rows:
                if len(rows.shape) != 1 or rows.dtype.kind not in "iu":
                    raise DataError(f"{self.key}.labels: {rows.where} is {list(rows.shape)}, not a list of integers.")
                labels = rows.all().tolist()
        if len(labels) != count:
            raise DataError(
                f"{self.key}.labels: {self.split.labels} has {len(labels):,} labels, {self.split.source} {count:,} images. "
                "Name the two files that belong together."
            )
        return [Entry(image_id=f"{name}:{row}", label=label) for row, label in enumerate(labels)]

    def pixels(self, places: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the images at ascending places."""
        with self._rows(self.split.source, "source") as images:
            yield from images.read(places)

    @contextmanager
    def _rows(self, source: str, option: str) -> Iterator[_Rows]:
        files = Files.open(resolve_location(source, f"{self.key}.{option}"), self.key, ())
        if len(files.paths) != 1:
            raise DataError(f"{self.key}.{option}: {source} is a folder; name one IDX file of it: {some(files.names)}.")
        with _sound(f"{self.key}.{option}: {source}"), files.opened(files.paths[0], "infer") as file:
            header = file.read(4)
            dtype = np.dtype(_IDX_TYPES[header[2]]) if len(header) == 4 and header[2] in _IDX_TYPES else None
            if dtype is None or header[:2] != b"\0\0":
                raise DataError(f"{self.key}.{option}: {source} is no IDX file: it begins with {header!r}.")
            shape = np.frombuffer(file.read(4 * header[3]), ">u4")
            if len(shape) != header[3]:
                raise DataError(f"{self.key}.{option}: {source} ends in its header. Fetch or copy it again.")
            where = files.names[0]
            yield _Rows(stream=file, shape=tuple(shape.tolist()), dtype=dtype, where=where)


@dataclass(frozen=True, slots=True, kw_only=True)
class NpzImages:
    """An npz archive with an array of images and one of labels, of the names that run.toml gives."""

    split: SplitSection
    key: str

    names: tuple[str, ...] | None = None

    def entries(self) -> list[Entry]:
        """Return every image's name and label, in order; no image is read."""
        with self._archive() as (archive, name):
            with self._rows(archive, name, "image", self.split.image) as images:
                count = images.shape[0]
            label = self.split.label or "label"
            labels = self._column(archive, name, "label", label, count)
            ids = self._column(archive, name, "id", self.split.id, count)
        if any(not isinstance(value, int | str) for value in labels):
            raise DataError(f"{self.key}.label: array {label!r} of {name} holds neither integers nor texts.")
        identifiers = [f"{name}:{row}" for row in range(count)] if self.split.id is None else list(map(str, ids))
        return [
            Entry(image_id=image_id, label=value or None if isinstance(value, str) else value)
            for image_id, value in zip(identifiers, labels, strict=True)
        ]

    def pixels(self, places: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the images at ascending places."""
        with (
            self._archive() as (archive, name),
            self._rows(archive, name, "image", self.split.image) as images,
        ):
            yield from images.read(places)

    @contextmanager
    def _archive(self) -> Iterator[tuple[zipfile.ZipFile, str]]:
        files = Files.open(resolve_location(self.split.source, f"{self.key}.source"), self.key, (".npz",))
        if len(files.paths) != 1:
            raise DataError(f"{self.key}.source: {self.split.source} holds several archives: {some(files.names)}.")
        with _sound(f"{self.key}.source: {self.split.source}"), files.opened(files.paths[0]) as file:
            yield zipfile.ZipFile(file), files.names[0]

    @contextmanager
    def _rows(self, archive: zipfile.ZipFile, name: str, option: str, array: str) -> Iterator[_Rows]:
        found = [member.removesuffix(".npy") for member in archive.namelist()]
        if array not in found:
            raise DataError(f"{self.key}.{option}: {name} has no array {array!r}; it has: {', '.join(found)}.")
        with archive.open(f"{array}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = read(stream)
            if dtype.hasobject or (by_column and len(shape) > 1) or not shape:
                raise DataError(
                    f"{self.key}.{option}: array {array!r} of {name} is {dtype} {list(shape)}"
                    f"{' in column order' if by_column else ''}; accepted: plain rows. Save it with np.ascontiguousarray."
                )
            yield _Rows(stream=stream, shape=shape, dtype=dtype, where=f"array {array!r} of {name}")

    def _column(self, archive: zipfile.ZipFile, name: str, option: str, array: str | None, count: int) -> list[Any]:
        if array is None:
            return [None] * count
        with self._rows(archive, name, option, array) as rows:
            if rows.shape != (count,):
                raise DataError(
                    f"{self.key}.{option}: array {array!r} of {name} is {list(rows.shape)}; {self.split.image!r} has "
                    f"{count:,} images."
                )
            values: list[Any] = rows.all().tolist()
            return values


@contextmanager
def _sound(where: str) -> Iterator[None]:
    """Turn what readers raise about a damaged file into one error."""
    try:
        yield
    except _DAMAGED as error:
        raise DataError(f"{where} cannot be read: {type(error).__name__}: {error}. Fetch or copy it again.") from error
