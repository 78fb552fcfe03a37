"""Stores that are damaged on purpose."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

from gradstore.store.backend import Storage, open_storage
from gradstore.store.features import FeatureSet
from gradstore.store.health import Health, check_store
from tests import stores

FIXTURE = Path(__file__).parent / "formats" / "store-v1"
_NAMES = count()


def fixture_in_memory() -> Storage:
    """The committed store of version 1, which has one of everything, in memory."""
    storage, source = open_storage(f"memory://health-{next(_NAMES)}"), open_storage(str(FIXTURE))
    for info in source.list_objects(""):
        storage.publish(info.path, [source.read(info.path)])
    return storage


def written_store() -> Storage:
    """A store in memory whose train set has two members of three blocks, all written."""
    info = replace(stores.set_info(), members=("a", "b"))
    made = stores.create(f"memory://health-{next(_NAMES)}", info)
    write_missing(made)
    return made.storage


def write_missing(feature_set: FeatureSet) -> dict[str, list[int]]:
    """Write every missing block, as a run does; return which, by member."""
    written = {}
    for member in feature_set.info.members:
        opened = feature_set.of_member(member)
        written[member] = opened.missing_blocks()
        for block in written[member]:
            stores.write(opened, block)
    return written


def contents(storage: Storage) -> dict[str, bytes]:
    """Every object but the commit records, which name attempts."""
    return {
        path: data for path, data in stores.all_objects(storage).items() if not re.search(r"/(blocks|commits)/", path)
    }


@contextmanager
def unwatched(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


def check(storage: Storage, *, full: bool = False) -> Health:
    return check_store(storage, full=full, watch=unwatched)


def problems(storage: Storage, *, full: bool = False) -> set[tuple[str, str]]:
    """(kind, path) of everything that is wrong."""
    return {(problem.kind, problem.path) for problem in check(storage, full=full).problems}


def change(storage: Storage, path: str, data: bytes) -> None:
    storage.delete(path)
    storage.publish(path, [data])


def flip(storage: Storage, path: str, place: int = -20) -> None:
    """Flip one bit of an object; its size stays."""
    data = bytearray(storage.read(path))
    data[max(place, -len(data))] ^= 4
    change(storage, path, bytes(data))


def swap(storage: Storage, one: str, other: str) -> None:
    """Give each of two objects the bytes of the other."""
    first, second = storage.read(one), storage.read(other)
    change(storage, one, second)
    change(storage, other, first)


def cut(storage: Storage, path: str) -> None:
    change(storage, path, storage.read(path)[:-3])
