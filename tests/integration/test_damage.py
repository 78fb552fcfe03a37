"""Damage of every kind to a store: a reader or writer catches it and names the object, and nothing else is lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.errors import IntegrityError, StorageError
from gradstore.store.backend import Storage
from gradstore.store.features import FeatureSet, FeatureStore
from tests import stores
from tests.faults.contents import damage, records
from tests.faults.processes import ROOT
from tests.servers import S3Server

_NAMES = count()
INFO = stores.set_info(rows=12, block_rows=4)
SET = INFO.folder
CHUNK = f"{SET}/m0/layers.0.mlp/c.1.0"
EXAMPLES = f"{SET}/examples/m0/000001.parquet"
STATISTICS = f"{SET}/statistics/m0/000001.parquet"
RECORD = f"{SET}/blocks/m0/000001.0.json"


@pytest.fixture(params=["directory", "obstore"])
def made(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureSet:
    """A set of which every block is committed."""
    url = str(tmp_path / "store")
    if request.param != "directory":
        seaweed: S3Server = request.getfixturevalue("seaweed")
        for name, value in {**seaweed.env, "GRADSTORE_S3_CLIENT": request.param}.items():
            monkeypatch.setenv(name, value)
        url = seaweed.url(f"damage-{next(_NAMES)}")
    feature_set = stores.create(url, INFO)
    for block in range(INFO.num_blocks):
        stores.write(feature_set, block)
    return feature_set


def opened(made: FeatureSet) -> FeatureSet:
    return FeatureStore.open(made.storage.url).open_set(INFO.name)


def put(storage: Storage, path: str, data: bytes) -> None:
    """Overwrite an object, as nothing in the product does."""
    storage.delete(path)
    assert storage.publish(path, [data])


def flip(storage: Storage, path: str) -> None:
    data = bytearray(storage.read(path))
    data[len(data) // 2] ^= 4
    put(storage, path, bytes(data))


def truncate(storage: Storage, path: str) -> None:
    put(storage, path, storage.read(path)[:-7])


def delete(storage: Storage, path: str) -> None:
    storage.delete(path)


READERS: dict[str, Callable[[FeatureSet], object]] = {
    CHUNK: lambda feature_set: feature_set.read_block(1),
    EXAMPLES: lambda feature_set: feature_set.read_examples(),
    STATISTICS: lambda feature_set: feature_set.read_statistics(),
    RECORD: lambda feature_set: feature_set.read_block(1),
    f"{SET}/inputs/000001.0.parquet": lambda feature_set: feature_set.read_inputs(1),
}


@pytest.mark.parametrize("harm", [flip, truncate, delete])
@pytest.mark.parametrize("path", [path for path in READERS if path != RECORD])
def test_a_damaged_object_of_a_block_is_named_and_the_other_blocks_are_read(
    made: FeatureSet, path: str, harm: Callable[[Storage, str], None]
) -> None:
    harm(made.storage, path)
    with pytest.raises(StorageError, match=f"{re.escape(made.storage.url)}/{path}: ") as caught:
        READERS[path](opened(made))
    assert "Run `gradstore" in str(caught.value)
    require_named_by_verification(made, path)
    require_right(made, [0, 2])


@pytest.mark.parametrize("harm", [flip, truncate])
def test_a_damaged_record_is_named_and_the_other_blocks_are_read(
    made: FeatureSet, harm: Callable[[Storage, str], None]
) -> None:
    harm(made.storage, RECORD)
    with pytest.raises(IntegrityError, match=f"{re.escape(made.storage.url)}/{RECORD}: .*gradstore repair"):
        opened(made).read_block(1)
    require_right(made, [0, 2])
    require_mended_by_taking_back(made)


def test_a_deleted_record_makes_its_block_missing_and_writing_it_again_makes_the_store_whole(made: FeatureSet) -> None:
    before = payloads(made.storage)
    made.storage.delete(RECORD)
    assert opened(made).missing_blocks() == [1]
    require_right(made, [0, 2])
    stores.write(opened(made), 1)
    assert payloads(made.storage) == before


@pytest.mark.parametrize("path", ["gradstore.json", f"{SET}/set.0.json"])
@pytest.mark.parametrize("harm", [flip, truncate])
def test_a_damaged_document_is_named_and_restoring_it_restores_all(
    made: FeatureSet, path: str, harm: Callable[[Storage, str], None]
) -> None:
    whole = made.storage.read(path)
    harm(made.storage, path)
    with pytest.raises(IntegrityError, match=f"{re.escape(made.storage.url)}/{path}: "):
        opened(made)
    put(made.storage, path, whole)
    require_right(made, [0, 1, 2])


@pytest.mark.parametrize("other", [f"{SET}/m0/layers.0.mlp/c.2.0", f"{SET}/m0/layers.1.mlp/c.1.0"])
def test_two_chunks_that_changed_places_are_caught_though_each_is_sound_in_itself(made: FeatureSet, other: str) -> None:
    first, second = made.storage.read(CHUNK), made.storage.read(other)
    put(made.storage, CHUNK, second)
    put(made.storage, other, first)
    for path in (CHUNK, other):
        with pytest.raises(IntegrityError, match=f"{re.escape(made.storage.url)}/{path}: "):
            opened(made).read_block(int(path.split(".")[-2]), [path.split("/")[3]])
    require_named_by_verification(made, CHUNK)
    require_right(made, [0])


def test_the_record_of_another_block_is_caught(made: FeatureSet) -> None:
    other = f"{SET}/blocks/m0/000002.0.json"
    put(made.storage, RECORD, made.storage.read(other))
    with pytest.raises(
        IntegrityError, match=rf"{RECORD}: is the record of unit 2, generation 0\. Run `gradstore repair"
    ):
        opened(made).read_block(1)
    require_right(made, [0, 2])
    require_mended_by_taking_back(made)


def test_an_old_record_in_the_place_of_a_new_one_is_caught(made: FeatureSet) -> None:
    old = made.storage.read(RECORD)
    rewrite(made)
    newest = RECORD.replace(".0.json", ".4.json")
    put(made.storage, newest, old)
    with pytest.raises(
        IntegrityError, match=rf"{newest}: is the record of unit 1, generation 0\. Run `gradstore repair"
    ):
        opened(made).read_block(1)
    require_right(made, [0, 2])


def test_an_old_record_that_counts_again_because_the_new_ones_are_gone_is_caught_at_the_objects(
    made: FeatureSet,
) -> None:
    rewrite(made)
    for generation in (1, 3, 4):
        made.storage.delete(RECORD.replace(".0.json", f".{generation}.json"))
    with pytest.raises(IntegrityError, match=f"{re.escape(made.storage.url)}/{CHUNK}: its bytes are not those"):
        opened(made).read_block(1, ["layers.0.mlp"])
    require_right(made, [0, 2])


@pytest.mark.parametrize(
    ("trouble", "said", "then"),
    [
        ("full", r"No space left on device\. Free space on the disk", [0, 1]),
        ("read-only", r"Read-only file system\. The file system is read-only; choose another run\.store", [2]),
    ],
)
def test_a_disk_that_takes_no_more_is_named_and_what_was_committed_stays(
    tmp_path: Path, trouble: str, said: str, then: list[int]
) -> None:
    found = in_a_mount_namespace(trouble, str(tmp_path))
    assert re.match(rf"{re.escape(str(tmp_path))}/store/features/train/\S+: {said}", found["error"])
    assert found["then"] == then
    assert found["in the end"] == [0, 1, 2, 3]
    assert found["whole"]


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret-value", r"gradstore\.json: .*Check AWS_"),
        ("bucket", "no-such-bucket", r"gradstore\.json: NoSuchBucket.*Create the bucket"),
    ],
)
def test_a_wrong_secret_or_bucket_is_named_to_readers_and_writers_and_nothing_is_lost(
    seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, client: str, setting: str, value: str, said: str
) -> None:
    for name, known in {**seaweed.env, "GRADSTORE_S3_CLIENT": client}.items():
        monkeypatch.setenv(name, known)
    url = seaweed.url(f"damage-{next(_NAMES)}")
    made = stores.create(url, INFO)
    stores.write(made, 1)
    before = stores.all_objects(made.storage)
    with monkeypatch.context() as wrong:
        if setting == "bucket":
            url = url.replace(seaweed.bucket, value)
        else:
            wrong.setenv(setting, value)
        for use in (FeatureStore.open, lambda where: stores.create(where, INFO)):
            with pytest.raises(StorageError, match=f"{re.escape(url)}/{said}") as caught:
                use(url)
            assert value not in str(caught.value).replace(url, "")
    assert stores.all_objects(made.storage) == before


def in_a_mount_namespace(trouble: str, folder: str) -> dict[str, Any]:
    """What `tests.faults.mounted` found; skips where this user may not mount."""
    inside = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*inside, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount")
    command = [*inside, sys.executable, "-m", "tests.faults.mounted", trouble, folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def rewrite(made: FeatureSet) -> None:
    """Take block 1 back and write it with other features."""
    made.log.take_back(1, "repair")
    values = {name: value + 1 for name, value in stores.features(INFO, 1).items()}
    tables = {"examples": stores.examples(INFO, 1), "statistics": stores.statistics(INFO, 1)}
    record = opened(made).write_block(1, values, **tables, facts={})
    # Taken back once more by who replaced what lay there.
    assert record.generation == 4


def payloads(storage: Storage) -> dict[str, bytes]:
    found = stores.all_objects(storage)
    return {path: data for path, data in found.items() if path not in records(storage, INFO)}


def require_right(made: FeatureSet, blocks: list[int]) -> None:
    """What was committed in other blocks is as it was."""
    for block in blocks:
        for name, values in opened(made).read_block(block).items():
            np.testing.assert_array_equal(values, stores.features(INFO, block)[name])


def require_named_by_verification(made: FeatureSet, path: str) -> None:
    assert [said for said in damage(made.storage.url) if path in said] != []


def require_mended_by_taking_back(made: FeatureSet) -> None:
    """A repair takes the block back; then it is computed again."""
    made.log.take_back(1, "repair")
    assert opened(made).missing_blocks() == [1]
    stores.write(opened(made), 1)
    require_right(made, [0, 1, 2])
