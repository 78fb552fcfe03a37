"""Single rows of a set: the same numbers as whole blocks have, in ranges where these take less, and their checksums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from gradstore.store.backend import Range, open_storage
from gradstore.store.backend.cache import CachedStorage
from gradstore.store.backend.memory import MemoryStorage
from gradstore.store.checksums import extend_checksums
from gradstore.store.dtypes import DtypeName
from tests import stores

_NAMES = count()


class Watched(MemoryStorage):
    """A storage that notes of which objects ranges are read."""

    def __init__(self) -> None:
        super().__init__(f"rows-{next(_NAMES)}")
        self.ranged: list[str] = []

    def read_ranges(self, path: str, ranges: Sequence[Range]) -> None:
        """Note it."""
        self.ranged.append(path)
        super().read_ranges(path, ranges)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("compression", "request_bytes", "ranged"), [("none", 0, 3), ("none", 1000, 0), ("blosc", 0, 0)]
)
def test_rows_are_those_of_the_block(dtype: DtypeName, compression: str, request_bytes: int, ranged: int) -> None:
    storage = Watched()
    storage.request_bytes = request_bytes
    info = replace(stores.set_info(dtype=dtype), compression=compression)
    made = stores.create(storage, info)
    stores.write(made, 1)
    rows = [3, 0]
    out = {array.name: np.empty((2, array.features), np.float32) for array in info.arrays}

    made.read_rows(1, rows, out)

    for name, values in made.read_block(1).items():
        np.testing.assert_array_equal(out[name], values[rows])
    assert len(storage.ranged) == ranged


def test_ranges_are_read_of_a_copy_and_never_kept(tmp_path: Path) -> None:
    origin = open_storage(f"memory://rows-{next(_NAMES)}")
    cached = CachedStorage(origin, tmp_path / "copies", 1000)
    for path in ("copied", "not"):
        origin.publish(path, [bytes(range(100))])
    cached.read("copied")
    origin.replace("copied", [bytes(100)])
    buffer = bytearray(2)
    cached.read_ranges("copied", [(40, memoryview(buffer))])
    assert bytes(buffer) == bytes([40, 41])
    cached.read_ranges("not", [(7, memoryview(buffer))])
    assert bytes(buffer) == bytes([7, 8])
    assert len([*(tmp_path / "copies").glob("*/*")]) == 1


def test_a_checksum_is_of_a_rows_groups_one_after_another() -> None:
    found = stores.features(stores.set_info(), 0)
    checksums = np.zeros(4, np.uint32)
    extend_checksums(checksums, [*found.values()])
    for row, checksum in enumerate(checksums):
        data = b"".join(values[row].astype("<f4").tobytes() for values in found.values())
        assert checksum == google_crc32c.value(data)
