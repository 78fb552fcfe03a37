"""What `S3Storage` asks of a client of S3: single requests, without retries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from gradstore.store.backend.protocol import ObjectInfo, Part
from gradstore.store.backend.s3_failures import Failure

# A first byte and the byte after the last one.
ByteRange: TypeAlias = tuple[int, int]

PAGE_OBJECTS = 1000
CONNECT_SECONDS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a read.

    Attributes
    ----------
    total_bytes
        Size of the whole object.
    etag
        Names this version of the object.
    chunks
        The bytes asked for, in order; they are received while this is iterated.
    """

    total_bytes: int
    etag: str
    chunks: Iterable[Part]


class S3Client(Protocol):
    """Single requests to one bucket. Keys are whole; what fails raises what `failure` knows."""

    def get(self, key: str, byte_range: ByteRange | None = None, etag: str = "") -> Answer:
        """Ask for an object, or a range of it; with ``etag``, only if that version is still there."""

    def put(self, key: str, parts: Sequence[Part], *, if_absent: bool) -> bool:
        """Write an object; False if ``if_absent`` and there is one."""

    def list_page(self, folder: str, after: str) -> tuple[list[ObjectInfo], bool]:
        """List some objects below a folder that come after a key in the server's order, and whether there may be more.

        Their paths are whole keys.
        """

    def list_folders(self, folder: str) -> list[str]:
        """List the names of the folders directly in a folder."""

    def delete(self, key: str) -> None:
        """Remove an object; it may be missing."""

    def failure(self, error: Exception) -> Failure | None:
        """What an exception of a request means; None if it is no failure of the request but a bug."""
