"""Multipart uploads that were begun on S3 and never completed: no listing shows them, and they are paid for.

gradstore writes each object by one request and leaves none; programs that copy a store to a bucket may. obstore and s3fs
cannot list them, so botocore does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

from gradstore.store.backend.protocol import ObjectInfo
from gradstore.store.backend.s3_client import CONNECT_SECONDS
from gradstore.store.backend.s3_settings import S3Settings


def sweep_uploads(
    bucket: str, folder: str, settings: S3Settings, grace_seconds: float, dry_run: bool
) -> list[ObjectInfo]:
    """Abort uploads below a folder that were begun longer than ``grace_seconds`` ago, and return what they hold.

    Parameters
    ----------
    bucket, folder
        Where to look; paths in the answer are whole keys.
    settings
        How S3 is reached.
    grace_seconds
        Younger ones are left.
    dry_run
        Abort none.
    """
    swept = []
    with closing(_client(settings)) as client:
        for upload in _uploads(client, bucket, f"{folder}/" if folder else ""):
            begun: float = upload["Initiated"].timestamp()
            if begun > time.time() - grace_seconds:
                continue
            name = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            # Another process may complete or abort it at the same moment.
            with suppress(client.exceptions.NoSuchUpload):
                pages = client.get_paginator("list_parts").paginate(**name)
                size = sum(part["Size"] for page in pages for part in page.get("Parts", ()))
                if not dry_run:
                    client.abort_multipart_upload(**name)
                swept.append(ObjectInfo(path=upload["Key"], bytes=size, modified=begun))
    return swept


def _client(settings: S3Settings) -> Any:
    from botocore import UNSIGNED
    from botocore.config import Config

    config = Config(
        s3={"addressing_style": "virtual" if settings.virtual_hosted else "path"},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=settings.timeout_seconds,
        **({"signature_version": UNSIGNED} if settings.anonymous else {}),
    )
    return settings.session.create_client(
        "s3", region_name=settings.region, endpoint_url=settings.endpoint or None, config=config
    )


def _uploads(client: Any, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
        yield from page.get("Uploads", ())
