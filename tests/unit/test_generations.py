"""Units that are taken back: attempts are fenced off, readers are told, and the next commit counts."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from gradstore.errors import IntegrityError, SupersededError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.blocks import publish_object
from gradstore.store.codecs import encode_document
from gradstore.store.commits import CommitLog
from gradstore.store.features import FeatureSet, FeatureStore
from tests import stores

_NAMES = count()


@pytest.fixture
def storage() -> Storage:
    return open_storage(f"memory://generations-{next(_NAMES)}")


@pytest.fixture
def log(storage: Storage) -> CommitLog:
    return CommitLog(storage, "set/blocks", "featurize")


def reopened(made: FeatureSet) -> FeatureSet:
    return FeatureStore.open(made.storage).open_set(made.info.name)


def test_an_attempt_that_began_before_its_unit_was_taken_back_does_not_commit(log: CommitLog) -> None:
    generation = log.begin(0)
    assert generation == 0
    log.take_back(0, "gc")
    with pytest.raises(SupersededError, match=r"set/blocks: unit 0 was taken back by a repair or an erasure"):
        log.commit(0, generation, {}, {})
    assert log.committed_units() == {}
    assert log.begin(0) == 2


def test_taking_back_twice_fences_off_the_attempt_in_between(log: CommitLog) -> None:
    log.commit(0, 0, {}, {})
    assert log.take_back(0, "repair").generation == 1
    generation = log.begin(0)
    assert generation == 2
    assert log.take_back(0, "erase").generation == 3
    with pytest.raises(SupersededError):
        log.commit(0, generation, {}, {})
    assert log.begin(0) == 4
    assert log.commit(0, 4, {}, {}).generation == 4
    assert log.newest(0) == 4
    assert log.committed_units() == {0: 4}


def test_an_attempt_that_is_late_gets_the_record_that_counts(log: CommitLog) -> None:
    assert log.begin(0) == log.begin(0) == 0
    first = log.commit(0, 0, {}, {"who": "first"})
    assert log.commit(0, 0, {}, {"who": "late"}) == first
    assert log.begin(0) is None


def test_a_commit_of_other_objects_than_the_attempts_own_is_taken_back(storage: Storage, log: CommitLog) -> None:
    entry = publish_object(storage, "set/a", encode_document({"a": 1}))
    log.commit(0, 0, {"a": entry}, {})
    other = publish_object(storage, "set/b", encode_document({"a": 2}))
    with pytest.raises(SupersededError):
        log.commit(0, 0, {"a": other}, {})
    assert log.missing(1) == [0]


def test_a_record_in_the_place_of_another_units_is_named(storage: Storage, log: CommitLog) -> None:
    log.commit(1, 0, {}, {})
    storage.publish("set/blocks/000002.0.json", [storage.read("set/blocks/000001.0.json")])
    with pytest.raises(IntegrityError, match=r"set/blocks/000002\.0\.json: is the record of unit 1, generation 0"):
        CommitLog(storage, "set/blocks", "featurize").committed()


def test_a_zombie_whose_block_was_repaired_and_written_again_changes_nothing(storage: Storage) -> None:
    made = stores.create(storage, stores.set_info())
    zombie = reopened(made)
    assert zombie.begin(1)
    stores.write(made, 1)
    made.log.take_back(1, "repair")
    counts = stores.write(reopened(made), 1)
    before = stores.all_objects(storage)
    with pytest.raises(SupersededError):
        stores.write(zombie, 1)
    after = stores.all_objects(storage)
    assert after == before
    assert reopened(made).log.latest(1) == counts


def test_a_reader_whose_block_was_taken_back_and_changed_is_told_so(storage: Storage) -> None:
    made = stores.create(storage, stores.set_info())
    stores.write(made, 0)
    reader = reopened(made)
    reader.log.pin()
    made.log.take_back(0, "repair")
    storage.delete("features/train/m0/layers.0.mlp/c.0.0")
    with pytest.raises(SupersededError, match="Run the same command again"):
        reader.read_block(0)


def test_bytes_that_were_damaged_on_their_way_are_read_again(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stores.create(storage, stores.set_info())
    stores.write(made, 0)
    whole = storage.read_into
    forgotten: list[str] = []

    def damage_once(path: str, buffer: memoryview) -> int:
        size = whole(path, buffer)
        if not forgotten:
            buffer[0] ^= 1
        return size

    monkeypatch.setattr(storage, "read_into", damage_once)
    monkeypatch.setattr(storage, "forget", forgotten.append)
    found = reopened(made).read_block(0, ["layers.0.mlp"])
    np.testing.assert_array_equal(found["layers.0.mlp"], stores.features(made.info, 0)["layers.0.mlp"])
    assert forgotten == ["features/train/m0/layers.0.mlp/c.0.0"]
