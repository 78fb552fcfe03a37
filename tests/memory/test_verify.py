"""The memory of reading every byte of a store, in a process that does only that."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

from gradstore.store.backend import open_storage
from tests import stores
from tests.health import check
from tests.memory.peak import high_water

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]

GROUPS = {f"layers.{index}": 1024 for index in range(8)}
CHUNK_BYTES = 2048 * 1024 * 2
# Stacks of threads, arenas of the allocator, records.
SLACK_BYTES = 8 * 2**20


def verify(url: str, connection: Any) -> None:
    """Check every byte; tell how many units were whole, and by how much the peak of this process rose."""
    storage = open_storage(url)
    # What checking needs is imported and mapped.
    check(storage)
    before = high_water()
    health = check(storage, full=True)
    whole = sum(unit.is_committed and not unit.is_broken for unit in health.units)
    connection.send((whole, storage.concurrency, high_water() - before))


def test_reading_every_byte_takes_a_chunk_for_every_request_in_flight(tmp_path: Path) -> None:
    info = stores.set_info(rows=4096, block_rows=2048, dtype="float16", groups=GROUPS)
    made = stores.create(str(tmp_path / "store"), info)
    for block in range(info.num_blocks):
        stores.write(made, block)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=verify, args=(made.storage.url, theirs))
    process.start()
    theirs.close()
    try:
        whole, in_flight, rose = ours.recv()
    finally:
        process.join()

    assert whole == info.num_blocks
    assert in_flight * CHUNK_BYTES < 0.3 * info.num_blocks * len(GROUPS) * CHUNK_BYTES
    assert rose <= in_flight * CHUNK_BYTES + SLACK_BYTES
