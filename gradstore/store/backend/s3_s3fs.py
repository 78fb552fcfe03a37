"""Requests to S3 through s3fs: the fallback for servers and networks that obstore does not serve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradstore.store.backend.protocol import ObjectInfo, Part
from gradstore.store.backend.s3_client import CONNECT_SECONDS, PAGE_OBJECTS, Answer, ByteRange
from gradstore.store.backend.s3_failures import UNREACHABLE, Failure, botocore_failure
from gradstore.store.backend.s3_settings import S3Settings

_CONNECTIONS = 64


class S3fsClient:
    """`S3Client` on s3fs; see there. The retries of s3fs and of botocore are off, as `Retries` does theirs."""

    def __init__(self, bucket: str, settings: S3Settings, where: str) -> None:
        import s3fs

        if not settings.anonymous:
            settings.credentials(where)
        self._bucket = bucket
        self._files = s3fs.S3FileSystem(
            anon=settings.anonymous,
            endpoint_url=settings.endpoint or None,
            skip_instance_cache=True,
            client_kwargs={"region_name": settings.region},
            config_kwargs={
                "s3": {"addressing_style": "virtual" if settings.virtual_hosted else "path"},
                "retries": {"total_max_attempts": 1},
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": settings.timeout_seconds,
                "max_pool_connections": _CONNECTIONS,
            },
        )
        self._files.retries = 1

    def get(self, key: str, byte_range: ByteRange | None = None, etag: str = "") -> Answer:
        """See `S3Client.get`."""
        from fsspec.asyn import sync

        options: dict[str, str] = {}
        if byte_range is not None:
            options["Range"] = f"bytes={byte_range[0]}-{byte_range[1] - 1}"
        if etag:
            options["IfMatch"] = etag
        answer, data = sync(self._files.loop, _get, self._files, Bucket=self._bucket, Key=key, **options)
        total = answer["ContentRange"].rpartition("/")[2] if "ContentRange" in answer else answer["ContentLength"]
        return Answer(total_bytes=int(total), etag=answer["ETag"], chunks=(data,))

    def put(self, key: str, parts: Sequence[Part], *, if_absent: bool) -> bool:
        """See `S3Client.put`."""
        try:
            self._call("put_object", Key=key, Body=b"".join(parts), **({"IfNoneMatch": "*"} if if_absent else {}))
        except OSError as error:
            failure = self.failure(error)
            if if_absent and failure is not None and failure.code == "PreconditionFailed":
                return False
            raise
        return True

    def list_page(self, folder: str, after: str) -> tuple[list[ObjectInfo], bool]:
        """See `S3Client.list_page`."""
        found = self._call("list_objects_v2", Prefix=_below(folder), StartAfter=after, MaxKeys=PAGE_OBJECTS)
        page = [
            ObjectInfo(path=facts["Key"], bytes=facts["Size"], modified=facts["LastModified"].timestamp())
            for facts in found.get("Contents", ())
        ]
        return page, bool(page) and found["IsTruncated"]

    def list_folders(self, folder: str) -> list[str]:
        """See `S3Client.list_folders`."""
        names: list[str] = []
        token: dict[str, str] = {}
        while True:
            found = self._call("list_objects_v2", Prefix=_below(folder), Delimiter="/", **token)
            names += [facts["Prefix"].rstrip("/").rpartition("/")[2] for facts in found.get("CommonPrefixes", ())]
            if not found.get("IsTruncated"):
                return names
            token = {"ContinuationToken": found["NextContinuationToken"]}

    def delete(self, key: str) -> None:
        """See `S3Client.delete`."""
        self._call("delete_object", Key=key)

    def failure(self, error: Exception) -> Failure | None:
        """See `S3Client.failure`."""
        # s3fs translates errors of the server to those of the system, and keeps the original.
        known = botocore_failure(error.__cause__ or error)
        # Connections and bodies end in errors of aiohttp and of asyncio, too.
        if known is None and (isinstance(error, OSError) or type(error).__module__.startswith("aiohttp")):
            return Failure(code=UNREACHABLE, status=0, reason=str(error) or type(error).__name__)
        return known

    def _call(self, method: str, **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._files.call_s3(method, Bucket=self._bucket, **options)
        return answer


async def _get(files: Any, **options: str) -> tuple[dict[str, Any], bytes]:
    answer = await files._call_s3("get_object", **options)
    async with answer["Body"] as body:
        return answer, await body.read()


def _below(folder: str) -> str:
    return f"{folder}/" if folder else ""
