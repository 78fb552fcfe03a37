"""Units that are taken back: attempts are fenced off, readers are told, and the next commit counts."""

from __future__ import annotations

from itertools import count

import numpy as np
import pyarrow as pa
import pytest

from gradstore.errors import IntegrityError, NotReadyError, SupersededError
from gradstore.store.artifacts import QueryArtifact, QueryShape, remove_artifact
from gradstore.store.backend import Storage, open_storage
from gradstore.store.blocks import publish_object
from gradstore.store.codecs import encode_document
from gradstore.store.commits import CommitLog
from gradstore.store.features import FeatureSet, FeatureStore
from tests import stores
from tests.storages import Killed, KillingStorage

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


def differing(made: FeatureSet, block: int) -> tuple[dict[str, np.ndarray], dict[str, pa.Table]]:
    """Features of a block as another machine might compute them: other in the last digit."""
    features = {name: np.nextafter(values, np.inf) for name, values in stores.features(made.info, block).items()}
    tables = {"examples": stores.examples(made.info, block), "statistics": stores.statistics(made.info, block)}
    return features, tables


@pytest.mark.parametrize("changes", range(5))
def test_of_two_attempts_that_differ_in_the_last_digit_one_is_committed_whole(storage: Storage, changes: int) -> None:
    made = stores.create(storage, stores.set_info())
    features, tables = differing(made, 1)

    def another() -> None:
        reopened(made).write_block(1, features, **tables, facts={})

    slow = FeatureStore.open(KillingStorage(storage, changes=changes, event=another)).open_set("train")
    try:
        stores.write(slow, 1)
    except SupersededError:
        stores.write(reopened(made), 1)
    found = reopened(made).read_block(1)
    ours, theirs = stores.features(made.info, 1), features
    assert any(all((found[name] == each[name]).all() for name in found) for each in (ours, theirs))


def test_an_attempt_that_dies_while_it_replaces_anothers_objects_leaves_nothing_committed(storage: Storage) -> None:
    made = stores.create(storage, stores.set_info())
    features, tables = differing(made, 1)
    dying = FeatureStore.open(KillingStorage(storage, changes=2)).open_set("train")
    with pytest.raises(Killed):
        stores.write(dying, 1)
    # The first chunk is there, and is replaced by one that dies; the one that began before may not commit then.
    living = reopened(made)
    assert living.begin(1)
    replacing = FeatureStore.open(KillingStorage(storage, changes=2)).open_set("train")
    with pytest.raises(Killed):
        replacing.write_block(1, features, **tables, facts={})
    with pytest.raises(SupersededError):
        stores.write(living, 1)
    stores.write(reopened(made), 1)
    for name, values in reopened(made).read_block(1).items():
        np.testing.assert_array_equal(values, stores.features(made.info, 1)[name])


def test_an_attempt_of_an_artifact_that_was_pruned_and_made_anew_counts_for_nothing(storage: Storage) -> None:
    def made(damping: float) -> QueryArtifact:
        settings = {"kernel": {"damping": damping}}
        shape = QueryShape(queries=2, groups=("a",), widths={"a": 2})
        return QueryArtifact.create(storage, "block", ("eval", "m0"), settings=settings, shape=shape)

    old = made(0.1)
    remove_artifact(storage, "queries/block/eval/m0")
    new = made(0.2)
    with pytest.raises(SupersededError, match=r"queries/block/eval/m0: was pruned while it was being written"):
        old.write({"a": np.zeros((2, 2), np.float32)}, np.zeros((2, 1)), facts={})
    assert not new.is_complete()
    new.write({"a": np.ones((2, 2), np.float32)}, np.ones((2, 1)), facts={})
    np.testing.assert_array_equal(new.read("a"), 1)
    # Nor does a reader that opened the old one get numbers of the new.
    with pytest.raises(NotReadyError):
        old.read("a")
