"""Features that stay in memory between readings: the same numbers, from memory as far as it goes."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from gradstore.errors import ObjectMissingError
from gradstore.store.features import FeatureSet, FeatureStore, KeepingReader, KeptBlocks, Room
from tests import stores

_NAMES = count()
BUNDLES = (["layers.0.mlp"], ["layers.1.mlp", "head/μ"])
# Of one block of two members.
BLOCK_BYTES = 2 * 4 * 4 * sum(stores.GROUPS.values())


@pytest.fixture
def members() -> list[FeatureSet]:
    """A set of three blocks, the last of which is shorter, as two members have it."""
    info = replace(stores.set_info(), members=("first", "second"))
    first = stores.create(f"memory://kept-{next(_NAMES)}", info)
    for block in range(info.num_blocks):
        stores.write(first, block)
        stores.write(first.of_member("second"), block)
    return [first, first.of_member("second")]


def read(kept: KeptBlocks, members: list[FeatureSet]) -> list[tuple[int, str, dict[str, np.ndarray]]]:
    """Every piece, copied: its memory is that of the next one."""
    with closing(KeepingReader(kept, members, BUNDLES).read(range(3))) as pieces:
        return [
            (piece.block, piece.member, {name: rows.copy() for name, rows in piece.rows.items()}) for piece in pieces
        ]


def lose(members: list[FeatureSet], block: int) -> None:
    """Delete the chunks of a block from the storage."""
    storage = members[0].storage
    chunks = [info.path for info in storage.list_objects("features/train") if info.path.endswith(f"/c.{block}.0")]
    assert len(chunks) == len(members) * len(stores.GROUPS)
    for path in chunks:
        storage.delete(path)


@pytest.mark.parametrize(("memory_bytes", "stay"), [(0, 0), (BLOCK_BYTES - 1, 0), (BLOCK_BYTES, 1), (10**6, 3)])
def test_every_reading_gives_the_same_pieces_and_whole_blocks_come_from_memory(
    members: list[FeatureSet], memory_bytes: int, stay: int
) -> None:
    kept = KeptBlocks(Room(memory_bytes))
    first = read(kept, members)
    storage = members[0].storage
    # What is gone from the storage can only come from memory.
    for block in range(stay):
        lose(members, block)

    second = read(kept, [FeatureStore.open(storage).open_set("train", member.member) for member in members])

    assert len(first) == 3 * 2 * len(BUNDLES)
    for (block, member, rows), (again, other, same) in zip(first, second, strict=True):
        assert (block, member) == (again, other)
        for name, values in rows.items():
            np.testing.assert_array_equal(values, stores.features(members[0].info, block)[name])
            np.testing.assert_array_equal(values, same[name])


def test_a_block_that_was_not_read_to_its_end_is_not_kept(members: list[FeatureSet]) -> None:
    kept = KeptBlocks(Room(10**6))
    with closing(KeepingReader(kept, members, BUNDLES).read(range(3))) as pieces:
        next(pieces)
        next(pieces)

    assert kept.find(0) is None
    assert len(read(kept, members)) == 12


def test_a_block_that_is_not_kept_is_missed_when_it_is_gone(members: list[FeatureSet]) -> None:
    kept = KeptBlocks(Room(BLOCK_BYTES))
    read(kept, members)
    lose(members, 1)

    with pytest.raises(ObjectMissingError):
        read(kept, members)
