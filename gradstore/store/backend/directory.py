"""A directory as storage."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from gradstore.errors import IntegrityError, ObjectMissingError, StorageError
from gradstore.store.backend.protocol import ObjectInfo, Part

# A writer that dies leaves its temporary file behind; no listing shows it, and no reader opens it.
TEMPORARY = ".gradstore-"
# No living writer takes that long for one object.
_ABANDONED_SECONDS = 3600

_REMEDIES = {
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
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.url = str(root)
        self.concurrency = 4

    def __reduce__(self) -> tuple[type[DirectoryStorage], tuple[Path]]:
        return DirectoryStorage, (self._root,)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        with self._explained(path):
            return (self._root / path).read_bytes()

    def read_into(self, path: str, buffer: memoryview) -> int:
        """See `Storage.read_into`."""
        with self._explained(path), (self._root / path).open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size > len(buffer):
                raise IntegrityError(f"{self.url}/{path}: has {size} bytes; at most {len(buffer)} belong there.")
            done = 0
            while done < size and (count := file.readinto(buffer[done:size])):
                done += count
            return done

    def publish(self, path: str, parts: Sequence[Part]) -> bool:
        """See `Storage.publish`."""
        target = self._root / path
        with self._explained(path):
            _make_folder(target.parent)
            published = not target.exists() and _write_and_link(target, parts)
            # Also when another writer won: a record that names its object must not outlive the object's name.
            _sync_folder(target.parent)
            return published

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        """See `Storage.list_objects`."""
        with self._explained(folder):
            for entry in _entries(self._root / folder):
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    yield from self.list_objects(path)
                elif (size := _size(entry)) is not None:
                    yield ObjectInfo(path=path, bytes=size)

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
                _sync_folder(target.parent)

    def sweep(self, folder: str) -> None:
        """See `Storage.sweep`."""
        with self._explained(folder):
            for parent, _, names in os.walk(self._root / folder):
                for name in names:
                    if name.startswith(TEMPORARY):
                        _remove_abandoned(Path(parent, name))

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise ObjectMissingError(f"{self.url}/{path}: no such object.") from error
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0, "Check the disk, then run the same command again.")
            raise StorageError(f"{self.url}/{path}: {error.strerror or error}. {remedy}") from error


def _write_and_link(target: Path, parts: Sequence[Part]) -> bool:
    temporary = target.parent / f"{TEMPORARY}{uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        try:
            target.hardlink_to(temporary)
        except FileExistsError:
            return False
        return True
    finally:
        temporary.unlink(missing_ok=True)


def _remove_abandoned(temporary: Path) -> None:
    with suppress(FileNotFoundError):
        if temporary.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
            temporary.unlink()


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(TEMPORARY)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return None
