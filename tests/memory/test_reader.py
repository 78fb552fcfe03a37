"""The memory that a reader says it takes, against what a process takes that reads with it."""

from __future__ import annotations

import multiprocessing
import sys
from typing import Any

import pytest

from gradstore.store.features import BlockReader, FeatureStore
from tests import stores
from tests.memory.peak import high_water

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]

GROUPS = {f"layers.{index}": 1024 for index in range(32)}
# Stacks of threads, arenas of the allocator, records.
SLACK_BYTES = 8 * 2**20


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store of 4 blocks of 32 groups: in float32 a block takes 32 MiB, in the store half as much."""
    url = str(tmp_path_factory.mktemp("memory") / "store")
    info = stores.set_info(rows=1024, block_rows=256, dtype="float16", groups=GROUPS)
    made = stores.create(url, info)
    for block in range(info.num_blocks):
        stores.write(made, block)
    return url


def stream(url: str, bundles: list[list[str]], ahead: int, connection: Any) -> None:
    """Read all blocks; tell what the reader said that it takes, and by how much the peak of this process rose."""
    opened = FeatureStore.open(url).open_set("train")
    # What converting and checking need is imported and mapped.
    opened.read_block(0, ["layers.0"])
    reader = BlockReader([opened], bundles, ahead=ahead)
    before = high_water()
    pieces = sum(1 for _ in reader.read(range(opened.info.num_blocks)))
    connection.send((pieces, reader.memory_bytes, high_water() - before))


@pytest.mark.parametrize(("groups_of_a_piece", "ahead"), [(32, 1), (8, 1), (8, 3)])
def test_reading_takes_the_memory_of_its_buffers(url: str, groups_of_a_piece: int, ahead: int) -> None:
    names = list(GROUPS)
    bundles = [names[first : first + groups_of_a_piece] for first in range(0, len(names), groups_of_a_piece)]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=stream, args=(url, bundles, ahead, theirs))
    process.start()
    theirs.close()
    try:
        pieces, told, rose = ours.recv()
    finally:
        process.join()

    assert pieces == 4 * len(bundles)
    assert rose <= told + SLACK_BYTES
    # Every buffer was used, so less would mean that something else was measured.
    assert rose >= told - SLACK_BYTES
