"""The memory that an export says it takes, against what a process takes that exports."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest

from gradstore.stages.export import Selection, export
from gradstore.stages.export.files import KINDS
from gradstore.stages.export.selection import choose
from gradstore.stages.progress import Progress
from gradstore.store.features import FeatureStore
from tests import stores
from tests.formats.filled import filled
from tests.memory.peak import high_water

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]

# Of 1,024 rows in 4 blocks: in float32 one group takes 4 MiB, all take 256.
GROUPS = {f"layers.{index}": 1024 for index in range(64)}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("memory") / "store")
    filled(url, stores.set_info(rows=1024, block_rows=256, dtype="float16", groups=GROUPS), invalid=range(0, 1024, 5))
    return url


def export_all(url: str, output: Path, connection: Any) -> None:
    """Export all groups; tell what that was to take, and by how much the peak of this process rose."""
    progress = Progress(quiet=True)
    # What converting, checking and encoding need is imported and mapped.
    export(url, output, Selection(rows="1:2", groups=r"layers\.0"), force=False, progress=progress)
    told = KINDS[output.suffix].memory_bytes(choose(FeatureStore.open(url), Selection()))
    before = high_water()
    found = export(url, output, Selection(), force=True, progress=progress)
    connection.send((found["bytes"], told, high_water() - before))


@pytest.mark.parametrize("suffix", [".parquet", ".npz", ".safetensors"])
def test_an_export_takes_no_more_memory_than_it_says(url: str, tmp_path: Path, suffix: str) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=export_all, args=(url, tmp_path / f"out{suffix}", theirs))
    process.start()
    theirs.close()
    try:
        written, told, rose = ours.recv()
    finally:
        process.join()
    assert written > 200 * 10**6
    assert rose <= told
    if suffix != ".parquet":
        # One group at a time, of 64.
        assert told < written / 4
