"""Requests to S3 through obstore."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import TYPE_CHECKING

from gradstore.errors import StorageError
from gradstore.store.backend.protocol import ObjectInfo, Part
from gradstore.store.backend.s3_client import CONNECT_SECONDS, PAGE_OBJECTS, Answer, ByteRange
from gradstore.store.backend.s3_failures import UNREACHABLE, Failure
from gradstore.store.backend.s3_settings import S3Settings

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from obstore import GetOptions
    from obstore.store import S3Config, S3Credential, S3Store

# Bodies are handed over in chunks of this size: larger ones cost memory, smaller ones calls.
_CHUNK_BYTES = 256 * 2**10
# botocore refreshes credentials 10 minutes before they expire at the latest, and obstore asks 5 minutes before.
_CREDENTIALS_LAST = timedelta(minutes=10)


class ObstoreClient:
    """`S3Client` on obstore; see there.

    obstore's own retries are off. It sends a conditional put again after a 5xx but not when the connection broke, and a
    body that was cut short only if the server honours a range from the middle; `Retries` treats all requests alike.
    """

    def __init__(self, bucket: str, settings: S3Settings, where: str) -> None:
        from obstore.store import S3Store

        if _first_user() != os.getpid():
            raise StorageError(
                f"{where}: this process was forked from one that had used S3, whose connections do not survive "
                "that. Start workers with spawn."
            )
        credentials = None if settings.anonymous else _Refreshed(settings.credentials(where))
        self._store: S3Store = S3Store(
            bucket,
            config=_config(bucket, settings),
            credential_provider=credentials,
            client_options={
                "allow_http": settings.endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "timeout": timedelta(seconds=settings.timeout_seconds),
            },
            retry_config={"max_retries": 0},
        )

    def get(self, key: str, byte_range: ByteRange | None = None, etag: str = "") -> Answer:
        """See `S3Client.get`."""
        import obstore

        options: GetOptions = {}
        if byte_range is not None:
            options["range"] = byte_range
        if etag:
            options["if_match"] = etag
        answer = obstore.get(self._store, key, options=options)
        chunks = (memoryview(chunk) for chunk in answer.stream(min_chunk_size=_CHUNK_BYTES))
        return Answer(total_bytes=answer.meta["size"], etag=answer.meta["e_tag"] or "", chunks=chunks)

    def put(self, key: str, parts: Sequence[Part], *, if_absent: bool) -> bool:
        """See `S3Client.put`."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        try:
            # One request: a multipart upload could not be made conditional on every server.
            obstore.put(self._store, key, list(parts), mode="create" if if_absent else "overwrite", use_multipart=False)
        except AlreadyExistsError as error:
            # A conflict, status 409, means that something else was at the object, not that there is one.
            failure = self.failure(error)
            if failure is not None and failure.status == 409:
                raise
            return False
        return True

    def list_page(self, folder: str, after: str) -> tuple[list[ObjectInfo], bool]:
        """See `S3Client.list_page`."""
        import obstore

        listing = obstore.list(self._store, folder or None, offset=after or None, chunk_size=PAGE_OBJECTS)
        page = [
            ObjectInfo(path=found["path"], bytes=found["size"], modified=found["last_modified"].timestamp())
            for found in next(listing, ())
        ]
        return page, len(page) == PAGE_OBJECTS

    def list_folders(self, folder: str) -> list[str]:
        """See `S3Client.list_folders`."""
        import obstore

        found = obstore.list_with_delimiter(self._store, folder or None)
        return [path.rpartition("/")[2] for path in found["common_prefixes"]]

    def delete(self, key: str) -> None:
        """See `S3Client.delete`."""
        import obstore

        obstore.delete(self._store, key)

    def failure(self, error: Exception) -> Failure | None:
        """See `S3Client.failure`; obstore tells codes in its text alone."""
        from obstore.exceptions import BaseError

        if not isinstance(error, BaseError | OSError):
            return None
        text = str(error).partition("\n\nDebug source")[0]
        code = re.search(r"<Code>(.*?)</Code>|\(code: (\w+)\)", text)
        message = re.search(r"<Message>(.*?)</Message>", text)
        status = re.search(r"status code: (\d{3})", text)
        name = (code[1] or code[2]) if code else ""
        if not code and not status:
            name = _name(text)
        return Failure(
            code=name,
            status=int(status[1]) if status else 0,
            reason=message[1] if message else text.splitlines()[0][:300],
        )


class _Refreshed:
    """Gives obstore the credentials as botocore has them now."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials

    def __call__(self) -> S3Credential:
        now = self._credentials.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST,
        }


def _config(bucket: str, settings: S3Settings) -> S3Config:
    config: S3Config = {
        "region": settings.region,
        "skip_signature": settings.anonymous,
        "virtual_hosted_style_request": settings.virtual_hosted,
    }
    if settings.endpoint:
        scheme, _, host = settings.endpoint.partition("://")
        config["endpoint"] = f"{scheme}://{bucket}.{host}" if settings.virtual_hosted else settings.endpoint
    return config


def _name(text: str) -> str:
    """Name an error that holds neither a code nor a status."""
    if "HTTP error" in text or re.search(r"Got invalid \w+ response", text):
        return UNREACHABLE
    if "redirect without LOCATION" in text:
        return "PermanentRedirect"
    return "PreconditionFailed" if "precondition" in text else ""


@cache
def _first_user() -> int:
    """Return the process that used obstore first; a forked child inherits the answer and with it dead threads."""
    return os.getpid()
