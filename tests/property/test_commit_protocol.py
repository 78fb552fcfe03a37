"""Whatever is killed, whenever: nothing uncommitted is ever visible, and what is committed is right."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gradstore.errors import NotReadyError, SupersededError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.commits import Record
from gradstore.store.features import FeatureSet, FeatureStore, SetInfo, erase_rows, is_finished
from gradstore.store.features.inputs import blanked
from gradstore.store.health import Health, check_store, mend
from tests import stores
from tests.storages import Killed, KillingStorage

_NAMES = count()
INFO = stores.set_info(rows=7, block_rows=3, dtype="float16", groups={"a": 2, "b/c": 3})
BLOCKS = INFO.num_blocks
PUBLISHED_PER_BLOCK = len(INFO.arrays) + 3
MEANWHILE = ("write", "take back", "take back and write", "erase", "erase and write")

blocks = st.integers(0, BLOCKS - 1)
rows_to_erase = st.sets(st.integers(0, INFO.rows - 1), min_size=1, max_size=2)


class CommitProtocol(RuleBasedStateMachine):
    """Create, write, kill, retry, damage, verify, repair, erase and reopen, in any order; two writers at most.

    ``committed`` holds the attempt of every block whose record was seen: it may change or vanish only when the block is taken
    back. ``asked`` are rows whose erasure was begun, ``gone`` those whose erasure was finished: they never come back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.committed: dict[int, str] = {}
        self.asked: set[int] = set()
        self.gone: set[int] = set()

    def open_empty(self) -> Storage:
        return open_storage(f"memory://protocol-{next(_NAMES)}")

    @initialize()
    def begin(self) -> None:
        self.storage = self.open_empty()
        self.created = False

    @rule(changes=st.integers(0, 20), after=st.booleans())
    def create_and_be_killed(self, changes: int, after: bool) -> None:
        with suppress(Killed):
            stores.create(KillingStorage(self.storage, changes=changes, after=after), INFO)
            self.created = True

    @rule()
    def create(self) -> None:
        stores.create(self.storage, INFO)
        self.created = True

    @precondition(lambda self: self.created)
    @rule(block=blocks, changes=st.integers(0, PUBLISHED_PER_BLOCK), after=st.booleans())
    def write_and_be_killed(self, block: int, changes: int, after: bool) -> None:
        with suppress(Killed):
            write(opened(KillingStorage(self.storage, changes=changes, after=after)), block)

    @precondition(lambda self: self.created)
    @rule(block=blocks)
    def write(self, block: int) -> None:
        record = write(opened(self.storage), block)
        assert self.committed.setdefault(block, record.attempt) == record.attempt

    @precondition(lambda self: self.created)
    @rule(
        block=blocks,
        changes=st.integers(0, PUBLISHED_PER_BLOCK - 1),
        after=st.booleans(),
        meanwhile=st.sampled_from(MEANWHILE),
        row=st.integers(0, INFO.rows - 1),
    )
    def write_and_be_stopped_while_others_go_on(
        self, block: int, changes: int, after: bool, meanwhile: str, row: int
    ) -> None:
        others = partial(self.go_on, block, meanwhile, row)
        zombie = opened(KillingStorage(self.storage, changes=changes, after=after, event=others))
        try:
            record = write(zombie, block)
        except SupersededError:
            # Two attempts that knew of different erasures: the block is taken back, and neither counts.
            if block in opened(self.storage).missing_blocks():
                self.committed.pop(block, None)
        else:
            assert self.committed.setdefault(block, record.attempt) == record.attempt

    def go_on(self, block: int, meanwhile: str, row: int) -> None:
        if "take back" in meanwhile:
            self.take_back(block)
        if "erase" in meanwhile:
            self.erase({row})
        if "write" in meanwhile:
            self.write(block)

    @precondition(lambda self: self.created)
    @rule(block=blocks)
    def take_back(self, block: int) -> None:
        opened(self.storage).log.take_back(block, "repair")
        self.committed.pop(block, None)

    @precondition(lambda self: self.created)
    @rule(rows=rows_to_erase)
    def erase(self, rows: set[int]) -> None:
        self.expect_erasure(rows)
        erase_rows(FeatureStore.open(self.storage), INFO.name, sorted(rows), statistics)
        now = opened(self.storage)
        assert is_finished(now)
        self.gone |= set(now.info.erased)
        assert rows <= self.gone <= self.asked

    @precondition(lambda self: self.created)
    @rule(rows=rows_to_erase, changes=st.integers(0, 16), after=st.booleans())
    def erase_and_be_killed(self, rows: set[int], changes: int, after: bool) -> None:
        self.expect_erasure(rows)
        with suppress(Killed):
            store = FeatureStore.open(KillingStorage(self.storage, changes=changes, after=after))
            erase_rows(store, INFO.name, sorted(rows), statistics)

    def expect_erasure(self, rows: set[int]) -> None:
        self.asked |= rows
        # An erasure finishes those before it.
        for block in {row // INFO.block_rows for row in self.asked}:
            self.committed.pop(block, None)

    @precondition(lambda self: self.created)
    @rule(block=blocks, data=st.data())
    def damage_an_object_of_an_uncommitted_block(self, block: int, data: st.DataObject) -> None:
        if block in opened(self.storage).missing_blocks():
            self.damage(block, data)

    @precondition(lambda self: self.created)
    @rule(block=blocks, data=st.data())
    def damage_a_committed_object_verify_and_repair(self, block: int, data: st.DataObject) -> None:
        now = opened(self.storage)
        if block in now.missing_blocks() or not is_finished_or_not_begun(now):
            return
        path = self.damage(block, data)
        found = checked(self.storage)
        assert [problem.path for problem in found.problems] == [path]
        assert [item.unit.number for item in mend(found, dry_run=False).taken_back] == [block]
        assert not checked(self.storage).problems
        assert block in opened(self.storage).missing_blocks()
        self.committed.pop(block, None)

    @precondition(lambda self: self.created)
    @rule()
    def verify(self) -> None:
        kinds = {problem.kind for problem in checked(self.storage).problems}
        assert kinds <= ({"unfinished erasure"} if self.asked else set())

    def damage(self, block: int, data: st.DataObject) -> str | None:
        """Cut an object of a block short, if it has one; return its path."""
        ends = (f"/c.{block}.0", f"examples/m0/{block:06d}.parquet", f"statistics/m0/{block:06d}.parquet")
        found = sorted(info.path for info in self.storage.list_objects(INFO.folder) if info.path.endswith(ends))
        if not found:
            return None
        path = data.draw(st.sampled_from(found))
        torn = self.storage.read(path)[:-3]
        self.storage.delete(path)
        self.storage.publish(path, [torn])
        return path

    @invariant()
    def what_is_committed_is_whole_and_right_and_the_rest_is_invisible(self) -> None:
        if not self.created:
            assert set_names(self.storage) in ([], [INFO.name])
            return
        now = opened(self.storage)
        missing = now.missing_blocks()
        assert self.gone <= set(now.info.erased) <= self.asked
        rows: list[int] = []
        for block in range(BLOCKS):
            if block in missing:
                assert block not in self.committed
                with pytest.raises(NotReadyError):
                    now.read_block(block)
                continue
            rows += range(*INFO.block_range(block))
            attempt = now.log.committed()[block].attempt
            assert self.committed.setdefault(block, attempt) == attempt
            self.require_right(now, block)
        table = now.read_examples()
        assert (table.column("row").to_pylist() if rows else []) == rows

    def require_right(self, now: FeatureSet, block: int) -> None:
        """Every row of a committed block is as it was computed, or nothing is left of it."""
        start, stop = INFO.block_range(block)
        found, expected = now.read_block(block), stores.features(INFO, block)
        ids = now.read_examples(["example_id"], block=block)["example_id"].to_pylist()
        for row in range(start, stop):
            erased = {bool(np.isnan(values[row - start]).all()) for values in found.values()}
            assert erased == {ids[row - start] is None}
            assert erased == {True} or row not in self.gone
            assert erased == {False} or row in now.info.erased
            if erased == {False}:
                for name, values in found.items():
                    np.testing.assert_allclose(values[row - start], expected[name][row - start], rtol=1e-3)

    def teardown(self) -> None:
        if not self.created:
            return
        if self.asked:
            self.erase(self.asked)
        now = opened(self.storage)
        for block in now.missing_blocks():
            write(now, block)
        assert now.missing_blocks() == []
        self.committed.clear()
        self.what_is_committed_is_whole_and_right_and_the_rest_is_invisible()
        found = checked(self.storage)
        assert not found.problems
        assert not found.loose
        assert payloads(self.storage) == undisturbed(now.info.erased)


def opened(storage: Storage) -> FeatureSet:
    return FeatureStore.open(storage).open_set(INFO.name)


def write(feature_set: FeatureSet, block: int) -> Record:
    """Write a block as a worker does, which leaves out the rows that the set knows to be erased."""
    features, examples = stores.features(INFO, block), stores.examples(INFO, block)
    erased = feature_set.info.erased_in(block)
    for values in features.values():
        values[erased] = np.nan
    examples = blanked(examples, erased) if erased else examples
    sums = statistics(INFO, features)
    return feature_set.write_block(block, features, examples=examples, statistics=sums, facts={})


def statistics(info: SetInfo, features: Mapping[str, npt.NDArray[np.float32]]) -> pa.Table:
    """How many rows are valid."""
    rows = [int(np.isfinite(features[array.name]).all(axis=1).sum()) for array in info.arrays]
    return pa.table({"group": [array.name for array in info.arrays], "rows": rows})


def checked(storage: Storage) -> Health:
    return check_store(storage, full=True, watch=lambda *_: nullcontext(lambda _: None))


def is_finished_or_not_begun(feature_set: FeatureSet) -> bool:
    return all(problem.kind != "unfinished erasure" for problem in checked(feature_set.storage).problems)


def set_names(storage: Storage) -> list[str]:
    try:
        return FeatureStore.open(storage).set_names()
    except NotReadyError:
        return []


def payloads(storage: Storage) -> dict[str, bytes]:
    """Every object that belongs to a block, but for the commit records, which name their attempts."""
    found = stores.all_objects(storage)
    return {path: data for path, data in found.items() if any(part in path for part in ("/c/", "/examples/", "/stat"))}


def undisturbed(erased: Sequence[int] = ()) -> dict[str, bytes]:
    """Objects of a store that nothing happened to but, in the end, an erasure."""
    storage = open_storage(f"memory://protocol-{next(_NAMES)}")
    made = stores.create(storage, INFO)
    for block in range(BLOCKS):
        write(made, block)
    if erased:
        erase_rows(FeatureStore.open(storage), INFO.name, erased, statistics)
    return payloads(storage)


class CommitProtocolOnDisk(CommitProtocol):
    """The same over a directory."""

    def open_empty(self) -> Storage:
        self.folder = Path(tempfile.mkdtemp(prefix="gradstore-protocol-"))
        return open_storage(str(self.folder))

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.folder)


TestInMemory = CommitProtocol.TestCase
TestInMemory.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestOnDisk = CommitProtocolOnDisk.TestCase
TestOnDisk.settings = settings(max_examples=8, stateful_step_count=12, deadline=None)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("changes", range(PUBLISHED_PER_BLOCK))
def test_a_writer_killed_at_any_object_leaves_no_trusted_block_but_a_whole_one(changes: int, after: bool) -> None:
    storage = open_storage(f"memory://protocol-{next(_NAMES)}")
    stores.create(storage, INFO)
    dying = FeatureStore.open(KillingStorage(storage, changes=changes, after=after)).open_set(INFO.name)
    reached_the_record = after and changes == PUBLISHED_PER_BLOCK - 1
    with pytest.raises(Killed):
        write(dying, 0)
    now = opened(storage)
    assert now.missing_blocks() == ([1, 2] if reached_the_record else [0, 1, 2])
    for block in now.missing_blocks():
        write(now, block)
    assert payloads(storage) == undisturbed()


@pytest.mark.parametrize("changes", range(PUBLISHED_PER_BLOCK - 1))
def test_a_writer_that_wakes_after_an_erasure_replaces_nothing_that_was_committed_since(changes: int) -> None:
    storage = open_storage(f"memory://protocol-{next(_NAMES)}")
    stores.create(storage, INFO)
    erase_rows(FeatureStore.open(storage), INFO.name, [0], statistics)

    def others() -> None:
        erase_rows(FeatureStore.open(storage), INFO.name, [2], statistics)
        write(opened(storage), 0)

    zombie = opened(KillingStorage(storage, changes=changes, event=others))
    with pytest.raises(SupersededError):
        write(zombie, 0)
    assert not checked(storage).problems
    assert np.isnan(opened(storage).read_block(0)["a"][[0, 2]]).all()
