"""Runs on a scheduler and workers that others started, each a process of its own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from gradstore.store.backend import open_storage
from tests.clusters import SeparateCluster
from tests.runs import command, gradstore, make_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeparateCluster]:
    """Two workers of one thread, which may use more for linear algebra than gradstore lets them."""
    with SeparateCluster(tmp_path_factory.mktemp("cluster"), 2, {"PYTHONPATH": str(ROOT)}) as started:
        yield started


def numbers(store: Path) -> dict[str, bytes]:
    """Chunks of features and of C, which say nothing of who wrote them."""
    storage = open_storage(str(store))
    paths = [found.path for kind in ("features", "contributions") for found in storage.list_objects(kind)]
    return {path: storage.read(path) for path in paths if re.search(r"/c\.[0-9.]+$", path)}


def test_two_runs_at_once_on_one_scheduler_give_the_numbers_of_one_process_and_of_an_embedded_cluster(
    cluster: SeparateCluster, tiny_run: Path, tmp_path: Path
) -> None:
    runs = []
    for rank in (3, 4):
        folder = tmp_path / str(rank)
        folder.mkdir()
        (folder / "model").symlink_to(tiny_run / "model")
        runs.append(
            make_run(
                folder,
                str(folder / "store"),
                {"features": {"projection": {"kind": "logra", "rank": rank}, "block_rows": 16}},
            )
        )
    started = [
        subprocess.Popen(
            command("run", run, "--scheduler", cluster.address),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for run in runs
    ]
    for process in started:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        assert re.search(r"2 workers; dashboard http://127\.0\.0\.1:\d+/status", errors)
    found = numbers(tmp_path / "4" / "store")
    assert {path.partition("/")[0] for path in found} == {"features", "contributions"}
    for workers in (1, 2):
        changes = {"cluster": {"workers": workers}, "features": {"block_rows": 16}}
        run = make_run(tmp_path / "4", str(tmp_path / f"embedded-{workers}"), changes)
        for verb in ("featurize", "kernel", "contribute"):
            done = gradstore(verb, run, "--quiet")
            assert done.returncode == 0, done.stderr
            assert "dashboard" not in done.stderr
        assert numbers(tmp_path / f"embedded-{workers}") == found


def test_a_scheduler_that_is_gone_ends_a_run_which_goes_on_elsewhere(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    run = make_run(tmp_path, str(tmp_path / "store"))
    with SeparateCluster(tmp_path / "cluster", 1, {"PYTHONPATH": str(ROOT)}) as cluster:
        with subprocess.Popen(
            command("featurize", run, "--scheduler", cluster.address), stderr=subprocess.PIPE, text=True
        ) as running:
            with Client(cluster.address) as client:
                while not client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
                    assert running.poll() is None
            cluster.kill_scheduler()
            _, errors = running.communicate(timeout=300)
        assert running.returncode == 8, errors
        assert "Traceback" not in errors
        assert f"the scheduler at {cluster.address} is gone" in errors.splitlines()[-1]
        refused = gradstore("featurize", run, "--scheduler", cluster.address, "--quiet")
    assert refused.returncode == 8
    assert f"no scheduler answers at {cluster.address}" in refused.stderr
    again = gradstore("featurize", run, "--quiet")
    assert again.returncode == 0, again.stderr


def test_a_scheduler_that_anyone_may_use_is_refused_before_anything_is_read(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    run = make_run(tmp_path, str(tmp_path / "store"))
    for verb in ("featurize", "kernel", "contribute", "learn", "score", "run", "self-influence"):
        refused = gradstore(verb, run, "--scheduler", "tcp://192.0.2.7:8786")
        assert refused.returncode == 2, refused.stderr
        assert "not on this machine and not encrypted" in refused.stderr
    assert not (tmp_path / "store").exists()


def test_workers_of_several_threads_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    with LocalCluster(n_workers=1, threads_per_worker=2, host="127.0.0.1", dashboard_address="127.0.0.1:0") as threaded:
        changes = {"cluster": {"kind": "scheduler", "address": threaded.scheduler_address}}
        refused = gradstore("run", make_run(tmp_path, str(tmp_path / "store"), changes))
    assert refused.returncode == 2
    assert "has 2 threads; accepted: 1" in refused.stderr
    assert not (tmp_path / "store").exists()
