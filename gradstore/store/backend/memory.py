"""Storage in this process's memory, for tests."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import cache
from threading import Lock

from gradstore.errors import IntegrityError, ObjectMissingError
from gradstore.store.backend.protocol import ObjectInfo, Part, Range, ends_early


class MemoryStorage:
    """Objects in a dictionary that every storage of the same name in this process shares."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._objects, self._lock = _objects(name)
        self.url = f"memory://{name}"
        self.concurrency = 1
        self.request_bytes = 0

    def __reduce__(self) -> tuple[type[MemoryStorage], tuple[str]]:
        return MemoryStorage, (self._name,)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        try:
            return self._objects[path][0]
        except KeyError:
            raise ObjectMissingError(f"{self.url}/{path}: no such object.") from None

    def read_into(self, path: str, buffer: memoryview) -> int:
        """See `Storage.read_into`."""
        data = self.read(path)
        if len(data) > len(buffer):
            raise IntegrityError(f"{self.url}/{path}: has {len(data)} bytes; at most {len(buffer)} belong there.")
        buffer[: len(data)] = data
        return len(data)

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> None:
        """See `Storage.read_ranges`."""
        data = self.read(path)
        for start, buffer in ranges:
            stop = start + len(buffer)
            if stop > len(data):
                raise ends_early(f"{self.url}/{path}", len(data), stop)
            buffer[:] = data[start:stop]

    def publish(self, path: str, parts: Sequence[Part]) -> bool:
        """See `Storage.publish`."""
        data = b"".join(parts)
        with self._lock:
            absent = path not in self._objects
            if absent:
                self._objects[path] = data, time.time()
        return absent

    def replace(self, path: str, parts: Sequence[Part]) -> None:
        """See `Storage.replace`."""
        with self._lock:
            self._objects[path] = b"".join(parts), time.time()

    def forget(self, path: str) -> None:
        """See `Storage.forget`; no copies are kept."""

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        """See `Storage.list_objects`."""
        start = f"{folder}/" if folder else ""
        for path, (data, modified) in self._objects.copy().items():
            if path.startswith(start):
                yield ObjectInfo(path=path, bytes=len(data), modified=modified)

    def list_folders(self, folder: str) -> list[str]:
        """See `Storage.list_folders`."""
        start = len(folder) + 1 if folder else 0
        below = (info.path[start:] for info in self.list_objects(folder))
        return sorted({path.partition("/")[0] for path in below if "/" in path})

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        self._objects.pop(path, None)

    def sweep(self, folder: str, *, grace_seconds: float = 3600.0, dry_run: bool = False) -> list[ObjectInfo]:
        """See `Storage.sweep`; a writer that dies leaves nothing here."""
        return []


@cache
def _objects(name: str) -> tuple[dict[str, tuple[bytes, float]], Lock]:
    """Objects of one name, each with the time it was written, and the lock of their writers: the same for the life of the process."""
    return {}, Lock()
