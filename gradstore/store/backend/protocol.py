"""What the store asks of a storage: named objects that are written once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from gradstore.errors import IntegrityError

Part: TypeAlias = bytes | memoryview
Range: TypeAlias = tuple[int, memoryview]
"""Where a range of an object begins, and what its bytes are read into: as many as that takes."""

_DOCUMENT = ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectInfo:
    """An object of a storage, or what a writer that died left of one.

    Attributes
    ----------
    path
        Its path inside the storage.
    bytes
        Its size.
    modified
        When it was written, in seconds since the epoch, by the clock of the storage.
    """

    path: str
    bytes: int
    modified: float


def is_document(path: str) -> bool:
    """Whether an object is a document: metadata, facts, or a commit record, which says what others may trust."""
    return path.endswith(_DOCUMENT)


def ends_early(where: str, size: int, needed: int) -> IntegrityError:
    """Return what tells of an object that has fewer bytes than a range of it asks for."""
    return IntegrityError(f"{where}: ends after {size} bytes; {needed} belong there.")


class Storage(Protocol):
    """Named objects under one URL.

    Paths are relative, with ``/`` between folders. An object is written whole: whoever can read it can trust that it is
    complete. It is written once and never changed, except for what `replace` is for. Every method raises StorageError, with the URL and what to change, when the storage
    refuses or fails. Two storages of one URL see the same objects; pickling one sends its URL only.

    """

    @property
    def url(self) -> str:
        """The URL it was opened with, in full."""

    @property
    def concurrency(self) -> int:
        """Requests worth having in flight at once."""

    @property
    def request_bytes(self) -> int:
        """Bytes that come in the time that a request takes beside them: what asking for a range costs at least."""

    def read(self, path: str) -> bytes:
        """Bytes of an object; ObjectMissingError if there is none."""

    def read_into(self, path: str, buffer: memoryview) -> int:
        """Read an object into ``buffer`` and return its size.

        ObjectMissingError if there is none, IntegrityError if it is larger than the buffer.
        """

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> None:
        """Read ranges of an object, each into a buffer of its size. No checksum of the object vouches for them.

        ObjectMissingError if there is none, IntegrityError if it ends before a range does.
        """

    def publish(self, path: str, parts: Sequence[Part]) -> bool:
        """Store ``parts``, one after another, as an object unless it exists; False if it existed.

        Of any number of publishers at once, on any machines, one is answered True; none, if the answer to the one whose
        object it is was lost on the way: whoever is answered False looks at what is there.

        A document, and whatever this storage published before it, is durable when this returns; any other object when
        the next document is published.
        """

    def replace(self, path: str, parts: Sequence[Part]) -> None:
        """Store ``parts``, one after another, as an object, whether or not there is one of that name.

        Replaced are the Zarr metadata of an array that an append enlarges, objects of a block that an erasure has taken
        back, and documents and inputs that were damaged. It happens at once: a reader gets the
        object as it was or as it is now, never a mixture, and after a crash one of the two is there.
        """

    def forget(self, path: str) -> None:
        """Drop any copy of an object that is kept nearby, so that the next read is from the origin.

        For a reader that found an object unlike its checksum. Without such copies there is nothing to do.
        """

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        """Every object in a folder and below it, in no order; nothing if the folder does not exist."""

    def list_folders(self, folder: str) -> list[str]:
        """Sorted names of the folders directly in a folder."""

    def delete(self, path: str) -> None:
        """Remove an object; it may be missing."""

    def sweep(self, folder: str, *, grace_seconds: float = 3600.0, dry_run: bool = False) -> list[ObjectInfo]:
        """Remove what writers that died left in a folder and below it, and return what that was.

        These are no objects: temporary files on a disk, uploads that were begun and never completed on S3. What is younger
        than ``grace_seconds`` may belong to a living writer and stays. With ``dry_run``, nothing is removed.
        """
