"""Storages: the suite on a directory and in memory, and what open_storage accepts."""

from __future__ import annotations

import os
import pickle
import re
import resource
import shutil
import time
from itertools import count
from pathlib import Path

import pytest

from gradstore.errors import SpecError, StorageError
from gradstore.store.backend import open_storage
from tests.storages import Places, StorageSuite

_NAMES = count()


class TestDirectory(StorageSuite):
    @pytest.fixture
    def new_url(self, tmp_path: Path) -> Places:
        return lambda: str(tmp_path / f"store {next(_NAMES)}")


class TestMemory(StorageSuite):
    @pytest.fixture
    def new_url(self) -> Places:
        return lambda: f"memory://backend-{next(_NAMES)}"


def test_a_file_url_is_a_directory(tmp_path: Path) -> None:
    open_storage((tmp_path / "my store").as_uri()).publish("a", [b"1"])
    assert (tmp_path / "my store" / "a").read_bytes() == b"1"


def test_a_relative_path_is_made_absolute_so_that_workers_may_start_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("runs/demo").url == str(tmp_path / "runs" / "demo")


def test_opening_creates_nothing(tmp_path: Path) -> None:
    open_storage(str(tmp_path / "store"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["gs://bucket/x", "https://example.org/x", "s4://bucket"])
def test_an_unknown_kind_of_url_is_refused_with_those_that_exist(url: str) -> None:
    with pytest.raises(SpecError, match=r"accepted: a directory, file:///path, s3://bucket/prefix"):
        open_storage(url)


def test_an_s3_url_without_a_bucket_is_refused() -> None:
    with pytest.raises(SpecError, match="names no bucket"):
        open_storage("s3://")


def test_an_unknown_s3_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_S3_CLIENT", "boto")
    with pytest.raises(SpecError, match="found 'boto'; accepted: obstore, s3fs"):
        open_storage("s3://bucket/prefix")


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
@pytest.mark.parametrize("value", ["nonsense", "", "http://", "ftp://host", "http://host:99999999", "http://[::"])
def test_an_endpoint_that_is_no_url_of_a_server_is_refused(
    client: str, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_S3_CLIENT", client)
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(key, "x")
    monkeypatch.setenv(name, value)
    storage = open_storage("s3://bucket/prefix")
    with pytest.raises(StorageError, match=rf"^{name}: found '{re.escape(value)}'; accepted: http://HOST"):
        storage.read("a")


def test_a_writer_that_dies_leaves_a_file_that_no_listing_shows(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.publish("a/1", [b"x"])
    (tmp_path / "a" / ".gradstore-0123456789abcdef").write_bytes(b"half an obj")
    assert [info.path for info in storage.list_objects("")] == ["a/1"]


def test_a_sweep_removes_what_dead_writers_left_and_not_what_living_ones_write(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.publish("a/b/1", [b"x"])
    dead, living = tmp_path / "a/b/.gradstore-dead", tmp_path / "a/b/.gradstore-living"
    for path, seconds in ((dead, 3700), (living, 3500)):
        path.write_bytes(b"half an obj")
        os.utime(path, (time.time() - seconds,) * 2)
    os.utime(tmp_path / "a/b/1", (0, 0))
    storage.sweep("a")
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == [living.name, "1"]


def test_publishing_leaves_no_temporary_file(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.publish("a/1", [b"x"])
    storage.publish("a/1", [b"y"])
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["1"]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of all that is synced from now on, in order; a temporary file by its folder and a question mark."""
    paths = []
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        paths.append(f"{path.parent}/?" if path.name.startswith(".gradstore-") else str(path))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return paths


def test_names_are_durable_before_a_document_that_may_list_them(tmp_path: Path, synced: list[str]) -> None:
    storage = open_storage(str(tmp_path / "store"))
    storage.publish("a/c/0/0", [b"x"])
    storage.publish("a/c/1/0", [b"y"])
    open_storage(str(tmp_path / "store")).publish("b/c/0/0", [b"x"])
    # Another writer's, which this one's document may list as well.
    assert not storage.publish("b/c/0/0", [b"z"])
    root = tmp_path / "store"
    assert synced == [f"{root}/a/c/0/?", f"{root}/a/c/1/?", f"{root}/b/c/0/?"]
    del synced[:]
    storage.publish("records/0.json", [b"{}"])
    document = synced.index(f"{root}/records/?")
    folders = {"a", "a/c", "a/c/0", "a/c/1", "b", "b/c", "b/c/0"}
    assert {str(tmp_path), str(root), *(f"{root}/{name}" for name in folders)} <= set(synced[:document])
    assert {str(root), f"{root}/records"} <= set(synced[document:])
    del synced[:]
    storage.publish("records/1.json", [b"{}"])
    assert set(synced) == {f"{root}/records/?", f"{root}/records", str(root)}


def test_without_fsync_nothing_is_synced(tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_FSYNC", "off")
    for url in (str(tmp_path / "store"), (tmp_path / "another").as_uri()):
        storage = pickle.loads(pickle.dumps(open_storage(url)))
        storage.publish("a/1", [b"x"])
        storage.publish("a/1.json", [b"x"])
        storage.replace("a/1.json", [b"y"])
        storage.delete("a/1")
        assert storage.read("a/1.json") == b"y"
    assert synced == []


@pytest.mark.parametrize("value", ["", "0", "no", "OFF", "true"])
def test_another_value_of_the_fsync_switch_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_FSYNC", value)
    with pytest.raises(SpecError, match=rf"GRADSTORE_FSYNC: found '{value}'; accepted: on, off"):
        open_storage("runs/demo")


def test_an_object_may_have_more_parts_than_the_system_takes_at_once(tmp_path: Path) -> None:
    parts = [b"%d" % number if number % 3 else b"" for number in range(5000)]
    storage = open_storage(str(tmp_path))
    storage.publish("a", parts)
    assert storage.read("a") == b"".join(parts)


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "store"))
    storage.publish("a/b/1", [b"x"])
    shutil.rmtree(tmp_path / "store")
    assert storage.publish("a/b/1", [b"y"])
    assert storage.read("a/b/1") == b"y"


@pytest.mark.parametrize("name", ["GRADSTORE_S3_RETRY_SECONDS", "GRADSTORE_S3_TIMEOUT_SECONDS"])
@pytest.mark.parametrize("value", ["", "soon", "-1", "nan", "inf"])
def test_a_time_that_is_no_number_of_seconds_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SpecError, match=rf"{name}: found '{value}'; accepted: a number of seconds from 0"):
        open_storage("s3://bucket/prefix").read("a")


def test_what_is_kept_of_s3_in_a_pickle_is_where_it_is_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-somebody")
    storage = open_storage("s3://bucket/prefix")
    pickled = pickle.dumps(storage)
    assert b"somebody" not in pickled
    assert pickle.loads(pickled).url == "s3://bucket/prefix"


def test_a_file_in_the_place_of_a_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(StorageError, match="A file stands where the store needs a folder"):
        open_storage(str(tmp_path)).publish("a/b/1", [b"x"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_access_is_explained(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Give this user access"):
        open_storage(str(tmp_path)).publish("a", [b"x"])


def test_a_write_that_the_system_cuts_short_is_explained_and_leaves_nothing(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(StorageError, match=r"a: File too large\. Check the disk"):
            storage.publish("a", [bytes(2**21)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
