"""What the store asks of a storage: named objects that are written once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

Part: TypeAlias = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """A stored object: its path inside the storage and its size in bytes."""

    path: str
    bytes: int


class Storage(Protocol):
    """Named objects under one URL.

    Paths are relative, with ``/`` between folders. An object is written once, whole, and never changed: whoever can read
    it can trust that it is complete. Every method raises StorageError, with the URL and what to change, when the storage
    refuses or fails. Two storages of one URL see the same objects; pickling one sends its URL only.

    """

    @property
    def url(self) -> str:
        """The URL it was opened with, in full."""

    @property
    def concurrency(self) -> int:
        """Requests worth having in flight at once."""

    def read(self, path: str) -> bytes:
        """Bytes of an object; ObjectMissingError if there is none."""

    def read_into(self, path: str, buffer: memoryview) -> int:
        """Read an object into ``buffer`` and return its size.

        ObjectMissingError if there is none, IntegrityError if it is larger than the buffer.
        """

    def publish(self, path: str, parts: Sequence[Part]) -> bool:
        """Store ``parts``, one after another, as an object unless it exists; False if it existed.

        Of any number of publishers at once, on any machines, exactly one is answered True.
        """

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        """Every object in a folder and below it, in no order; nothing if the folder does not exist."""

    def list_folders(self, folder: str) -> list[str]:
        """Sorted names of the folders directly in a folder."""

    def delete(self, path: str) -> None:
        """Remove an object; it may be missing."""

    def sweep(self, folder: str) -> None:
        """Remove, in a folder and below it, what is no object but was left by writers that died an hour ago or earlier."""
