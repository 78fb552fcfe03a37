"""The store on a real SeaweedFS, through obstore and through s3fs."""

from __future__ import annotations

import multiprocessing
import os
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import xarray

from gradstore.errors import IntegrityError, NotReadyError, ObjectMissingError, StorageError
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureStore
from tests import stores
from tests.servers import S3Server
from tests.storages import Killed, KillingStorage, Places, StorageSuite

pytestmark = pytest.mark.slow

_NAMES = count()


@pytest.fixture
def server(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with the environment that clients need."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    return seaweed


@pytest.fixture(params=["obstore", "s3fs"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GRADSTORE_S3_CLIENT", request.param)
    return str(request.param)


@pytest.mark.usefixtures("client")
class TestS3(StorageSuite):
    @pytest.fixture
    def new_url(self, server: S3Server) -> Places:
        return lambda: server.url(f"storage-{next(_NAMES)}/deep")


@pytest.mark.slow
@pytest.mark.usefixtures("client")
class TestCachedS3(StorageSuite):
    @pytest.fixture
    def new_url(self, server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
        monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
        return lambda: server.url(f"cached-{next(_NAMES)}")


@pytest.mark.usefixtures("client")
def test_blocks_are_read_from_the_cache_and_anew_when_it_is_damaged(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = server.url(f"store-{next(_NAMES)}")
    made = stores.create(url, stores.set_info())
    stores.write(made, 0)
    expected = made.read_block(0)
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path))
    for _ in range(2):
        read = FeatureStore.open(url).open_set("train").read_block(0)
        for name, values in read.items():
            np.testing.assert_array_equal(values, expected[name])
        copies = list(tmp_path.glob("objects/*/*"))
        assert len(copies) == len(expected)
        for copy in copies:
            copy.write_bytes(copy.read_bytes()[:-1])
    for path in {info.path for info in made.storage.list_objects("features/train/m0") if "/c." in info.path}:
        made.storage.delete(path)
    with pytest.raises(ObjectMissingError, match="is missing, though it was committed"):
        FeatureStore.open(url).open_set("train").read_block(0)


@pytest.mark.usefixtures("client")
def test_a_set_is_written_killed_resumed_and_read(server: S3Server) -> None:
    storage = open_storage(server.url(f"store-{next(_NAMES)}"))
    info = stores.set_info(dtype="float16")
    stores.create(storage, info)
    dying = FeatureStore.open(KillingStorage(storage, changes=2)).open_set("train")
    with pytest.raises(Killed):
        stores.write(dying, 1)
    opened = FeatureStore.open(storage.url).open_set("train")
    assert opened.missing_blocks() == [0, 1, 2]
    for block in opened.missing_blocks():
        stores.write(opened, block)
    assert opened.snapshot().blocks == ((0, 0), (1, 0), (2, 0))
    for block in range(info.num_blocks):
        for name, values in opened.read_block(block).items():
            np.testing.assert_allclose(values, stores.features(info, block)[name], rtol=1e-3, atol=1e-6)
    assert opened.read_examples(["row"]).column("row").to_pylist() == list(range(11))


def test_what_obstore_wrote_s3fs_and_xarray_read(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    url = server.url(f"store-{next(_NAMES)}")
    made = stores.create(url, stores.set_info())
    for block in made.missing_blocks():
        stores.write(made, block)
    monkeypatch.setenv("GRADSTORE_S3_CLIENT", "s3fs")
    through_s3fs = FeatureStore.open(url).open_set("train")
    dataset = xarray.open_zarr(url, group="features/train/m0", consolidated=False, chunks=None)
    for block in range(made.info.num_blocks):
        values = through_s3fs.read_block(block)
        for array in dataset.data_vars.values():
            rows = array.values[slice(*made.info.block_range(block))]
            np.testing.assert_array_equal(rows, values[array.attrs["group"]])


def test_damage_on_s3_is_caught_and_the_object_named(server: S3Server) -> None:
    made = stores.create(server.url(f"store-{next(_NAMES)}"), stores.set_info())
    stores.write(made, 0)
    path = "features/train/m0/layers.0.mlp/c.0.0"
    data = bytearray(made.storage.read(path))
    data[3] ^= 8
    made.storage.delete(path)
    made.storage.publish(path, [bytes(data)])
    with pytest.raises(IntegrityError, match=path):
        made.read_block(0)


def write_first_block(url: str) -> str:
    """What a worker process does."""
    return stores.write(FeatureStore.open(url).open_set("train"), 0).attempt


@pytest.mark.usefixtures("client")
def test_of_processes_that_race_for_a_block_one_commits(server: S3Server) -> None:
    url = server.url(f"store-{next(_NAMES)}")
    stores.create(url, stores.set_info())
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        attempts = pool.map(write_first_block, [url] * 8, chunksize=1)
    assert len(set(attempts)) == 1
    opened = FeatureStore.open(url).open_set("train")
    assert opened.log.committed()[0].attempt == attempts[0]
    assert set(opened.read_block(0)) == set(stores.GROUPS)


@pytest.mark.usefixtures("client")
def test_a_wrong_secret_is_explained_without_showing_it(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value")
    with pytest.raises(StorageError, match="Check AWS_") as caught:
        FeatureStore.open(server.url("anything"))
    assert server.url("anything") in str(caught.value)
    assert "wrong-secret-value" not in str(caught.value)


@pytest.mark.usefixtures("client", "server")
def test_a_missing_bucket_is_explained() -> None:
    with pytest.raises(StorageError, match=r"NoSuchBucket.*Create the bucket"):
        FeatureStore.create("s3://no-such-bucket/x", contract={}, run={})


def test_no_credentials_are_explained(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_S3_CLIENT", "s3fs")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StorageError, match="Set AWS_ACCESS_KEY_ID"):
        FeatureStore.open(server.url("anything"))


@pytest.mark.usefixtures("client")
def test_an_endpoint_that_does_not_answer_is_explained(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("GRADSTORE_S3_RETRY_SECONDS", "1")
    with pytest.raises(StorageError, match="Check that AWS_ENDPOINT_URL is right and reachable"):
        FeatureStore.open(server.url("anything"))


def test_a_store_that_is_not_there_is_not_ready(server: S3Server) -> None:
    with pytest.raises(NotReadyError, match="no store is there"):
        FeatureStore.open(server.url("nothing-here"))


def test_a_process_forked_after_s3_was_used_is_told_to_spawn(server: S3Server) -> None:
    storage = open_storage(server.url("forked"))
    storage.publish("a", [b"1"])
    child = os.fork()
    if child == 0:
        try:
            open_storage(storage.url).read("a")
        except StorageError as error:
            os._exit(0 if "Start workers with spawn" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
