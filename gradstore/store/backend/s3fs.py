"""S3 through s3fs: the fallback for servers and networks that obstore does not serve."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from gradstore.errors import IntegrityError, ObjectMissingError, StorageError
from gradstore.store.backend.protocol import ObjectInfo, Part
from gradstore.store.backend.s3 import CONCURRENCY, endpoint, s3_error

# What S3 answers to a conditional put that lost; the second, when the winner was still writing.
_LOST = ("PreconditionFailed", "ConditionalRequestConflict")


class S3fsStorage:
    """Objects below ``s3://bucket/prefix``, through s3fs; chosen by ``GRADSTORE_S3_CLIENT=s3fs``."""

    def __init__(self, bucket: str, prefix: str) -> None:
        if find_spec("s3fs") is None:
            raise StorageError("GRADSTORE_S3_CLIENT=s3fs: s3fs is not installed: pip install 'gradstore[s3]'.")
        self._bucket, self._prefix = bucket, prefix
        self._opened: tuple[int, Any] | None = None
        self._root = f"{bucket}/{prefix}".rstrip("/")
        self.url = f"s3://{self._root}"
        self.concurrency = CONCURRENCY

    def __reduce__(self) -> tuple[type[S3fsStorage], tuple[str, str]]:
        return S3fsStorage, (self._bucket, self._prefix)

    def read(self, path: str) -> bytes:
        """See `Storage.read`."""
        with self._explained(path) as client:
            data: bytes = client.cat_file(self._key(path))
        return data

    def read_into(self, path: str, buffer: memoryview) -> int:
        """See `Storage.read_into`."""
        data = self.read(path)
        if len(data) > len(buffer):
            raise IntegrityError(f"{self.url}/{path}: has {len(data)} bytes; at most {len(buffer)} belong there.")
        buffer[: len(data)] = data
        return len(data)

    def publish(self, path: str, parts: Sequence[Part]) -> bool:
        """See `Storage.publish`."""
        with self._explained(path) as client:
            try:
                # Above chunksize s3fs would send several parts, which not every server makes conditional.
                client.pipe_file(self._key(path), b"".join(parts), mode="create", chunksize=5 * 2**30)
            except OSError as error:
                if isinstance(error, FileExistsError) or _code(error) in _LOST:
                    return False
                raise
        return True

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        """See `Storage.list_objects`."""
        with self._explained(folder) as client:
            found = client.find(self._key(folder), detail=True)
        for key, facts in found.items():
            # s3fs answers with the folder itself where some servers keep empty ones.
            if facts["type"] == "file":
                yield ObjectInfo(path=key[len(self._root) + 1 :], bytes=facts["size"])

    def list_folders(self, folder: str) -> list[str]:
        """See `Storage.list_folders`."""
        with self._explained(folder) as client:
            try:
                found = client.ls(self._key(folder), detail=True)
            except FileNotFoundError as error:
                if _code(error) == "NoSuchBucket":
                    raise
                return []
        return sorted(facts["name"].rpartition("/")[2] for facts in found if facts["type"] == "directory")

    def delete(self, path: str) -> None:
        """See `Storage.delete`."""
        with self._explained(path) as client:
            client.rm_file(self._key(path))

    def sweep(self, folder: str) -> None:
        """See `Storage.sweep`; a writer that dies leaves nothing here."""

    def _key(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def _client(self) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            import s3fs

            # Listings must be fresh, and an endpoint of one's own seldom serves bucket names as host names.
            client = s3fs.S3FileSystem(
                use_listings_cache=False,
                skip_instance_cache=True,
                client_kwargs={"region_name": os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")},
                config_kwargs={"s3": {"addressing_style": "path" if endpoint() else "auto"}},
            )
            self._opened = os.getpid(), client
        return self._opened[1]

    @contextmanager
    def _explained(self, path: str) -> Iterator[Any]:
        from botocore.exceptions import BotoCoreError

        where = f"{self.url}/{path}"
        try:
            yield self._client()
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise s3_error(where, "NoSuchBucket", "the bucket does not exist") from error
            raise ObjectMissingError(f"{where}: no such object.") from error
        except PermissionError as error:
            # s3fs often asks by HEAD, whose answer has no body and so no code but the status.
            code = _code(error)
            raise s3_error(where, code if code.isalpha() else "Forbidden", str(error)) from error
        except BotoCoreError as error:
            code = "NoCredentials" if type(error).__name__ == "NoCredentialsError" else "Unreachable"
            raise s3_error(where, code, str(error)) from error
        except OSError as error:
            raise s3_error(where, _code(error) or "Failed", str(error)) from error


def _code(error: BaseException) -> str:
    """S3's error code, from the botocore error that s3fs translated."""
    cause = error.__cause__
    response = getattr(cause, "response", None) or {}
    code: str = response.get("Error", {}).get("Code", "")
    return code
