"""What every storage must do, as a suite that each of them inherits; and storages that fail on purpose."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import pytest

from gradstore.errors import IntegrityError, ObjectMissingError
from gradstore.store.backend import ObjectInfo, Part, Range, Storage, open_storage

T = TypeVar("T")

Places = Callable[[], str]
"""Gives the URL of an empty place of the kind under test."""


class StorageSuite:
    """Every storage: written once, read whole, listed, deleted. A subclass has a fixture ``new_url``."""

    @pytest.fixture
    def storage(self, new_url: Places) -> Storage:
        return open_storage(new_url())

    def test_an_object_reads_back_as_its_parts_in_order(self, storage: Storage) -> None:
        values = np.arange(6, dtype="<f4")
        assert storage.publish("a/b/c", [values.view(np.uint8).data, b"tail"])
        assert storage.read("a/b/c") == values.tobytes() + b"tail"

    def test_an_object_is_read_into_a_larger_buffer_and_its_size_told(self, storage: Storage) -> None:
        storage.publish("a", [b"12345"])
        buffer = bytearray(8)
        assert storage.read_into("a", memoryview(buffer)) == 5
        assert bytes(buffer) == b"12345\0\0\0"

    def test_an_object_larger_than_the_buffer_is_refused_by_name(self, storage: Storage) -> None:
        storage.publish("a/big", [b"12345"])
        with pytest.raises(IntegrityError, match=r"a/big: has 5 bytes; at most 4"):
            storage.read_into("a/big", memoryview(bytearray(4)))

    def test_ranges_of_an_object_are_read_in_any_order_and_may_overlap(self, storage: Storage) -> None:
        storage.publish("a", [bytes(range(200)), bytes(range(200))])
        buffers = [bytearray(5), bytearray(3), bytearray(4), bytearray(0)]
        starts = (100, 0, 198, 7)
        storage.read_ranges("a", [(start, memoryview(buffer)) for start, buffer in zip(starts, buffers, strict=True)])
        assert [list(buffer) for buffer in buffers] == [[100, 101, 102, 103, 104], [0, 1, 2], [198, 199, 0, 1], []]

    def test_a_range_beyond_the_end_of_an_object_is_refused_by_name(self, storage: Storage) -> None:
        storage.publish("a/small", [b"12345"])
        for start in (3, 5, 9):
            with pytest.raises(IntegrityError, match=rf"a/small: ends after [359] bytes; {start + 3} belong there"):
                storage.read_ranges("a/small", [(0, memoryview(bytearray(2))), (start, memoryview(bytearray(3)))])

    def test_a_range_of_a_missing_object_names_it(self, storage: Storage) -> None:
        with pytest.raises(ObjectMissingError, match="not/here: no such object"):
            storage.read_ranges("not/here", [(0, memoryview(bytearray(4)))])

    def test_an_object_is_never_overwritten(self, storage: Storage) -> None:
        assert storage.publish("a", [b"first"])
        assert not storage.publish("a", [b"second"])
        assert storage.read("a") == b"first"

    def test_of_eight_publishers_exactly_one_wins(self, storage: Storage) -> None:
        others = [pickle.loads(pickle.dumps(storage)) for _ in range(8)]
        barrier, won = threading.Barrier(8), [False] * 8

        def publish(number: int) -> None:
            barrier.wait()
            won[number] = others[number].publish("record", [f"attempt {number}".encode() * 1000])

        threads = [threading.Thread(target=publish, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won.count(True) == 1
        assert storage.read("record") == f"attempt {won.index(True)}".encode() * 1000

    def test_a_missing_object_is_named(self, storage: Storage) -> None:
        with pytest.raises(ObjectMissingError, match="not/here: no such object"):
            storage.read("not/here")
        with pytest.raises(ObjectMissingError, match="not/here: no such object"):
            storage.read_into("not/here", memoryview(bytearray(4)))

    def test_listing_shows_every_object_below_a_folder_and_no_other(self, storage: Storage) -> None:
        for path in ("a/1", "a/b/2", "ab/3", "c"):
            storage.publish(path, [path.encode()])
        assert {info.path: info.bytes for info in storage.list_objects("a")} == {"a/1": 3, "a/b/2": 5}
        assert {info.path for info in storage.list_objects("")} == {"a/1", "a/b/2", "ab/3", "c"}
        assert list(storage.list_objects("nowhere")) == []

    def test_listing_folders_goes_one_level_deep(self, storage: Storage) -> None:
        for path in ("a/x/1", "a/y/z/2", "a/3", "b/4"):
            storage.publish(path, [b"."])
        assert storage.list_folders("a") == ["x", "y"]
        assert storage.list_folders("") == ["a", "b"]
        assert storage.list_folders("nowhere") == []

    def test_a_deleted_object_is_gone_and_deleting_it_again_is_no_error(self, storage: Storage) -> None:
        storage.publish("a/1", [b"x"])
        storage.delete("a/1")
        storage.delete("a/1")
        assert list(storage.list_objects("")) == []
        assert storage.publish("a/1", [b"y"])

    def test_an_object_is_replaced_or_made(self, storage: Storage) -> None:
        storage.publish("a/1", [b"first"])
        storage.replace("a/1", [b"sec", b"ond"])
        storage.replace("b/2", [b"new"])
        assert storage.read("a/1") == b"second"
        assert {info.path: info.bytes for info in storage.list_objects("")} == {"a/1": 6, "b/2": 3}
        assert not storage.publish("a/1", [b"third"])

    def test_listing_tells_when_an_object_was_written(self, storage: Storage) -> None:
        storage.publish("a/1", [b"x"])
        (info,) = storage.list_objects("a")
        # S3 tells whole seconds.
        assert info.modified == pytest.approx(time.time(), abs=5)

    def test_what_is_forgotten_is_still_there(self, storage: Storage) -> None:
        storage.publish("a/1", [b"x"])
        storage.forget("a/1")
        storage.forget("nowhere")
        assert storage.read("a/1") == b"x"

    def test_sweeping_removes_no_object(self, storage: Storage) -> None:
        storage.publish("a/b/1", [b"x"])
        assert storage.sweep("a", grace_seconds=0) == []
        assert storage.sweep("nowhere") == []
        assert storage.read("a/b/1") == b"x"

    def test_names_with_percent_signs_and_tildes_are_taken_literally(self, storage: Storage) -> None:
        storage.publish("a/x%2Fy~1/%2E/c", [b"1"])
        assert [info.path for info in storage.list_objects("a")] == ["a/x%2Fy~1/%2E/c"]
        assert storage.list_folders("a") == ["x%2Fy~1"]

    def test_another_storage_of_the_same_url_sees_the_same_objects(self, storage: Storage) -> None:
        storage.publish("a", [b"1"])
        assert open_storage(storage.url).read("a") == b"1"
        assert pickle.loads(pickle.dumps(storage)).read("a") == b"1"


class Killed(BaseException):
    """Stands for kill -9: no handler in the code under test catches it."""


def die() -> None:
    raise Killed


class KillingStorage:
    """A storage whose process dies, or sees something else happen, just before or just after one of its changes."""

    def __init__(
        self, storage: Storage, *, changes: int, after: bool = False, event: Callable[[], object] = die
    ) -> None:
        self._storage = storage
        self._left = changes
        self._after = after
        self._event = event
        self.url = storage.url
        self.concurrency = 1
        self.request_bytes = storage.request_bytes

    def read(self, path: str) -> bytes:
        return self._storage.read(path)

    def read_into(self, path: str, buffer: memoryview) -> int:
        return self._storage.read_into(path, buffer)

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> None:
        self._storage.read_ranges(path, ranges)

    def publish(self, path: str, parts: Sequence[Part]) -> bool:
        return self._counted(lambda: self._storage.publish(path, parts))

    def replace(self, path: str, parts: Sequence[Part]) -> None:
        self._counted(lambda: self._storage.replace(path, parts))

    def forget(self, path: str) -> None:
        self._storage.forget(path)

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        return self._storage.list_objects(folder)

    def list_folders(self, folder: str) -> list[str]:
        return self._storage.list_folders(folder)

    def delete(self, path: str) -> None:
        self._storage.delete(path)

    def sweep(self, folder: str, *, grace_seconds: float = 3600.0, dry_run: bool = False) -> list[ObjectInfo]:
        return self._storage.sweep(folder, grace_seconds=grace_seconds, dry_run=dry_run)

    def _counted(self, change: Callable[[], T]) -> T:
        self._left -= 1
        if self._left == -1 and not self._after:
            self._event()
        result = change()
        if self._left == -1 and self._after:
            self._event()
        return result
