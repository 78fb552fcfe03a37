"""gc: what nothing names goes when it is old enough, fenced off before; what a record or document names never does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import count

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.errors import SupersededError
from gradstore.store.artifacts import KernelArtifact
from gradstore.store.backend import ObjectInfo, Storage, open_storage
from gradstore.store.backend.memory import MemoryStorage
from gradstore.store.features import FeatureSet, FeatureStore, SetInfo, erase_rows
from gradstore.store.health import Collected, collect
from tests import stores
from tests.formats import make_fixture
from tests.health import check, contents, fixture_in_memory, flip, problems, write_missing, written_store
from tests.storages import Killed, KillingStorage

DAY = 86_400.0
CHUNK = "features/train/m0/layers.0.mlp/c.1.0"
_NAMES = count()


def collected(storage: Storage, *, grace_seconds: float = 0.0, dry_run: bool = False) -> Collected:
    return collect(check(storage), grace_seconds=grace_seconds, dry_run=dry_run)


def with_an_attempt_that_died(*, objects: int = 2) -> FeatureSet:
    """A set of three blocks: 0 is written, and of 1 an attempt wrote the first objects."""
    made = stores.create(f"memory://garbage-{next(_NAMES)}", stores.set_info())
    stores.write(made, 0)
    with suppress(Killed):
        stores.write(FeatureStore.open(KillingStorage(made.storage, changes=objects)).open_set("train"), 1)
    return made


def backdate(storage: Storage, path: str, seconds: float) -> None:
    assert isinstance(storage, MemoryStorage)
    storage._objects[path] = storage.read(path), time.time() - seconds


def statistics(info: SetInfo, _: object) -> pa.Table:
    return stores.statistics(info, 0)


def test_a_fresh_attempt_stays_whole_even_where_its_first_objects_are_old() -> None:
    made = with_an_attempt_that_died()
    backdate(made.storage, CHUNK, 3 * DAY)
    before = stores.all_objects(made.storage)
    found = collected(made.storage, grace_seconds=DAY)
    assert found.orphans == ()
    assert len(found.young) == 2
    assert stores.all_objects(made.storage) == before


def test_an_old_attempt_is_fenced_off_and_its_objects_go() -> None:
    made = with_an_attempt_that_died()
    storage = made.storage
    paths = [info.path for info in check(storage).loose]
    assert len(paths) == 2
    for path in paths:
        backdate(storage, path, 2 * DAY)
    before = stores.all_objects(storage)

    tried = collected(storage, grace_seconds=DAY, dry_run=True)
    assert stores.all_objects(storage) == before
    found = collected(storage, grace_seconds=DAY)

    assert [each.objects for each in found.orphans] == [each.objects for each in tried.orphans]
    assert [info.path for each in found.orphans for info in each.objects] == paths
    latest = made.log.latest(1)
    assert latest is not None
    assert (latest.state, latest.facts["reason"]) == ("missing", "gc")
    assert stores.all_objects(storage).keys() - before.keys() == {
        f"features/train/blocks/m0/000001.{generation}.json" for generation in (1, 3)
    }
    assert before.keys() - stores.all_objects(storage).keys() == set(paths)
    assert check(storage).loose == []
    assert collected(storage).orphans == ()


def test_a_living_attempt_that_is_fenced_off_after_all_may_begin_anew() -> None:
    made = with_an_attempt_that_died()
    living = FeatureStore.open(made.storage).open_set("train")
    assert living.begin(1)
    collected(made.storage)
    with pytest.raises(SupersededError):
        stores.write(living, 1)
    stores.write(living, 1)
    stores.write(living, 2)
    assert problems(made.storage, full=True) == set()
    assert check(made.storage).loose == []


def test_an_attempt_that_adopts_objects_while_they_go_does_not_commit() -> None:
    made = with_an_attempt_that_died()
    other = FeatureStore.open(made.storage).open_set("train")

    def commit_now() -> None:
        with suppress(SupersededError):
            stores.write(other, 1)

    # Just before and just after either of the two records that take the block back.
    for changes, after in ((0, False), (0, True), (1, False), (1, True)):
        storage = KillingStorage(made.storage, changes=changes, after=after, event=commit_now)
        collect(check(storage), grace_seconds=0, dry_run=False)
        assert problems(made.storage, full=True) == set()
        with suppress(Killed):
            stores.write(FeatureStore.open(KillingStorage(made.storage, changes=2)).open_set("train"), 1)
    write_missing(FeatureStore.open(made.storage).open_set("train"))
    assert problems(made.storage, full=True) == set()


def test_a_block_that_was_just_taken_back_is_left_to_who_computes_it_anew() -> None:
    made = with_an_attempt_that_died()
    stores.write(made, 2)
    made.log.take_back(2, "repair")
    for info in check(made.storage).loose:
        backdate(made.storage, info.path, 2 * DAY)
    assert [each.unit.number for each in collected(made.storage, grace_seconds=DAY).orphans] == [1]


def test_nothing_goes_but_orphans_from_a_store_of_everything() -> None:
    storage = fixture_in_memory()
    strangers = ["report.html", "features/train/notes.txt", "kernels/block/m0/extra/c.0", "features/old/m0/a/c.0.0"]
    for path in strangers:
        storage.publish(path, [b"somebody's"])
    before = stores.all_objects(storage)
    health = check(storage)
    loose = {info.path for info in health.loose}
    assert sorted(info.path for info in health.unknown) == sorted(strangers)
    collected(storage)
    after = stores.all_objects(storage)
    assert before.keys() - after.keys() == loose
    assert {path: after[path] for path in before.keys() - loose} == {
        path: before[path] for path in before.keys() - loose
    }
    assert problems(storage, full=True) == set()


@pytest.mark.parametrize("document", ["features/learn/set.0.json", "features/learn/claim.0.json", "gradstore.json"])
def test_where_a_document_is_damaged_nothing_goes_of_what_it_is_about(document: str) -> None:
    storage = fixture_in_memory()
    flip(storage, document)
    before = stores.all_objects(storage)
    collected(storage)
    gone = before.keys() - stores.all_objects(storage).keys()
    assert (gone == set()) == ("set.0" in document)


def test_the_document_of_an_earlier_version_in_the_newest_ones_place_costs_no_inputs() -> None:
    storage = fixture_in_memory()
    stale = storage.read("features/train/set.1.json")
    storage.delete("features/train/set.2.json")
    storage.publish("features/train/set.2.json", [stale])
    collected(storage)
    assert storage.read("features/train/inputs/000000.2.parquet")


def test_a_damaged_commit_is_no_garbage() -> None:
    storage = written_store()
    flip(storage, "features/train/blocks/a/000001.0.json")
    before = stores.all_objects(storage)
    assert collected(storage).orphans == ()
    assert stores.all_objects(storage) == before


def test_inputs_of_a_version_that_is_being_made_stay_and_those_of_one_that_was_given_up_go() -> None:
    storage = written_store()
    info = FeatureStore.open(storage).open_set("train").info
    extended = info.appended(3, "hash of more", None)
    with pytest.raises(Killed):
        FeatureStore.open(KillingStorage(storage, changes=2)).extend_set(
            "train", extended, stores.inputs(extended)[info.num_blocks :]
        )
    assert collected(storage).old_inputs == ()
    storage.delete("features/train/claim.1.json")
    assert collected(storage, grace_seconds=DAY).old_inputs == ()
    assert [info.path for info in collected(storage).old_inputs] == ["features/train/inputs/000003.1.parquet"]


def test_what_an_erasure_goes_on_from_stays_until_it_has_ended() -> None:
    killed = 1
    while True:
        storage = written_store()
        try:
            erase_rows(FeatureStore.open(KillingStorage(storage, changes=killed)), "train", [5], statistics)
        except Killed:
            killed += 1
        else:
            break
        collected(storage)
        erase_rows(FeatureStore.open(storage), "train", [5], statistics)
        opened = FeatureStore.open(storage).open_set("train")
        assert [opened.of_member(member).missing_blocks() for member in ("a", "b")] == [[], []]
        assert problems(storage, full=True) == set()
    # Claim, inputs and document of the version; of the block in two members a record, five objects, a record.
    assert killed == 3 + 2 * 7


def test_what_somebody_is_at_work_on_stays() -> None:
    made = with_an_attempt_that_died()
    storage = made.storage
    gone = "features/train/m0/layers.0.mlp/c.0.0"
    # Its records were listed before it was taken back, and its chunks after.
    listed = {path: info for path, info in check(storage).survey.listing.items() if path != gone}
    made.log.take_back(0, "erase", {"erased": [1], "of": 0})
    storage.delete(gone)

    class ListingFromBefore(MemoryStorage):
        def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
            return iter(listed.values())

    found = collected(ListingFromBefore(storage.url.removeprefix("memory://")), dry_run=True)
    assert [each.unit.number for each in found.orphans] == [1]


def test_an_orphan_of_an_artifact_goes_and_its_block_is_made_anew() -> None:
    storage = fixture_in_memory()
    collected(storage)
    before = contents(storage)
    storage.delete(f"{KernelArtifact.open(storage, 'block', 'm0').log.folder}/000000.0.json")
    assert len(check(storage).loose) == 4
    found = collected(storage)
    assert [each.unit.ledger.name for each in found.orphans] == ["kernels/block/m0"]
    kernel = KernelArtifact.open(storage, "block", "m0")
    kernel.write_bundle(0, {group: make_fixture.spectrum(group) for group in kernel.bundles[0]}, facts={})
    assert contents(storage) == before


STEPS = st.sampled_from(["write", "die early", "die late", "take back", "erase", "append", "gc"])


@settings(max_examples=40)
@given(st.lists(st.tuples(STEPS, st.integers(0, 2)), max_size=8))
def test_whatever_happened_gc_removes_nothing_that_is_named(steps: list[tuple[str, int]]) -> None:
    storage = open_storage(f"memory://garbage-{next(_NAMES)}")
    stores.create(storage, stores.set_info())
    for step, block in steps:
        take(storage, step, block)
    opened = FeatureStore.open(storage).open_set("train")
    committed = opened.log.committed_units()
    whole = {path: data for path, data in stores.all_objects(storage).items() if is_named(opened, path)}
    collected(storage)
    assert opened.log.committed_units() == committed
    after = stores.all_objects(storage)
    assert {path: after.get(path) for path in whole} == whole
    assert problems(storage, full=True) == set()
    assert check(storage).loose == []


def is_named(opened: FeatureSet, path: str) -> bool:
    """Whether a committed record or a document names an object, or it is one of these: found without gradstore's health."""
    named = {f"features/train/{name}" for record in opened.log.committed().values() for name in record.objects}
    named |= {f"features/train/{name}" for name in opened.version.inputs}
    return path.endswith(".json") or path in named


def take(storage: Storage, step: str, block: int) -> None:
    store = FeatureStore.open(storage)
    opened = store.open_set("train")
    if step == "write":
        stores.write(opened, block)
    elif step.startswith("die"):
        dying = KillingStorage(storage, changes=1 if step == "die early" else 4)
        with suppress(Killed):
            stores.write(FeatureStore.open(dying).open_set("train"), block)
    elif step == "take back":
        opened.log.take_back(block, "repair")
    elif step == "erase":
        erase_rows(store, "train", [4 * block + 1], statistics)
    elif step == "append":
        extended = opened.info.appended(2, f"{opened.info.data_hash}, more", None)
        store.extend_set("train", extended, stores.inputs(extended)[opened.info.num_blocks :])
    else:
        collected(storage)
