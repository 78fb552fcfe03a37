"""Objects, published if absent and read against what a commit record says of them; used by feature sets and artifacts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from gradstore.errors import IntegrityError, ObjectMissingError, StorageError
from gradstore.store.backend import Storage
from gradstore.store.codecs import Payload, checksum, decode_chunk, decode_document, encode_document
from gradstore.store.layout import ArrayLayout, metadata_objects

T = TypeVar("T")
R = TypeVar("R")

# Publishing again is needed only when another writer removed a damaged object at the same moment.
_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectEntry:
    """What a commit record says of an object: its size, and the crc32c of its content as eight hex digits.

    The content of a Zarr chunk is its values without the checksum that the chunk itself ends in.
    """

    bytes: int
    crc32c: str

    def __post_init__(self) -> None:
        if type(self.bytes) is not int or self.bytes < 0 or type(self.crc32c) is not str:
            raise TypeError(f"an object of {self.bytes!r:.60} bytes with crc32c {self.crc32c!r:.60}")


class Entries(dict[str, ObjectEntry]):
    """Objects that a record names; asking it for another is an error of the record.

    Parameters
    ----------
    entries
        By path.
    where, remedy
        Which record, and what to do where it names too few.
    """

    __slots__ = ("_remedy", "_where")

    def __init__(self, entries: Mapping[str, ObjectEntry], where: str, remedy: str) -> None:
        super().__init__(entries)
        self._where, self._remedy = where, remedy

    def __missing__(self, path: str) -> ObjectEntry:
        raise IntegrityError(f"{self._where}: does not name {path}, which is part of what it commits. {self._remedy}")


def publish_object(
    storage: Storage,
    path: str,
    payload: Payload,
    *,
    adopt: bool = True,
    before_replacing: Callable[[], object] = lambda: None,
) -> ObjectEntry:
    """Publish an object unless there is one to be kept, and return what is there now.

    With ``adopt`` a sound object of another attempt is kept, because a record may name it already, though its numbers may
    differ in the last digits; without, only one of equal content. Any other is replaced, unless ``before_replacing`` raises:
    an attempt that slept must not replace what was committed since.
    """
    for _ in range(_ATTEMPTS):
        if storage.publish(path, payload.parts):
            return ObjectEntry(bytes=payload.bytes, crc32c=payload.crc32c)
        storage.forget(path)
        try:
            existing = storage.read(path)
            if (found := payload.inspect(existing)) is None:
                # Perhaps cut short on its way, not damaged: what is sound must not be replaced.
                existing = storage.read(path)
                found = payload.inspect(existing)
        except ObjectMissingError:
            continue
        if found == payload.crc32c or (adopt and found is not None):
            return ObjectEntry(bytes=len(existing), crc32c=found)
        before_replacing()
        storage.delete(path)
    raise StorageError(
        f"{storage.url}/{path}: was removed or found damaged {_ATTEMPTS} times while it was being written. "
        "Check the storage, then run the same command again."
    )


def publish_metadata(storage: Storage, arrays: Mapping[str, ArrayLayout]) -> None:
    """Publish the Zarr metadata of arrays, by path, and of the groups above them, where there is none yet."""
    objects = metadata_objects(arrays)
    in_parallel(lambda path: storage.publish(path, (objects[path],)), objects, threads=storage.concurrency)


def claim_document(storage: Storage, path: str, value: Mapping[str, Any], *, remedy: str) -> dict[str, Any]:
    """Publish a document unless there is one, and return the one that is there: of any number of creators, the first's.

    Raises
    ------
    IntegrityError
        If the one that is there is damaged; ``remedy`` says what to do.
    """
    while (found := read_document(storage, path, remedy=remedy)) is None:
        storage.publish(path, encode_document(value).parts)
    return found


def read_document(storage: Storage, path: str, *, remedy: str) -> dict[str, Any] | None:
    """Return a document, or None if there is none.

    Raises
    ------
    IntegrityError
        If it is damaged; ``remedy`` says what to do.
    """
    try:
        return decode_document(storage.read(path), f"{storage.url}/{path}", remedy)
    except ObjectMissingError:
        return None


def read_object(storage: Storage, path: str, entry: ObjectEntry, *, remedy: str) -> bytes:
    """Read a whole object and check it against its entry.

    Raises
    ------
    ObjectMissingError, IntegrityError
        If it is not there, or not what the entry says; ``remedy`` says what to do.
    """
    with _expected(storage, path, remedy):
        data = storage.read(path)
    if len(data) != entry.bytes or checksum(data) != entry.crc32c:
        raise _damaged(storage, path, remedy)
    return data


class Buffers:
    """Byte buffers that reads borrow and give back: fresh memory would cost more than the read itself."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []

    @contextmanager
    def borrow(self, num_bytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Lend a buffer of ``num_bytes``; other threads get other buffers."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(num_bytes, np.uint8)
        if buffer.size < num_bytes:
            buffer = np.empty(num_bytes, np.uint8)
        try:
            yield buffer[:num_bytes]
        finally:
            self._free.append(buffer)


def read_chunk(
    storage: Storage, path: str, entry: ObjectEntry, layout: ArrayLayout, buffer: npt.NDArray[np.uint8], *, remedy: str
) -> npt.NDArray[Any]:
    """Read a chunk into ``buffer`` (at least ``layout.buffer_bytes`` long) and return its values as a view of it.

    Raises
    ------
    ObjectMissingError, IntegrityError
        If it is not there, or its size or checksum is not its own or not the record's; ``remedy`` says what to do.
    """
    # The values of a compressed chunk come first, where their type finds its alignment.
    spare = layout.buffer_bytes - layout.chunk_bytes
    stored = buffer[spare : spare + layout.chunk_bytes]
    with _expected(storage, path, remedy):
        size = storage.read_into(path, stored.data)
    decoded = decode_chunk(stored[:size], layout, buffer[:spare])
    if decoded is None or decoded[1] != entry.crc32c:
        raise _damaged(storage, path, remedy)
    return decoded[0]


def in_parallel(function: Callable[[T], R], items: Iterable[T], *, threads: int) -> list[R]:
    """Results of ``function`` for every item, in order; with one thread, one after another in this one.

    When one fails, those not yet begun are not begun, and its error is raised when the others have ended.
    """
    items = list(items)
    if threads <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _expected(storage: Storage, path: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except ObjectMissingError as error:
        raise ObjectMissingError(f"{storage.url}/{path}: is missing, though it was committed. {remedy}") from error


def _damaged(storage: Storage, path: str, remedy: str) -> IntegrityError:
    return IntegrityError(f"{storage.url}/{path}: its bytes are not those that were committed. {remedy}")
