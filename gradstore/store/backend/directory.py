"""A directory as storage."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Final
from uuid import uuid4

from gradstore.errors import IntegrityError, ObjectMissingError, StorageError
from gradstore.store.backend.protocol import ObjectInfo, Part, Range, ends_early, is_document

# A writer that dies leaves its temporary file behind; no listing shows it, and no reader opens it.
TEMPORARY: Final = ".gradstore-"

# The kernel takes no more parts at once.
_PARTS_AT_ONCE: Final = 1024

# What is read in the time that a call takes: about a page.
_REQUEST_BYTES: Final = 4096

_REMEDIES: Final = {
    errno.EACCES: "Give this user access to the directory, or choose another run.store.",
    errno.EPERM: "The file system must allow hard links to this user; choose another run.store.",
    errno.ENOTSUP: "The file system must have hard links; choose another run.store.",
    errno.EROFS: "The file system is read-only; choose another run.store.",
    errno.ENOSPC: "Free space on the disk, then run the same command again.",
    errno.EDQUOT: "Free space in the quota, then run the same command again.",
    errno.ENOTDIR: "A file stands where the store needs a folder; choose another run.store.",
    errno.EEXIST: "A file stands where the store needs a folder; choose another run.store.",
}


class DirectoryStorage:
    """Objects as files below a directory.

    An object is written to a temporary file beside its place, synced to the disk, and given its name by a hard link,
    which fails where the name exists: that is put-if-absent without a lock, also between machines that share the disk.

    Names are durable when their folders are synced. That happens before a document is published, for all folders that
    changed since the last one, because a commit record must not outlive the names that it lists: a block of 224 objects
    then waits for the journal of the disk a few times instead of 448.

    Parameters
    ----------
    root
        The directory; absolute.
    durable
        False to sync nothing. That is faster; after a power failure objects may be lost or torn, which checksums show.
        A process that is killed harms nothing either way.
    """

    def __init__(self, root: Path, durable: bool = True) -> None:
        self._root = root
        self._durable = durable
        self._unsynced: set[Path] = set()
        self._changing = Lock()
        self._syncing = Lock()
        # Folders that are there, as far as this storage knows, and whose own names it has noted to be synced.
        self._parents: set[Path] = set()
        self.url = str(root)
        self.concurrency = 4
        self.request_bytes = _REQUEST_BYTES

    def __reduce__(self) -> tuple[type[DirectoryStorage], tuple[Path, bool]]:
        return DirectoryStorage, (self._root, self._durable)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        with self._explained(path):
            return (self._root / path).read_bytes()

    def read_into(self, path: str, buffer: memoryview) -> int:
        """See `Storage.read_into`."""
        with self._explained(path), _opened(self._root / path, os.O_RDONLY) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > len(buffer):
                raise IntegrityError(f"{self.url}/{path}: has {size} bytes; at most {len(buffer)} belong there.")
            return fill(descriptor, buffer[:size])

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> None:
        """See `Storage.read_ranges`."""
        with self._explained(path), _opened(self._root / path, os.O_RDONLY) as descriptor:
            # The disk fetches all while the first is read: threads would wait for each other instead of it.
            if hasattr(os, "posix_fadvise"):
                for start, buffer in ranges:
                    os.posix_fadvise(descriptor, start, len(buffer), os.POSIX_FADV_WILLNEED)
            for start, buffer in ranges:
                done = fill(descriptor, buffer, start)
                if done < len(buffer):
                    raise ends_early(f"{self.url}/{path}", start + done, start + len(buffer))

    def publish(self, path: str, parts: Sequence[Part]) -> bool:
        """See `Storage.publish`."""

        def link_if_absent(target: Path) -> bool:
            if target.exists():
                return False
            with self._written(target.parent, parts) as temporary:
                try:
                    target.hardlink_to(temporary)
                except FileExistsError:
                    return False
            return True

        return self._change(path, link_if_absent)

    def replace(self, path: str, parts: Sequence[Part]) -> None:
        """See `Storage.replace`."""

        def rename(target: Path) -> bool:
            with self._written(target.parent, parts) as temporary:
                temporary.replace(target)
            return True

        self._change(path, rename)

    def forget(self, path: str) -> None:
        """See `Storage.forget`; no copies are kept."""

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        """See `Storage.list_objects`."""
        with self._explained(folder):
            for entry in _entries(self._root / folder):
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    yield from self.list_objects(path)
                elif (info := _info(path, entry)) is not None:
                    yield info

    def list_folders(self, folder: str) -> list[str]:
        """See `Storage.list_folders`."""
        with self._explained(folder):
            return sorted(entry.name for entry in _entries(self._root / folder) if entry.is_dir())

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        target = self._root / path
        with self._explained(path):
            if target.exists():
                target.unlink(missing_ok=True)
                self._sync(target.parent)

    def sweep(self, folder: str, *, grace_seconds: float = 3600.0, dry_run: bool = False) -> list[ObjectInfo]:
        """See `Storage.sweep`."""
        abandoned = []
        with self._explained(folder):
            for info in self._temporary_files(folder):
                if info.modified < time.time() - grace_seconds:
                    abandoned.append(info)
                    if not dry_run:
                        (self._root / info.path).unlink(missing_ok=True)
        return abandoned

    def _temporary_files(self, folder: str) -> Iterator[ObjectInfo]:
        for parent, _, _ in os.walk(self._root / folder):
            with os.scandir(parent) as entries:
                for entry in entries:
                    if entry.name.startswith(TEMPORARY):
                        path = Path(entry.path).relative_to(self._root).as_posix()
                        if (info := _info(path, entry)) is not None:
                            yield info

    def _change(self, path: str, change: Callable[[Path], bool]) -> bool:
        """Make a change at a path, and its folder if there is none; a document waits until all before it is durable."""
        target = self._root / path
        document = is_document(path)
        with self._explained(path):
            if document:
                self._sync()
            try:
                self._make_folder(target.parent)
                changed = change(target)
            except FileNotFoundError:
                # Somebody has removed folders that this storage knew.
                self._parents.clear()
                self._make_folder(target.parent)
                changed = change(target)
            # Also when another writer won: a record that names its object must not outlive the object's name.
            self._note(target.parent)
            if document:
                self._sync()
        return changed

    @contextmanager
    def _written(self, folder: Path, parts: Sequence[Part]) -> Iterator[Path]:
        """Write ``parts`` to a temporary file in a folder; it is gone afterwards, unless it was renamed."""
        temporary = folder / f"{TEMPORARY}{uuid4().hex}"
        try:
            with _opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                _write_all(descriptor, parts)
                if self._durable:
                    os.fsync(descriptor)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _make_folder(self, folder: Path) -> None:
        """Make a folder unless it is there; the folders above it are looked at once only."""
        if not folder.is_relative_to(self._root):
            if not folder.is_dir():
                self._make_folder(folder.parent)
                folder.mkdir(exist_ok=True)
                self._note(folder.parent)
            return
        if folder.parent not in self._parents:
            self._make_folder(folder.parent)
            self._parents.add(folder.parent)
        try:
            folder.mkdir()
        except FileExistsError:
            # Another process may have made it without having synced its name.
            if folder == self._root:
                return
        self._note(folder.parent)

    def _note(self, folder: Path) -> None:
        if self._durable:
            with self._changing:
                self._unsynced.add(folder)

    def _sync(self, *folders: Path) -> None:
        """Sync folders, and all that were noted."""
        if not self._durable:
            return
        # One at a time: another may be syncing what this caller's document depends on.
        with self._syncing:
            with self._changing:
                unsynced, self._unsynced = self._unsynced | set(folders), set()
            try:
                for folder in unsynced:
                    with suppress(FileNotFoundError), _opened(folder, os.O_RDONLY) as descriptor:
                        os.fsync(descriptor)
            except BaseException:
                with self._changing:
                    self._unsynced |= unsynced
                raise

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ObjectMissingError(f"{self.url}/{path}: no such object.") from error
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "Check the disk, then run the same command again.")
            raise StorageError(f"{self.url}/{path}: {error.strerror or error}. {remedy}") from error


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, parts: Sequence[Part]) -> None:
    """Write parts as they lie in memory, by one call of the system for all of them if it takes that much."""
    left = [memoryview(part).cast("B") for part in parts if len(part) > 0]
    while left:
        written = os.writev(descriptor, left[:_PARTS_AT_ONCE])
        whole = 0
        while whole < len(left) and written >= len(left[whole]):
            written -= len(left[whole])
            whole += 1
        left = left[whole:]
        if written:
            left[0] = left[0][written:]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(TEMPORARY)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _info(path: str, entry: os.DirEntry[str]) -> ObjectInfo | None:
    try:
        status = entry.stat()
    except FileNotFoundError:
        return None
    return ObjectInfo(path=path, bytes=status.st_size, modified=status.st_mtime)


def fill(descriptor: int, buffer: memoryview, start: int = 0) -> int:
    """Read a file from ``start`` on until the buffer is full or the file ends; return how many bytes were read."""
    done = 0
    while done < len(buffer) and (count := os.preadv(descriptor, [buffer[done:]], start + done)):
        done += count
    return done
