"""S3 and what speaks its protocol, through obstore."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gradstore.errors import IntegrityError, ObjectMissingError, StorageError
from gradstore.store.backend.protocol import ObjectInfo, Part

if TYPE_CHECKING:
    from obstore.store import S3Store

# In flight at once: below 8 a row block waits on latency, above 16 nothing is gained (measurements.md).
CONCURRENCY = 16

_REMEDIES = {
    "NoSuchBucket": "Create the bucket, or correct run.store and AWS_ENDPOINT_URL.",
    "SignatureDoesNotMatch": "Check AWS_SECRET_ACCESS_KEY.",
    "InvalidAccessKeyId": "Check AWS_ACCESS_KEY_ID.",
    "AccessDenied": "These credentials need read, write, list and delete on the prefix.",
    "ExpiredToken": "Renew the credentials, then run the same command again.",
    "SlowDown": "The server asks for fewer requests: use fewer workers, then run the same command again.",
    "Forbidden": "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what they may do on the prefix.",
    "NoCredentials": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
}
# Those that obstore reads, in the order in which they count.
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

_DEFAULT_REMEDY = "Check that AWS_ENDPOINT_URL is right and reachable, then run the same command again."


def s3_error(where: str, code: str, reason: str) -> StorageError:
    """Make the error for an S3 error code: what was found, and what to change."""
    return StorageError(f"{where}: {code}: {reason.rstrip('.')}. {_REMEDIES.get(code, _DEFAULT_REMEDY)}")


def endpoint() -> str:
    """Return the URL of the S3 server that the environment names; ``""`` for Amazon's own.

    Raises
    ------
    StorageError
        If one is set that is no URL of a server; obstore would panic.
    """
    found = {name: os.environ[name] for name in _ENDPOINTS if name in os.environ}
    for name, value in found.items():
        try:
            url = urlsplit(value)
            usable = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise StorageError(
                f"{name}: found {value!r}; accepted: http://HOST or https://HOST, with or without a port."
            )
    return next(iter(found.values()), "")


class S3Storage:
    """Objects below ``s3://bucket/prefix``; put-if-absent is a conditional put, so neither rename nor lock is needed."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket, self._prefix = bucket, prefix
        self._opened: S3Store | None = None
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self.concurrency = CONCURRENCY
        _check_installed()

    def __reduce__(self) -> tuple[type[S3Storage], tuple[str, str]]:
        return S3Storage, (self._bucket, self._prefix)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        import obstore

        with self._explained(path):
            return obstore.get(self._client(), path).bytes().to_bytes()

    def read_into(self, path: str, buffer: memoryview) -> int:
        """See `Storage.read_into`."""
        import obstore

        with self._explained(path):
            answer = obstore.get(self._client(), path)
            size = answer.meta["size"]
            if size > len(buffer):
                raise IntegrityError(f"{self.url}/{path}: has {size} bytes; at most {len(buffer)} belong there.")
            data = memoryview(answer.bytes())
        buffer[: len(data)] = data
        return len(data)

    def publish(self, path: str, parts: Sequence[Part]) -> bool:
        """See `Storage.publish`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._explained(path):
            try:
                # One request: a multipart upload could not be made conditional on every server.
                obstore.put(self._client(), path, list(parts), mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        """See `Storage.list_objects`."""
        import obstore

        with self._explained(folder):
            for batch in obstore.list(self._client(), folder):
                for found in batch:
                    yield ObjectInfo(path=found["path"], bytes=found["size"])

    def list_folders(self, folder: str) -> list[str]:
        """See `Storage.list_folders`."""
        import obstore

        with self._explained(folder):
            found = obstore.list_with_delimiter(self._client(), folder)
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        import obstore

        with self._explained(path):
            try:
                obstore.delete(self._client(), path)
            except FileNotFoundError:
                return

    def sweep(self, folder: str) -> None:
        """See `Storage.sweep`; a writer that dies leaves nothing here."""

    def _client(self) -> S3Store:
        if _first_user() != os.getpid():
            raise StorageError(
                f"{self.url}: this process was forked from one that had used S3, whose connections do not survive "
                "that. Start workers with spawn."
            )
        if self._opened is None:
            from obstore.store import S3Store

            self._opened = S3Store(
                self._bucket,
                prefix=self._prefix or None,
                client_options={"allow_http": endpoint().startswith("http://"), "timeout": timedelta(minutes=2)},
                retry_config={"max_retries": 8, "retry_timeout": timedelta(minutes=3)},
            )
        return self._opened

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        where = f"{self.url}/{path}"
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise s3_error(where, *_code_and_reason(error)) from error
            raise ObjectMissingError(f"{where}: no such object.") from error
        except (BaseError, OSError) as error:
            raise s3_error(where, *_code_and_reason(error)) from error


@cache
def _first_user() -> int:
    """Return the process that used obstore first; a forked child inherits the answer and with it dead threads."""
    return os.getpid()


def _check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("obstore") is None:
        raise StorageError("s3:// needs obstore, which is not installed: pip install 'gradstore[s3]'.")


def _code_and_reason(error: Exception) -> tuple[str, str]:
    text = str(error).partition("\n\nDebug source")[0]
    if "169.254.169.254" in text:
        return "NoCredentials", "the environment holds no AWS credentials"
    code, message = re.search(r"<Code>(.*?)</Code>", text), re.search(r"<Message>(.*?)</Message>", text)
    if code:
        return code[1], message[1] if message else "the server gave no reason"
    return "Unreachable" if "error sending request" in text else "Failed", text.splitlines()[0][:300]
