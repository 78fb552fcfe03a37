"""Workers of different kinds, and workers that are told to leave."""

from __future__ import annotations

import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from distributed import Client, get_worker

from gradstore.cluster import Engine, Task
from gradstore.spec import ClusterSection
from gradstore.store.backend import open_storage
from tests import synthetic
from tests.clusters import SeparateCluster, restless
from tests.runs import gradstore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BLOCKS = 40


def where() -> str:
    """Name of the worker that runs this."""
    return str(get_worker().name)


def names_of_workers(section: ClusterSection, tasks: Sequence[Task]) -> set[str]:
    with Engine(section) as engine:
        return {name for _, name in engine.run(tasks)}


def test_what_runs_the_model_goes_to_workers_with_a_gpu_where_others_have_none(tmp_path: Path) -> None:
    with SeparateCluster(tmp_path, 2, {"PYTHONPATH": str(ROOT)}) as cluster:
        section = ClusterSection(kind="scheduler", address=cluster.address, device="cuda")
        on_a_gpu = [
            Task(name=f"model-{number}", function=where, arguments=(), resources=section.model_resources)
            for number in range(8)
        ]
        anywhere = [Task(name=f"kernel-{number}", function=where, arguments=()) for number in range(8)]
        assert names_of_workers(section, on_a_gpu) == {"worker-1", "worker-2"}
        cluster.start_worker("--resources", "GPU=1")
        with Client(cluster.address) as client:
            client.wait_for_workers(3, timeout=60)
        assert names_of_workers(section, on_a_gpu) == {"worker-3"}
        assert names_of_workers(section, anywhere) >= {"worker-1", "worker-2"}


def chunks(store: Path) -> dict[str, bytes]:
    storage = open_storage(str(store))
    paths = [found.path for found in storage.list_objects("features") if "/c." in found.path]
    return {path: storage.read(path) for path in paths}


def test_workers_that_are_told_to_end_leave_no_half_written_block_and_the_same_bits(tmp_path: Path) -> None:
    synthetic.synthesized(tmp_path / "alone", rows=16 * BLOCKS, groups=24)
    synthetic.make(tmp_path / "told", rows=16 * BLOCKS, groups=24)
    store = tmp_path / "told" / "store"
    options = ("--preload", "tests.slow_disk")
    with SeparateCluster(tmp_path / "cluster", 2, {"PYTHONPATH": str(ROOT)}, options) as cluster:
        storage = open_storage(str(store))

        def records() -> int:
            return sum("/blocks/" in found.path for found in storage.list_objects("features"))

        with restless(cluster, random.Random("told"), 8, records, signal.SIGTERM) as ended:
            done = gradstore("featurize", tmp_path / "told" / "run.toml", "--scheduler", cluster.address)
            assert done.returncode == 0, done.stderr
            assert ended() >= 6
    verified = gradstore("verify", store, "--full", "--quiet")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    expected = chunks(tmp_path / "alone" / "store")
    assert chunks(store) == expected
    assert len(expected) > BLOCKS
