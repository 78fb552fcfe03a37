"""The cache of objects that were read: what it keeps, what it drops, and that it never lies to a reader who checks."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from gradstore.errors import ObjectMissingError, SpecError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.backend.cache import CachedStorage, cached
from gradstore.store.features import FeatureStore
from tests import stores
from tests.storages import StorageSuite

_NAMES = count()
KB = 1000


class TestCached(StorageSuite):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return CachedStorage(open_storage(f"memory://cached-{next(_NAMES)}"), tmp_path / "copies", 10 * KB)


@pytest.fixture
def origin() -> Storage:
    return open_storage(f"memory://origin-{next(_NAMES)}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "copies"


def kept(folder: Path) -> int:
    """Bytes of all copies, whole or not."""
    sizes = []
    for file in folder.glob("*/*"):
        # A temporary file may get its name at this moment.
        with suppress(FileNotFoundError):
            sizes.append(file.stat().st_size)
    return sum(sizes)


def content(number: int) -> bytes:
    return bytes([number % 251]) * KB


def test_what_was_read_once_is_read_from_the_copy(origin: Storage, folder: Path) -> None:
    storage = CachedStorage(origin, folder, 10 * KB)
    origin.publish("a/1", [content(1)])
    origin.publish("a/2", [content(2)])
    assert storage.read("a/1") == content(1)
    assert storage.read_into("a/2", memoryview(bytearray(KB))) == KB
    origin.delete("a/1")
    origin.delete("a/2")
    assert storage.read("a/2") == content(2)
    buffer = bytearray(KB + 1)
    assert CachedStorage(origin, folder, 10 * KB).read_into("a/1", memoryview(buffer)) == KB
    assert bytes(buffer) == content(1) + b"\0"


def test_stores_that_share_a_folder_do_not_mix_their_objects(folder: Path) -> None:
    storages = [CachedStorage(open_storage(f"memory://shared-{next(_NAMES)}"), folder, 10 * KB) for _ in range(2)]
    for number, storage in enumerate(storages):
        storage.publish("a", [content(number)])
    for _ in range(2):
        assert [storage.read("a") for storage in storages] == [content(0), content(1)]


def test_documents_and_listings_are_never_kept(origin: Storage, folder: Path) -> None:
    storage = CachedStorage(origin, folder, 10 * KB)
    storage.publish("a/zarr.json", [b"{}"])
    assert storage.read("a/zarr.json") == b"{}"
    assert storage.read_into("a/zarr.json", memoryview(bytearray(2))) == 2
    assert [info.path for info in storage.list_objects("")] == ["a/zarr.json"]
    origin.delete("a/zarr.json")
    with pytest.raises(ObjectMissingError):
        storage.read("a/zarr.json")
    assert list(storage.list_objects("")) == []
    assert not folder.exists()


def test_what_is_deleted_replaced_or_forgotten_is_read_anew(origin: Storage, folder: Path) -> None:
    storage = CachedStorage(origin, folder, 10 * KB)
    for name in ("deleted", "replaced", "forgotten"):
        storage.publish(name, [b"old"])
        assert storage.read(name) == b"old"
    storage.delete("deleted")
    storage.publish("deleted", [b"new"])
    storage.replace("replaced", [b"new"])
    origin.replace("forgotten", [b"new"])
    assert storage.read("forgotten") == b"old"
    storage.forget("forgotten")
    assert [storage.read(name) for name in ("deleted", "replaced", "forgotten")] == [b"new"] * 3


def test_a_copy_that_does_not_fit_the_buffer_is_read_anew(origin: Storage, folder: Path) -> None:
    storage = CachedStorage(origin, folder, 10 * KB)
    origin.publish("a", [content(1)])
    storage.read("a")
    origin.replace("a", [b"short"])
    buffer = bytearray(5)
    assert storage.read_into("a", memoryview(buffer)) == 5
    assert bytes(buffer) == b"short"


@pytest.mark.parametrize("damage", ["torn", "flipped", "of another object"])
def test_a_reader_notices_a_damaged_copy_and_reads_the_origin(damage: str, tmp_path: Path) -> None:
    made = stores.create(str(tmp_path / "store"), stores.set_info())
    stores.write(made, 0)
    folder = tmp_path / "copies"
    storage = CachedStorage(open_storage(str(tmp_path / "store")), folder, 10**6)
    expected = FeatureStore.open(storage).open_set("train").read_block(0)
    files = sorted(folder.glob("*/*"))
    assert len(files) >= len(stores.GROUPS)
    for file in files:
        data = bytearray(file.read_bytes())
        if damage == "torn":
            data = data[: len(data) // 2]
        elif damage == "flipped":
            data[len(data) // 2] ^= 1
        else:
            data = bytearray(files[0].read_bytes() if file != files[0] else files[1].read_bytes())
        file.write_bytes(data)
    read = FeatureStore.open(storage).open_set("train").read_block(0)
    for name, values in read.items():
        np.testing.assert_array_equal(values, expected[name])


def test_the_copies_stay_under_the_limit_and_those_read_last_stay(origin: Storage, folder: Path) -> None:
    storage = CachedStorage(origin, folder, 10 * KB)
    for number in range(40):
        origin.publish(f"{number}", [content(number)])
        assert storage.read(f"{number}") == content(number)
        assert storage.read("0") == content(0)
        # Times of files are as coarse as the clock of the kernel.
        time.sleep(0.005)
        assert kept(folder) <= 10 * KB
    for number in range(40):
        origin.delete(f"{number}")
    assert storage.read("0") == content(0)
    assert storage.read("39") == content(39)
    with pytest.raises(ObjectMissingError):
        storage.read("1")


def test_an_object_above_the_limit_is_read_and_not_kept(origin: Storage, folder: Path) -> None:
    storage = CachedStorage(origin, folder, KB - 1)
    origin.publish("a", [content(1)])
    assert storage.read("a") == content(1)
    assert kept(folder) == 0


def test_a_smaller_limit_is_kept_from_the_next_read_on(origin: Storage, folder: Path) -> None:
    for number in range(10):
        origin.publish(f"{number}", [content(number)])
        CachedStorage(origin, folder, 10 * KB).read(f"{number}")
    assert kept(folder) == 10 * KB
    origin.publish("new", [content(1)])
    CachedStorage(origin, folder, 3 * KB).read("new")
    assert kept(folder) <= 3 * KB


def test_what_dead_readers_left_is_removed_when_room_is_made(origin: Storage, folder: Path) -> None:
    storage = CachedStorage(origin, folder, 3 * KB)
    dead, living = (folder / "ab" / f"abc.{name}" for name in ("dead", "living"))
    dead.parent.mkdir(parents=True)
    for file, seconds in ((dead, 3700), (living, 10)):
        file.write_bytes(content(1))
        os.utime(file, (time.time() - seconds,) * 2)
    for number in range(4):
        origin.publish(f"{number}", [content(number)])
        storage.read(f"{number}")
    assert not dead.exists()
    assert living.exists()


def read_many(url: str, folder: str) -> bool:
    """What a process does: reads objects again and again, and looks whether each is what it must be."""
    storage = CachedStorage(open_storage(url), Path(folder), 10 * KB)
    return all(storage.read(f"{number % 30}") == content(number % 30) for number in range(300))


def test_processes_share_the_folder_and_its_limit(tmp_path: Path) -> None:
    url, folder = str(tmp_path / "store"), tmp_path / "copies"
    origin = open_storage(url)
    for number in range(30):
        origin.publish(f"{number}", [content(number)])
    folder.mkdir()
    measured = []
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        reading = pool.starmap_async(read_many, [(url, str(folder))] * 3)
        while not reading.ready():
            # Under the lock that whoever makes room takes, so that nothing is removed meanwhile.
            with (folder / "bytes").open("a+b") as count_file:
                fcntl.flock(count_file, fcntl.LOCK_EX)
                measured.append(kept(folder))
        assert reading.get() == [True] * 3
    # One object of each process may be on its way.
    assert 5 * KB < max(measured) <= (10 + 3) * KB


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """The system refuses to write larger files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_reads_go_on_when_no_copy_can_be_written_after_one_warning(origin: Storage, folder: Path) -> None:
    storage = CachedStorage(origin, folder, 10 * KB)
    for number in range(3):
        origin.publish(f"{number}", [content(number)])
    with (
        pytest.warns(UserWarning, match=r"copies: File too large\. Reading goes on without copies") as warned,
        files_of_at_most(KB // 2),
    ):
        assert [storage.read(f"{number}") for number in range(3)] == [content(number) for number in range(3)]
    assert len(warned) == 1
    assert kept(folder) == 0
    storage.read("0")
    assert kept(folder) == KB


def test_a_file_in_the_place_of_the_folder_is_named_once(origin: Storage, folder: Path) -> None:
    folder.write_bytes(b"")
    origin.publish("a", [content(1)])
    storage = CachedStorage(origin, folder, 10 * KB)
    with pytest.warns(UserWarning, match="copies: File exists"):
        assert storage.read("a") == content(1)
    assert storage.read("a") == content(1)


def test_without_a_folder_there_is_no_cache(origin: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADSTORE_CACHE", raising=False)
    assert cached(origin) is origin


@pytest.mark.parametrize(
    ("text", "size"),
    [("3000", 3000), ("3kB", 3000), ("3 KB", 3000), ("3KiB", 3072), ("0.003MB", 3000), ("3k", 3000), ("3000B", 3000)],
)
def test_the_limit_is_a_size_with_or_without_a_unit(
    origin: Storage, tmp_path: Path, text: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path))
    monkeypatch.setenv("GRADSTORE_CACHE_BYTES", text)
    storage = cached(origin)
    origin.publish("fits", [bytes(size)])
    storage.read("fits")
    assert kept(tmp_path / "objects") == size
    origin.publish("does not fit", [bytes(size + 1)])
    storage.read("does not fit")
    assert kept(tmp_path / "objects") == size


@pytest.mark.parametrize("text", ["", "much", "-1", "1e9", "10 bytes", "5GBit", "GB"])
def test_a_limit_that_is_no_size_is_refused(origin: Storage, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_CACHE", "/nowhere")
    monkeypatch.setenv("GRADSTORE_CACHE_BYTES", text)
    with pytest.raises(SpecError, match=f"GRADSTORE_CACHE_BYTES: found '{text}'; accepted: a size such as 50GB"):
        cached(origin)
