from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from gradstore.adapters.text.documents import DocumentReader
from gradstore.errors import DataError
from gradstore.spec import SplitSection

if TYPE_CHECKING:
    from tests.servers import S3Server


@pytest.fixture
def s3(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, as the environment of a user who reads from it."""
    import s3fs

    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield seaweed
    s3fs.S3FileSystem.clear_instance_cache()


def _texts(source: str) -> list[str]:
    return [document.text for document in DocumentReader(split=SplitSection(source=source), key="data.train")]


def test_every_format_is_read_from_a_real_s3_server(s3: S3Server) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    import s3fs

    filesystem, prefix = s3fs.S3FileSystem(), f"{s3.bucket}/documents"
    filesystem.pipe({f"{prefix}/text/{n:03d}.txt": f"text {n}".encode() for n in range(80)})
    filesystem.pipe(f"{prefix}/jsonl/a.jsonl.gz", gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    parquet = io.BytesIO()
    pq.write_table(pa.table({"text": ["three", "four"]}), parquet)
    filesystem.pipe(f"{prefix}/parquet/a.parquet", parquet.getvalue())
    datasets.Dataset.from_dict({"text": ["five"]}).save_to_disk(f"s3://{prefix}/saved")

    assert _texts(s3.url("documents/text")) == [f"text {n}" for n in range(80)]
    assert _texts(s3.url("documents/jsonl")) == ["one", "two"]
    assert _texts(s3.url("documents/parquet/a.parquet")) == ["three", "four"]
    assert _texts(s3.url("documents/saved")) == ["five"]


def test_what_s3_refuses_is_said_with_what_to_check(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    with pytest.raises(DataError, match="there is no such file or folder"):
        _texts(s3.url("absent"))
    with pytest.raises(DataError, match=r"cannot be listed: FileNotFoundError: .*bucket"):
        _texts("s3://absent-bucket/corpus")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=r"PermissionError: .*credentials and endpoint in the environment") as refused:
        _texts(s3.url("documents"))
    assert "another" not in str(refused.value)
