"""Runs on a scheduler that others started and share."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from distributed import LocalCluster

from gradstore.store.features import FeatureStore
from tests.runs import command, gradstore, make_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two workers of one thread, on loopback."""
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as started:
        yield started


def test_two_runs_at_once_on_one_scheduler_each_get_their_own_numbers(
    cluster: LocalCluster, tiny_run: Path, tmp_path: Path
) -> None:
    runs = []
    for rank in (3, 4):
        folder = tmp_path / str(rank)
        folder.mkdir()
        (folder / "model").symlink_to(tiny_run / "model")
        shared = {"kind": "scheduler", "address": cluster.scheduler_address}
        changes = {"cluster": shared, "features": {"projection": {"kind": "logra", "rank": rank}}}
        runs.append(make_run(folder, str(folder / "store"), changes))
    started = [subprocess.Popen(command("run", run, "--quiet"), stderr=subprocess.PIPE, text=True) for run in runs]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    alone = make_run(tmp_path / "4", str(tmp_path / "alone"), {"cluster": {"workers": 1}})
    assert gradstore("featurize", alone, "--quiet").returncode == 0
    ours = FeatureStore.open(str(tmp_path / "4" / "store")).open_set("train")
    theirs = FeatureStore.open(str(tmp_path / "alone")).open_set("train")
    assert ours.info.block_rows == theirs.info.block_rows
    for block in range(ours.info.num_blocks):
        here, there = ours.read_block(block), theirs.read_block(block)
        assert all(np.array_equal(here[name], there[name]) for name in there)


def test_workers_of_several_threads_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    with LocalCluster(n_workers=1, threads_per_worker=2, host="127.0.0.1", dashboard_address="127.0.0.1:0") as threaded:
        changes = {"cluster": {"kind": "scheduler", "address": threaded.scheduler_address}}
        refused = gradstore("run", make_run(tmp_path, str(tmp_path / "store"), changes))
    assert refused.returncode == 2
    assert "has 2 threads; accepted: 1" in refused.stderr
    assert not (tmp_path / "store").exists()
