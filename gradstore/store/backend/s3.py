"""S3 and what speaks its protocol, as storage."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from threading import Lock
from typing import Final, TypeAlias, TypeVar

from gradstore.errors import IntegrityError, ObjectMissingError, StorageError
from gradstore.store.backend.protocol import ObjectInfo, Part, Range, ends_early
from gradstore.store.backend.s3_client import ByteRange, S3Client
from gradstore.store.backend.s3_failures import (
    UNREACHABLE,
    Action,
    EmptyRangeError,
    Failure,
    PassingError,
    RefusedError,
    Retries,
    botocore_failure,
)
from gradstore.store.backend.s3_obstore import ObstoreClient
from gradstore.store.backend.s3_s3fs import S3fsClient
from gradstore.store.backend.s3_settings import S3Settings, read_settings
from gradstore.store.backend.s3_uploads import sweep_uploads

T = TypeVar("T")
_Opened: TypeAlias = tuple[S3Settings, Retries, S3Client]

# In flight at once: below 8 a row block waits on latency, above 16 nothing is gained (measurements.md).
CONCURRENCY: Final = 16
# What is larger is read by parallel requests of this size.
_RANGE_BYTES: Final = 16 * 2**20
_RANGES_AT_ONCE: Final = 4
# What a connection gives in the 20 ms or so that a request waits for its first byte.
_REQUEST_BYTES: Final = 2**20
# Writes of what is there already that must not all succeed, before a server is trusted with conditions.
_TRIES: Final = 3

# Each bears the name of the package that it needs.
CLIENTS: Final[dict[str, Callable[[str, S3Settings, str], S3Client]]] = {"obstore": ObstoreClient, "s3fs": S3fsClient}


class S3Storage:
    """Objects below ``s3://bucket/prefix``; put-if-absent is a conditional put, so neither rename nor lock is needed.

    Every request that fails in a way that may pass (no answer, an answer cut short, 5xx, too many requests) is sent again
    for ``GRADSTORE_S3_RETRY_SECONDS``; then StorageError names the object. Any request may be sent twice: a put if absent
    whose first answer was lost finds its own object and is answered False.

    What is checked in transfer: the server compares a write with its signed hash (obstore, and s3fs over http) or with a
    CRC (s3fs over https). A read is compared with the length that the server gave; the checksums of the store's format
    do the rest.

    Parameters
    ----------
    bucket
        Its name.
    prefix
        What every key begins with; may be empty.
    client
        A key of `CLIENTS`.
    """

    def __init__(self, bucket: str, prefix: str, client: str) -> None:
        self._bucket, self._prefix, self._client_name = bucket, prefix, client
        self._opened: tuple[int, _Opened] | None = None
        self._opening = Lock()
        self._honours_conditions = False
        self._trying = Lock()
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.concurrency = CONCURRENCY
        self.request_bytes = _REQUEST_BYTES
        if find_spec(client) is None:
            raise StorageError(f"s3:// needs {client}, which is not installed: pip install 'gradstore[s3]'.")

    def __reduce__(self) -> tuple[type[S3Storage], tuple[str, str, str]]:
        return S3Storage, (self._bucket, self._prefix, self._client_name)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""

        def read(client: S3Client) -> bytes:
            answer = client.get(self._key(path))
            data = b"".join(answer.chunks)
            self._require_length(path, len(data), answer.total_bytes)
            return data

        return self._ask(path, "read", read)

    def read_into(self, path: str, buffer: memoryview) -> int:
        """See `Storage.read_into`; what is larger than 16 MiB is read by parallel requests."""
        first = (0, _RANGE_BYTES) if len(buffer) > _RANGE_BYTES else None
        try:
            size, etag = self._read_range(path, buffer, first)
        except EmptyRangeError:
            return 0
        rest = [(start, min(start + _RANGE_BYTES, size)) for start in range(_RANGE_BYTES, size, _RANGE_BYTES)]
        if first is not None and rest:
            with ThreadPoolExecutor(min(_RANGES_AT_ONCE, len(rest))) as pool:
                # All of one version of the object.
                list(pool.map(lambda part: self._read_range(path, buffer, part, etag), rest))
        return size

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> None:
        """See `Storage.read_ranges`: a request for each."""
        for start, buffer in (each for each in ranges if len(each[1])):
            stop = start + len(buffer)
            try:
                self._ask(path, "read", partial(self._read_part, path, start, buffer))
            except EmptyRangeError:
                raise ends_early(f"{self.url}/{path}", start, stop) from None

    def publish(self, path: str, parts: Sequence[Part]) -> bool:
        """See `Storage.publish`."""

        def put(client: S3Client) -> bool:
            return client.put(self._key(path), parts, if_absent=True)

        published = self._ask(path, "write", put)
        # One thread tries for all.
        if published and not self._honours_conditions and self._trying.acquire(blocking=False):
            try:
                self._require_conditions(path, put)
            finally:
                self._trying.release()
        return published

    def replace(self, path: str, parts: Sequence[Part]) -> None:
        """See `Storage.replace`."""
        self._ask(path, "write", lambda client: client.put(self._key(path), parts, if_absent=False))

    def forget(self, path: str) -> None:
        """See `Storage.forget`; no copies are kept."""

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        """See `Storage.list_objects`; each page is a request of its own, so that a failure costs one page."""
        key, after, more = self._key(folder), "", True
        while more:
            page, more = self._ask(folder, "list", partial(_list_page, key, after))
            for info in page:
                after = info.path
                # Some servers list a folder itself as an empty object.
                if not after.endswith("/") and after != key:
                    yield self._inside(info)

    def list_folders(self, folder: str) -> list[str]:
        """See `Storage.list_folders`."""
        return sorted(self._ask(folder, "list", lambda client: client.list_folders(self._key(folder))))

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        with suppress(ObjectMissingError):
            self._ask(path, "delete", lambda client: client.delete(self._key(path)))

    def sweep(self, folder: str, *, grace_seconds: float = 3600.0, dry_run: bool = False) -> list[ObjectInfo]:
        """See `Storage.sweep`: aborts multipart uploads, which other programs may have begun; gradstore begins none.

        Who may write need not be allowed to list uploads: then there is a warning, and none are aborted.
        """
        key = self._key(folder)
        settings = self._open()[0]
        try:
            swept = self._ask("", "sweep", lambda _: sweep_uploads(self._bucket, key, settings, grace_seconds, dry_run))
        except RefusedError as error:
            warnings.warn(f"Uploads that were never completed stay: {error}", stacklevel=2)
            return []
        return [self._inside(info) for info in swept]

    def _require_conditions(self, path: str, put: Callable[[S3Client], bool]) -> None:
        """Refuse a server that writes once more what it has just written only if absent."""
        # Others may have removed the object before some of the tries, but not before all.
        if all(self._ask(path, "write", put) for _ in range(_TRIES)):
            raise StorageError(
                f"{self.url}/{path}: the server overwrites an object that it was asked to write only if there is none "
                "(If-None-Match), so that workers would overwrite each other. Choose another server, or a newer one."
            )
        self._honours_conditions = True

    def _read_range(
        self, path: str, buffer: memoryview, byte_range: ByteRange | None, etag: str = ""
    ) -> tuple[int, str]:
        """Read an object or a range of it into its place in ``buffer``, and return the object's size and version."""

        def read(client: S3Client) -> tuple[int, str]:
            answer = client.get(self._key(path), byte_range, etag)
            size = answer.total_bytes
            if size > len(buffer):
                raise IntegrityError(f"{self.url}/{path}: has {size} bytes; at most {len(buffer)} belong there.")
            start, stop = byte_range or (0, size)
            stop, done = min(stop, size), start
            for chunk in answer.chunks:
                done += len(chunk)
                if done <= stop:
                    buffer[done - len(chunk) : done] = chunk
            self._require_length(path, done - start, stop - start)
            return size, answer.etag

        return self._ask(path, "read", read)

    def _read_part(self, path: str, start: int, buffer: memoryview, client: S3Client) -> None:
        stop, done = start + len(buffer), 0
        answer = client.get(self._key(path), (start, stop))
        if answer.total_bytes < stop:
            raise ends_early(f"{self.url}/{path}", answer.total_bytes, stop)
        for chunk in answer.chunks:
            fitting = chunk[: len(buffer) - done]
            buffer[done : done + len(fitting)] = fitting
            done += len(chunk)
        self._require_length(path, done, len(buffer))

    def _require_length(self, path: str, found: int, expected: int) -> None:
        if found != expected:
            failure = Failure(code=UNREACHABLE, status=200, reason=f"{found} of {expected} bytes came")
            raise failure.error(f"{self.url}/{path}", "read", anonymous=False)

    def _ask(self, path: str, action: Action, request: Callable[[S3Client], T]) -> T:
        """Send a request until it is answered, and return the answer."""
        where = f"{self.url}/{path}"
        settings, retries, client = self._open()

        def once() -> T:
            try:
                return request(client)
            except (PassingError, IntegrityError):
                raise
            except Exception as error:
                failure = client.failure(error) or botocore_failure(error)
                if failure is None:
                    raise
                if failure.code == "PreconditionFailed":
                    raise IntegrityError(f"{where}: was replaced while it was read.") from error
                raise failure.error(where, action, anonymous=settings.anonymous) from error

        return retries(once)

    def _open(self) -> _Opened:
        """Open the connection of this process at its first request, in whichever thread."""
        with self._opening:
            if self._opened is None or self._opened[0] != os.getpid():
                settings = read_settings(self._bucket)
                client = CLIENTS[self._client_name](self._bucket, settings, self.url)
                self._opened = os.getpid(), (settings, Retries(settings.retry_seconds), client)
            return self._opened[1]

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}".strip("/")

    def _inside(self, info: ObjectInfo) -> ObjectInfo:
        return replace(info, path=info.path[len(self._prefix) + 1 :] if self._prefix else info.path)


def _list_page(folder: str, after: str, client: S3Client) -> tuple[list[ObjectInfo], bool]:
    return client.list_page(folder, after)
