"""Whatever is killed, whenever: nothing uncommitted is ever visible, and what is committed is right."""

from __future__ import annotations

import shutil
import tempfile
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gradstore.errors import NotReadyError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.features import FeatureSet, FeatureStore
from tests import stores
from tests.storages import Killed, KillingStorage

_NAMES = count()
INFO = stores.set_info(rows=7, block_rows=3, dtype="float16", groups={"a": 2, "b/c": 3})
BLOCKS = INFO.num_blocks
PUBLISHED_PER_BLOCK = len(INFO.arrays) + 3


class CommitProtocol(RuleBasedStateMachine):
    """Create, write, kill, retry, damage what is uncommitted, and reopen, in any order; two writers at most.

    ``committed`` holds the attempt of every block whose record was seen; it may never change or vanish.
    """

    def __init__(self) -> None:
        super().__init__()
        self.committed: dict[int, str] = {}

    def open_empty(self) -> Storage:
        return open_storage(f"memory://protocol-{next(_NAMES)}")

    @initialize()
    def begin(self) -> None:
        self.storage = self.open_empty()
        self.created = False

    @rule(changes=st.integers(0, 20), after=st.booleans())
    def create_and_be_killed(self, changes: int, after: bool) -> None:
        with_death = KillingStorage(self.storage, changes=changes, after=after)
        try:
            stores.create(with_death, INFO)
        except Killed:
            return
        self.created = True

    @rule()
    def create(self) -> None:
        stores.create(self.storage, INFO)
        self.created = True

    @rule(block=st.integers(0, BLOCKS - 1), changes=st.integers(0, PUBLISHED_PER_BLOCK), after=st.booleans())
    def write_and_be_killed(self, block: int, changes: int, after: bool) -> None:
        if not self.created:
            return
        try:
            stores.write(self.opened(KillingStorage(self.storage, changes=changes, after=after)), block)
        except Killed:
            return

    @rule(block=st.integers(0, BLOCKS - 1))
    def write(self, block: int) -> None:
        if self.created:
            record = stores.write(self.opened(self.storage), block)
            assert self.committed.setdefault(block, record.attempt) == record.attempt

    @rule(block=st.integers(0, BLOCKS - 1), data=st.data())
    def damage_an_object_of_an_uncommitted_block(self, block: int, data: st.DataObject) -> None:
        if not self.created or block not in self.opened(self.storage).missing_blocks():
            return
        ends = (f"/c/{block}/0", f"examples/m0/{block:06d}.parquet", f"statistics/m0/{block:06d}.parquet")
        found = sorted(info.path for info in self.storage.list_objects(INFO.folder) if info.path.endswith(ends))
        if found:
            path = data.draw(st.sampled_from(found))
            torn = self.storage.read(path)[:-3]
            self.storage.delete(path)
            self.storage.publish(path, [torn])

    @invariant()
    def what_is_committed_is_whole_and_right_and_the_rest_is_invisible(self) -> None:
        if not self.created:
            assert set_names(self.storage) in ([], [INFO.name])
            return
        opened = self.opened(self.storage)
        missing = opened.missing_blocks()
        rows: list[int] = []
        for block in range(BLOCKS):
            if block in missing:
                assert block not in self.committed
                with pytest.raises(NotReadyError):
                    opened.read_block(block)
                continue
            rows += range(*INFO.block_range(block))
            attempt = opened.log.committed()[block].attempt
            assert self.committed.setdefault(block, attempt) == attempt
            for name, values in opened.read_block(block).items():
                np.testing.assert_allclose(values, stores.features(INFO, block)[name], rtol=1e-3)
        table = opened.read_examples()
        assert (table.column("row").to_pylist() if rows else []) == rows

    def teardown(self) -> None:
        if self.created:
            opened = self.opened(self.storage)
            for block in opened.missing_blocks():
                stores.write(opened, block)
            assert opened.missing_blocks() == []
            self.what_is_committed_is_whole_and_right_and_the_rest_is_invisible()
            assert payloads(self.storage) == undisturbed()

    def opened(self, storage: Storage) -> FeatureSet:
        return FeatureStore.open(storage).open_set(INFO.name)


def set_names(storage: Storage) -> list[str]:
    try:
        return FeatureStore.open(storage).set_names()
    except NotReadyError:
        return []


def payloads(storage: Storage) -> dict[str, bytes]:
    """Every object but the commit records, which name their attempts."""
    return {path: data for path, data in stores.all_objects(storage).items() if "/blocks/" not in path}


def undisturbed() -> dict[str, bytes]:
    """Objects of a store that nothing happened to."""
    storage = open_storage(f"memory://protocol-{next(_NAMES)}")
    made = stores.create(storage, INFO)
    for block in range(BLOCKS):
        stores.write(made, block)
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
TestOnDisk.settings = settings(max_examples=10, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("changes", range(PUBLISHED_PER_BLOCK))
def test_a_writer_killed_at_any_object_leaves_no_trusted_block_but_a_whole_one(changes: int, after: bool) -> None:
    storage = open_storage(f"memory://protocol-{next(_NAMES)}")
    stores.create(storage, INFO)
    dying = FeatureStore.open(KillingStorage(storage, changes=changes, after=after)).open_set(INFO.name)
    reached_the_record = after and changes == PUBLISHED_PER_BLOCK - 1
    with pytest.raises(Killed):
        stores.write(dying, 0)
    opened = FeatureStore.open(storage).open_set(INFO.name)
    assert opened.missing_blocks() == ([1, 2] if reached_the_record else [0, 1, 2])
    for block in opened.missing_blocks():
        stores.write(opened, block)
    assert payloads(storage) == undisturbed()
