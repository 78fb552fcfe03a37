"""From a URL to a storage. A new kind of storage is one file beside this one and one case in `open_storage`."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gradstore.errors import SpecError
from gradstore.spec.urls import refuse_credentials
from gradstore.store.backend.cache import cached
from gradstore.store.backend.directory import DirectoryStorage
from gradstore.store.backend.memory import MemoryStorage
from gradstore.store.backend.overlay import OverlayStorage, layer_of
from gradstore.store.backend.protocol import ObjectInfo, Part, Range, Storage

__all__ = ["ObjectInfo", "Part", "Range", "Storage", "open_storage"]

S3_CLIENTS = ("obstore", "s3fs")
_FSYNC = {"on": True, "off": False}


def open_storage(url: str, *, copies: bool = True) -> Storage:
    """Open the storage that a URL names; nothing is created or contacted before the first request.

    Parameters
    ----------
    url
        A directory, ``file:///absolute/path``, ``s3://bucket/prefix``, or ``memory://name``, which lives as long as the
        process; what `overlay_url` gives reads the storage of a URL, and keeps what is written in this process. For s3://,
        credentials, region and endpoint come from the environment or the profile that it names.
    copies
        Whether objects may be read from the folder that ``GRADSTORE_CACHE`` names; not by who checks the objects themselves.

    Raises
    ------
    SpecError
        If the URL names no kind of storage that gradstore knows, or holds credentials, or a variable of gradstore's holds what it must not.
    StorageError
        If it is s3:// and the client is not installed.

    Notes
    -----
    Variables of the environment, all described in docs/storage.md: ``GRADSTORE_FSYNC`` for directories;
    ``GRADSTORE_S3_CLIENT``, ``GRADSTORE_S3_RETRY_SECONDS``, ``GRADSTORE_CACHE`` and ``GRADSTORE_CACHE_BYTES`` for s3://.
    """
    refuse_credentials("store", url)
    scheme, separator, rest = url.partition("://")
    if not separator:
        return DirectoryStorage(Path(url).absolute(), _durable())
    if scheme == "file":
        return DirectoryStorage(Path(unquote(urlsplit(url).path)).absolute(), _durable())
    if scheme == "memory":
        return MemoryStorage(rest.strip("/"))
    if (layer := layer_of(url)) is not None:
        name, base = layer
        return OverlayStorage(name, open_storage(base, copies=copies))
    if scheme == "s3":
        storage = _open_s3(url, *rest.rstrip("/").partition("/")[::2])
        return cached(storage) if copies else storage
    raise SpecError(f"run.store: found {url!r}; accepted: a directory, file:///path, s3://bucket/prefix.")


def _durable() -> bool:
    value = os.environ.get("GRADSTORE_FSYNC", "on")
    if value not in _FSYNC:
        raise SpecError(f"GRADSTORE_FSYNC: found {value!r}; accepted: {', '.join(_FSYNC)}.")
    return _FSYNC[value]


def _open_s3(url: str, bucket: str, prefix: str) -> Storage:
    if not bucket:
        raise SpecError(f"run.store: found {url!r}, which names no bucket; accepted: s3://bucket/prefix.")
    client = os.environ.get("GRADSTORE_S3_CLIENT", S3_CLIENTS[0])
    if client not in S3_CLIENTS:
        raise SpecError(f"GRADSTORE_S3_CLIENT: found {client!r}; accepted: {', '.join(S3_CLIENTS)}.")
    from gradstore.store.backend.s3 import S3Storage

    return S3Storage(bucket, prefix, client)
