"""A storage laid over another one, which is only read: what is written stays in this process's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Final, TypeVar
from uuid import uuid4

from gradstore.errors import ObjectMissingError
from gradstore.store.backend.memory import MemoryStorage
from gradstore.store.backend.protocol import ObjectInfo, Part, Range, Storage

T = TypeVar("T")

SCHEME: Final = "overlay"


# What nobody else can write: a layer that users name themselves would lose what they write in it.
_PROCESS: Final = uuid4().hex


def overlay_url(name: str, base_url: str) -> str:
    """URL of a layer over the storage of a URL: all of one name in this process are the same."""
    return f"{SCHEME}://{_PROCESS}.{name}/{base_url}"


def layer_of(url: str) -> tuple[str, str] | None:
    """Name and URL of the storage below that `overlay_url` made a URL of; None of other URLs."""
    prefix = f"{SCHEME}://{_PROCESS}."
    if not url.startswith(prefix):
        return None
    name, _, base = url.removeprefix(prefix).partition("/")
    return name, base


class OverlayStorage:
    """Objects of another storage, and those that this process wrote over them, which nobody else sees.

    So whatever reads and writes a store can work on one that may not be written. An object of the storage below that is
    replaced or deleted stays as it is there, and is hidden here.

    Parameters
    ----------
    name
        What tells apart the layers of one process.
    base
        The storage below.
    """

    def __init__(self, name: str, base: Storage) -> None:
        self._name = name
        self._base = base
        self._written = MemoryStorage(_memory_name(name))
        self._hidden = _hidden(name)
        self._folders_below = cache(base.list_folders)
        self.url = overlay_url(name, base.url)
        self.concurrency = base.concurrency
        self.request_bytes = base.request_bytes

    def __reduce__(self) -> tuple[type[OverlayStorage], tuple[str, Storage]]:
        return OverlayStorage, (self._name, self._base)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        return self._first_of(path, lambda storage: storage.read(path))

    def read_into(self, path: str, buffer: memoryview) -> int:
        """See `Storage.read_into`."""
        return self._first_of(path, lambda storage: storage.read_into(path, buffer))

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> None:
        """See `Storage.read_ranges`."""
        self._first_of(path, lambda storage: storage.read_ranges(path, ranges))

    def publish(self, path: str, parts: Sequence[Part]) -> bool:
        """See `Storage.publish`."""
        return not self._is_below(path) and self._written.publish(path, parts)

    def replace(self, path: str, parts: Sequence[Part]) -> None:
        """See `Storage.replace`."""
        self._written.replace(path, parts)

    def forget(self, path: str) -> None:
        """See `Storage.forget`."""
        self._base.forget(path)

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        """See `Storage.list_objects`."""
        written = {info.path: info for info in self._written.list_objects(folder)}
        yield from written.values()
        for info in self._base.list_objects(folder):
            if info.path not in written and info.path not in self._hidden:
                yield info

    def list_folders(self, folder: str) -> list[str]:
        """See `Storage.list_folders`; one that holds hidden objects alone is still there."""
        return sorted({*self._base.list_folders(folder), *self._written.list_folders(folder)})

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        self._hidden.add(path)
        self._written.delete(path)

    def sweep(self, folder: str, *, grace_seconds: float = 3600.0, dry_run: bool = False) -> list[ObjectInfo]:
        """See `Storage.sweep`; what writers left in the storage below is not ours to remove."""
        return []

    def drop(self, folder: str) -> None:
        """Forget everything that was written in a folder and below it."""
        for info in [*self._written.list_objects(folder)]:
            self._written.delete(info.path)

    def _first_of(self, path: str, read: Callable[[Storage], T]) -> T:
        try:
            return read(self._written)
        except ObjectMissingError:
            if path in self._hidden:
                raise ObjectMissingError(f"{self.url}/{path}: no such object.") from None
        return read(self._base)

    def _is_below(self, path: str) -> bool:
        """Whether the storage below has an object that is not hidden."""
        folders = path.split("/")[:-1]
        # Most of what is written is in folders that only this process has: they are looked for once.
        if path in self._hidden or any(
            name not in self._folders_below("/".join(folders[:depth])) for depth, name in enumerate(folders)
        ):
            return False
        try:
            self._base.read(path)
        except ObjectMissingError:
            return False
        return True


def _memory_name(name: str) -> str:
    return f"{SCHEME}-{name}"


@cache
def _hidden(name: str) -> set[str]:
    """Paths of one name that are hidden: the same for the life of the process."""
    del name
    return set()
