"""The simulation of a large run, in small: what it asks of the store grows with what it is to do, and no faster."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.simulation import BLOCK_ROWS, simulate

pytestmark = pytest.mark.slow

BLOCKS = 120


def test_requests_and_tasks_of_a_simulated_run_grow_with_its_blocks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_FSYNC", "off")
    steps = {row["step"]: row for row in simulate(tmp_path / "run", BLOCKS * BLOCK_ROWS, 8, 2)}
    assert steps["commit all blocks"]["blocks"] == BLOCKS
    # Four blocks a task, and no request of this process for any of them.
    assert steps["commit all blocks"]["tasks"] == BLOCKS // 4
    assert steps["commit all blocks"]["requests"] == 0
    assert steps["list the records"]["listed"] == BLOCKS
    assert steps["list the records"]["requests"] == 0
    assert steps["read the records"]["requests"] == BLOCKS
    # Whatever the number of blocks: records are listed and not read.
    assert steps["status"]["requests"] < 40
    assert steps["go on with a tenth missing"]["blocks"] == BLOCKS // 10
    assert steps["go on with a tenth missing"]["listed"] == BLOCKS - BLOCKS // 10
    assert steps["go on with nothing missing"]["requests"] == 0
