"""Ctrl-C, and workers that are gone: a run that ends says how, and one that waits says for what."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from tests.clusters import SeparateCluster
from tests.runs import command, gradstore, make_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def wait_for_a_record(store: Path) -> None:
    """Until a block of the train set is committed."""
    deadline = time.monotonic() + 300
    while not list(store.glob("features/train/blocks/m0/*.json")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def ctrl_c_is_heard() -> Iterator[None]:
    """Start processes as a terminal does: one of those that run tests ignores SIGINT, and what it starts would too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    run = make_run(tmp_path, str(tmp_path / "store"))
    with ctrl_c_is_heard():
        running = subprocess.Popen(command("run", run), stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for_a_record(tmp_path / "store")
    # As a terminal does: to every process of the group.
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: stopped. What was committed stays")
    again = gradstore("run", run)
    assert again.returncode == 0, again.stderr


def test_ctrl_c_leaves_nothing_at_a_shared_scheduler_and_a_store_to_go_on_from(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    run = make_run(tmp_path, str(tmp_path / "store"), {"features": {"block_rows": 2}})
    with SeparateCluster(tmp_path / "cluster", 2, {"PYTHONPATH": str(ROOT)}) as cluster:
        with ctrl_c_is_heard():
            running = subprocess.Popen(
                command("run", run, "--scheduler", cluster.address), stderr=subprocess.PIPE, text=True
            )
        wait_for_a_record(tmp_path / "store")
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=300)
        assert running.returncode == 130, errors
        assert "Traceback" not in errors
        assert errors.splitlines()[-1].startswith("error: stopped. What was committed stays")
        with Client(cluster.address) as client:
            assert client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) <= 2
        found = gradstore("verify", tmp_path / "store", "--full", "--json")
        assert found.returncode == 0, found.stdout
        again = gradstore("run", run, "--scheduler", cluster.address)
        assert again.returncode == 0, again.stderr
        assert "done earlier" in again.stderr


@pytest.mark.timeout(300)
def test_a_run_whose_workers_are_gone_says_so_and_goes_on_when_one_comes_back(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    with LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        changes = {"cluster": {"kind": "scheduler", "address": cluster.scheduler_address}}
        run = make_run(tmp_path, str(tmp_path / "store"), changes)
        with subprocess.Popen(command("run", run), stderr=subprocess.PIPE, text=True) as running:
            wait_for_a_record(tmp_path / "store")
            cluster.scale(0)
            assert running.stderr is not None
            for line in running.stderr:
                if "no worker is at" in line:
                    break
            else:
                pytest.fail("the run ended without a word about its workers")
            cluster.scale(1)
            _, errors = running.communicate(timeout=120)
        assert running.returncode == 0, errors
