"""Objects that were read from afar, kept on a disk nearby up to a limit."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final
from uuid import uuid4

from gradstore.errors import SpecError
from gradstore.store.backend.directory import fill
from gradstore.store.backend.protocol import ObjectInfo, Part, Range, Storage, is_document

DEFAULT_LIMIT_BYTES: Final = 10 * 10**9
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?)b?", re.IGNORECASE)

# Bytes of all copies, as far as the processes have told, which lock it in turn.
_COUNT: Final = "bytes"
# Room is made for a share of the limit at a time, so that not every read walks the folder.
_SPARE_SHARE: Final = 0.1
# No reader takes longer for one object: such a temporary file was left by one that died.
_ABANDONED_SECONDS: Final = 3600.0


class CachedStorage:
    """Reads objects through a folder of copies; writes and listings go to the storage itself.

    A copy is a file that bears the hash of the object's URL as its name, written to a temporary file and renamed. Several
    processes and stores may share a folder. Copies are removed, those first that were read the longest time ago, before
    they would exceed the limit; they exceed it by what is being read at that moment at most. Documents are not kept: they
    are small, and some are replaced.

    Nothing vouches for a copy: it may be torn, or of an object that was replaced since. The checksums of the reader tell;
    it calls `forget` and reads again. Where the folder cannot be written, as on a full disk, reads go on without copies,
    after one warning.

    Parameters
    ----------
    storage
        The storage itself.
    folder
        Of the copies; made if need be.
    limit_bytes
        Of all copies in the folder.
    """

    def __init__(self, storage: Storage, folder: Path, limit_bytes: int) -> None:
        self._storage = storage
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._warned = False
        self.url = storage.url
        self.concurrency = storage.concurrency
        self.request_bytes = storage.request_bytes

    def __reduce__(self) -> tuple[Callable[[Storage], Storage], tuple[Storage]]:
        # Another machine has a folder of its own.
        return cached, (self._storage,)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        if is_document(path):
            return self._storage.read(path)
        copy = self._copy(path)
        with suppress(OSError):
            data = copy.read_bytes()
            os.utime(copy)
            return data
        data = self._storage.read(path)
        self._keep(copy, data)
        return data

    def read_into(self, path: str, buffer: memoryview) -> int:
        """See `Storage.read_into`."""
        if is_document(path):
            return self._storage.read_into(path, buffer)
        copy = self._copy(path)
        with suppress(OSError), copy.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            # One that does not fit is torn, or the object was replaced by a smaller one.
            if size <= len(buffer) and fill(file.fileno(), buffer[:size]) == size:
                os.utime(file.fileno())
                return size
        size = self._storage.read_into(path, buffer)
        self._keep(copy, buffer[:size])
        return size

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> None:
        """See `Storage.read_ranges`: of a copy if there is one. Ranges are not kept."""
        copy = self._copy(path)
        with suppress(OSError), copy.open("rb", buffering=0) as file:
            if all(fill(file.fileno(), buffer, start) == len(buffer) for start, buffer in ranges):
                os.utime(file.fileno())
                return
        self._storage.read_ranges(path, ranges)

    def publish(self, path: str, parts: Sequence[Part]) -> bool:
        """See `Storage.publish`."""
        return self._storage.publish(path, parts)

    def replace(self, path: str, parts: Sequence[Part]) -> None:
        """See `Storage.replace`."""
        self._storage.replace(path, parts)
        self.forget(path)

    def forget(self, path: str) -> None:
        """See `Storage.forget`."""
        with suppress(OSError):
            self._copy(path).unlink(missing_ok=True)
        self._storage.forget(path)

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        """See `Storage.list_objects`."""
        return self._storage.list_objects(folder)

    def list_folders(self, folder: str) -> list[str]:
        """See `Storage.list_folders`."""
        return self._storage.list_folders(folder)

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        self._storage.delete(path)
        self.forget(path)

    def sweep(self, folder: str, *, grace_seconds: float = 3600.0, dry_run: bool = False) -> list[ObjectInfo]:
        """See `Storage.sweep`."""
        return self._storage.sweep(folder, grace_seconds=grace_seconds, dry_run=dry_run)

    def _copy(self, path: str) -> Path:
        name = hashlib.sha256(f"{self.url}/{path}".encode()).hexdigest()
        return self._folder / name[:2] / name

    def _keep(self, copy: Path, data: Part) -> None:
        """Keep a copy if there is room for it, or can be."""
        if len(data) > self._limit_bytes:
            return
        temporary = copy.with_name(f"{copy.name}.{uuid4().hex}")
        try:
            self._make_room(len(data))
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                temporary.replace(copy)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"{self._folder}: {error.strerror or error}. Reading goes on without copies there; free space, or "
                    "set GRADSTORE_CACHE to another folder.",
                    stacklevel=2,
                )

    def _make_room(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more, and first remove copies if they would exceed the limit then."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / _COUNT).open("a+b") as count:
            fcntl.flock(count, fcntl.LOCK_EX)
            count.seek(0)
            text = count.read()
            # What is counted and never written, by a process that dies, makes the count too large until the next look.
            kept = int(text) if text.isdigit() else self._limit_bytes
            if kept + num_bytes > self._limit_bytes:
                kept = self._evict(self._limit_bytes - max(num_bytes, int(_SPARE_SHARE * self._limit_bytes)))
            count.truncate(0)
            count.write(b"%d" % (kept + num_bytes))

    def _evict(self, goal_bytes: int) -> int:
        """Remove copies until ``goal_bytes`` are left at most, and return how many are."""
        files = sorted(self._files())
        kept = sum(size for _, size, _ in files)
        for modified, size, file in files:
            # A name with a dot is being written.
            if "." not in file.name:
                if kept <= goal_bytes:
                    continue
            elif modified > time.time() - _ABANDONED_SECONDS:
                continue
            file.unlink(missing_ok=True)
            kept -= size
        return kept

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """When each file of the folder was last read, its size, and where it is."""
        for file in self._folder.glob("*/*"):
            with suppress(FileNotFoundError):
                status = file.stat()
                yield status.st_mtime, status.st_size, file


def cached(storage: Storage) -> Storage:
    """Return a storage that reads through ``GRADSTORE_CACHE``, if that is set; ``storage`` itself if not.

    Raises
    ------
    SpecError
        If ``GRADSTORE_CACHE_BYTES`` is no size.
    """
    folder = os.environ.get("GRADSTORE_CACHE")
    if not folder:
        return storage
    text = os.environ.get("GRADSTORE_CACHE_BYTES")
    limit = DEFAULT_LIMIT_BYTES if text is None else _size(text)
    # GRADSTORE_CACHE holds other files that can be made again, too.
    return CachedStorage(storage, Path(folder).expanduser().absolute() / "objects", limit)


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise SpecError(f"GRADSTORE_CACHE_BYTES: found {text!r}; accepted: a size such as 50GB, 500MB or 20GiB.")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " "))
