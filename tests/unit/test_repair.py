"""repair: what is broken is missing then, and nothing else; the next run writes just that, and the store is what it was."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from gradstore.errors import SupersededError
from gradstore.store.artifacts import ContributionArtifact, KernelArtifact
from gradstore.store.backend import Storage
from gradstore.store.features import FeatureStore, erase_rows
from gradstore.store.health import Mended, mend
from tests import stores
from tests.formats import make_fixture
from tests.health import (
    change,
    check,
    contents,
    cut,
    fixture_in_memory,
    flip,
    problems,
    swap,
    write_missing,
    written_store,
)
from tests.storages import Killed, KillingStorage

CHUNK = "features/train/b/layers.0.mlp/c.1.0"
TABLE = "features/train/examples/b/000001.parquet"
RECORD = "features/train/blocks/b/000001.0.json"

Damage = Callable[[Storage], object]
DAMAGES: dict[str, tuple[Damage, dict[str, list[int]]]] = {
    "deleted chunk": (lambda s: s.delete(CHUNK), {"a": [], "b": [1]}),
    "deleted table": (lambda s: s.delete(TABLE), {"a": [], "b": [1]}),
    "truncated chunk": (lambda s: cut(s, CHUNK), {"a": [], "b": [1]}),
    "flipped chunk": (lambda s: flip(s, CHUNK), {"a": [], "b": [1]}),
    "flipped table": (lambda s: flip(s, TABLE), {"a": [], "b": [1]}),
    "swapped chunks": (lambda s: swap(s, CHUNK, CHUNK.replace("/b/", "/a/")), {"a": [], "b": []}),
    "flipped record": (lambda s: flip(s, RECORD), {"a": [], "b": [1]}),
    "stale record": (lambda s: change(s, RECORD, s.read(RECORD.replace("1.0", "2.0"))), {"a": [], "b": [1]}),
}


def repaired(storage: Storage, *, full: bool = True) -> Mended:
    return mend(check(storage, full=full), dry_run=False)


def run_again(storage: Storage) -> dict[str, list[int]]:
    return write_missing(FeatureStore.open(storage).open_set("train"))


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "swapped chunks"])
def test_a_broken_block_alone_is_computed_anew_and_the_store_is_what_it_was(name: str) -> None:
    damage, broken = DAMAGES[name]
    storage = written_store()
    before, attempts = contents(storage), attempts_of(storage)
    damage(storage)

    mended = repaired(storage)

    assert [(item.unit.ledger.name, item.unit.number) for item in mended.taken_back] == [("features/train/b", 1)]
    assert mended.left == ()
    assert problems(storage, full=True) == set()
    assert repaired(storage).taken_back == ()
    assert run_again(storage) == broken
    assert contents(storage) == before
    assert problems(storage, full=True) == set()
    assert {place for place, attempt in attempts_of(storage).items() if attempts.get(place) != attempt} == {("b", 1)}


def attempts_of(storage: Storage) -> dict[tuple[str, int], str]:
    """Attempt that committed every block, by member and block."""
    opened = FeatureStore.open(storage).open_set("train")
    return {
        (member, block): record.attempt
        for member in opened.info.members
        for block, record in opened.of_member(member).log.committed().items()
    }


def test_of_swapped_chunks_each_is_sound_and_both_blocks_are_computed_anew() -> None:
    storage = written_store()
    before = contents(storage)
    other = CHUNK.replace("/c.1.", "/c.0.")
    swap(storage, CHUNK, other)
    mended = repaired(storage)
    assert {path for item in mended.taken_back for path in item.removed} == {CHUNK, other}
    assert run_again(storage) == {"a": [], "b": [0, 1]}
    assert contents(storage) == before
    assert problems(storage, full=True) == set()


def test_a_quick_repair_of_a_block_looks_at_all_of_its_bytes() -> None:
    storage = written_store()
    storage.delete(CHUNK)
    flip(storage, TABLE)
    (item,) = repaired(storage, full=False).taken_back
    assert item.removed == (TABLE,)


def test_trying_a_repair_changes_nothing() -> None:
    storage = written_store()
    flip(storage, CHUNK)
    storage.delete("zarr.json")
    before = stores.all_objects(storage)
    mended = mend(check(storage, full=True), dry_run=True)
    assert [item.removed for item in mended.taken_back] == [(CHUNK,)]
    assert mended.metadata == ("zarr.json",)
    assert stores.all_objects(storage) == before


def test_missing_and_wrong_metadata_is_written_again_as_it_was() -> None:
    storage = fixture_in_memory()
    before = stores.all_objects(storage)
    paths = [path for path in before if path.endswith("zarr.json") or "/scale/c/" in path]
    for number, path in enumerate(paths):
        storage.delete(path) if number % 2 else change(storage, path, b"{}")
    mended = repaired(storage)
    assert sorted(mended.metadata) == sorted(paths)
    assert mended.left == ()
    assert stores.all_objects(storage) == before


def test_documents_and_inputs_are_left_to_others_with_their_way_out() -> None:
    storage = fixture_in_memory()
    flip(storage, "features/eval/claim.0.json")
    storage.delete("features/learn/inputs/000000.0.parquet")
    before = stores.all_objects(storage)
    left = repaired(storage).left
    assert [(problem.kind, problem.remedy) for problem in left] == [
        ("damaged document", "Delete it."),
        ("missing inputs", "Run `gradstore featurize` again: it restores it."),
    ]
    assert stores.all_objects(storage) == before


def test_a_lost_generation_is_mended_by_a_higher_one_that_every_reader_finds() -> None:
    storage = fixture_in_memory()
    for generation in (0, 1):
        storage.delete(f"features/train/blocks/m0/000000.{generation}.json")
    repaired(storage)
    log = FeatureStore.open(storage).open_set("train").log
    assert problems(storage, full=True) == set()
    assert log.missing(2) == [0]
    assert log.newest(0) == max(log.generations()[0], 3)


def test_units_of_artifacts_are_made_anew() -> None:
    storage = fixture_in_memory()
    before = contents(storage)
    flip(storage, "kernels/block/m0/eigenvalues/head%2F%CE%BC/c.0")
    flip(storage, "contributions/block/eval/values/c/c.0.1.0")
    mended = repaired(storage)
    assert [(item.unit.ledger.name, item.unit.number) for item in mended.taken_back] == [
        ("contributions/block/eval", 1),
        ("kernels/block/m0", 0),
    ]
    kernel = KernelArtifact.open(storage, "block", "m0")
    assert kernel.missing_units() == [0]
    kernel.write_bundle(0, {group: make_fixture.spectrum(group) for group in kernel.bundles[0]}, facts={})
    c = ContributionArtifact.open(storage, "block", "eval")
    assert c.missing_blocks() == [1]
    c.write_block(1, make_fixture.contributions()[:, slice(*c.shape.block_range(1))], facts={})
    assert contents(storage) == before
    assert problems(storage, full=True) == set()


@pytest.mark.parametrize(("name", "after"), [*product(["flipped chunk", "flipped record"], [False, True])])
def test_a_repair_that_is_killed_at_any_change_may_be_run_again(name: str, after: bool) -> None:
    killed = 0
    while True:
        storage = written_store()
        before = contents(storage)
        DAMAGES[name][0](storage)
        try:
            mend(check(KillingStorage(storage, changes=killed, after=after), full=True), dry_run=False)
        except Killed:
            killed += 1
        else:
            break
        repaired(storage)
        assert problems(storage, full=True) == set()
        assert run_again(storage) == {"a": [], "b": [1]}
        assert contents(storage) == before
    assert killed == 2


def test_an_attempt_that_began_while_objects_were_removed_does_not_commit() -> None:
    storage = written_store()
    flip(storage, CHUNK)
    zombie = FeatureStore.open(storage).open_set("train", "b")
    # It begins between the record that takes the block back and the one that does so again.
    event = KillingStorage(storage, changes=1, event=lambda: zombie.begin(1))
    mend(check(event, full=True), dry_run=False)
    with pytest.raises(SupersededError):
        stores.write(zombie, 1)
    assert run_again(storage) == {"a": [], "b": [1]}
    assert problems(storage, full=True) == set()


def test_a_repaired_block_with_erased_rows_counts_as_erased() -> None:
    storage = written_store()
    erase_rows(FeatureStore.open(storage), "train", [5], lambda info, _: stores.statistics(info, 0))
    flip(storage, CHUNK)
    (item,) = repaired(storage).taken_back
    assert len(item.removed) == 5
    assert problems(storage, full=True) == set()


def test_a_damaged_block_of_which_an_erasure_was_killed_is_given_up_and_the_erasure_ends() -> None:
    storage = written_store()
    dying = FeatureStore.open(KillingStorage(storage, changes=5))
    with pytest.raises(Killed):
        erase_rows(dying, "train", [5], lambda info, _: stores.statistics(info, 0))
    chunk = CHUNK.replace("/b/", "/a/")
    flip(storage, chunk)
    assert ("wrong bytes", chunk) in problems(storage, full=True)
    repaired(storage)
    erase_rows(FeatureStore.open(storage), "train", [5], lambda info, _: stores.statistics(info, 0))
    assert problems(storage, full=True) == set()
    opened = FeatureStore.open(storage).open_set("train")
    assert (opened.of_member("a").missing_blocks(), opened.of_member("b").missing_blocks()) == ([1], [])
