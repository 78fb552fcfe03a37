"""From a URL to a storage. A new kind of storage is one file beside this one and one case in `open_storage`."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gradstore.errors import SpecError
from gradstore.store.backend.directory import DirectoryStorage
from gradstore.store.backend.memory import MemoryStorage
from gradstore.store.backend.protocol import ObjectInfo, Part, Storage

__all__ = ["ObjectInfo", "Part", "Storage", "open_storage"]

S3_CLIENTS = ("obstore", "s3fs")


def open_storage(url: str) -> Storage:
    """Open the storage that a URL names; nothing is created or contacted before the first request.

    Parameters
    ----------
    url
        A directory, ``file:///absolute/path``, ``s3://bucket/prefix``, or ``memory://name``, which lives as long as the
        process. For s3://, credentials, region and endpoint come from the environment (``AWS_ACCESS_KEY_ID``,
        ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``); ``GRADSTORE_S3_CLIENT=s3fs`` reads and writes
        through s3fs instead of obstore.

    Raises
    ------
    SpecError
        If the URL names no kind of storage that gradstore knows.
    StorageError
        If it is s3:// and the client is not installed.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return DirectoryStorage(Path(url).absolute())
    if scheme == "file":
        return DirectoryStorage(Path(unquote(urlsplit(url).path)).absolute())
    if scheme == "memory":
        return MemoryStorage(rest.strip("/"))
    if scheme == "s3":
        return _open_s3(url, *rest.rstrip("/").partition("/")[::2])
    raise SpecError(f"run.store: found {url!r}; accepted: a directory, file:///path, s3://bucket/prefix.")


def _open_s3(url: str, bucket: str, prefix: str) -> Storage:
    if not bucket:
        raise SpecError(f"run.store: found {url!r}, which names no bucket; accepted: s3://bucket/prefix.")
    client = os.environ.get("GRADSTORE_S3_CLIENT", S3_CLIENTS[0])
    if client not in S3_CLIENTS:
        raise SpecError(f"GRADSTORE_S3_CLIENT: found {client!r}; accepted: {', '.join(S3_CLIENTS)}.")
    if client == "s3fs":
        from gradstore.store.backend.s3fs import S3fsStorage

        return S3fsStorage(bucket, prefix)
    from gradstore.store.backend.s3 import S3Storage

    return S3Storage(bucket, prefix)
