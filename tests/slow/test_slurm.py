"""Whole runs whose workers are jobs of a real Slurm."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from gradstore.spec import read_spec
from gradstore.store.backend import open_storage
from tests import synthetic
from tests.runs import command, gradstore
from tests.slurm import missing, running_slurm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"needs slurm-wlm and munge: {', '.join(missing())} not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons of a test run as root"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Mapping[str, str]]:
    # A path of pytest's is too long for a socket.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, running_slurm(Path(folder) / "s") as env:
        yield env


def make_run(folder: Path, **cluster: Any) -> Path:
    """Write a synthetic run whose workers are jobs; return its run.toml."""
    spec = synthetic.make(folder)
    path = folder / "run.toml"
    options = {"interface": "lo", "shared_folder": str(folder), "logs": str(folder / "logs"), "walltime": "00:30:00"}
    options |= cluster.pop("options", {})
    others = re.sub(r"^\[cluster\]\n[^\[]*", "", path.read_text(), flags=re.MULTILINE)
    lines = ["[cluster]", 'kind = "slurm"', "workers = 2", 'memory_per_worker = "1GiB"']
    lines += [f"{key} = {value}" for key, value in cluster.items()]
    lines += ["", "[cluster.options]", *(f'{key} = "{value}"' for key, value in options.items()), ""]
    path.write_text(others + "\n" + "\n".join(lines))
    assert read_spec(path).run == spec.run
    return path


def chunks(store: Path) -> dict[str, bytes]:
    storage = open_storage(str(store))
    paths = [found.path for kind in ("features", "contributions") for found in storage.list_objects(kind)]
    return {path: storage.read(path) for path in paths if "/c." in path}


def jobs(env: Mapping[str, str]) -> list[str]:
    done = subprocess.run(
        ["squeue", "--noheader", "--format=%i"], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize("cluster", [{}, {"minimum": 0}], ids=["fixed", "adaptive"])
def test_a_whole_run_on_slurm_has_the_bits_of_one_process(
    slurm: Mapping[str, str], tmp_path: Path, cluster: dict[str, Any]
) -> None:
    run = make_run(tmp_path / "run", **cluster)
    done = gradstore("run", run, env={**slurm, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert "dashboard http://127.0.0.1:" in done.stderr
    deadline = time.monotonic() + 60
    while jobs(slurm):
        assert time.monotonic() < deadline, "jobs of a run that has ended are still there"
        time.sleep(0.5)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".dask-jobqueue")]
    alone = synthetic.make(tmp_path / "alone")
    for verb in ("featurize", "kernel", "contribute"):
        assert gradstore(verb, tmp_path / "alone" / "run.toml", "--quiet").returncode == 0
    assert chunks(tmp_path / "run" / "store") == chunks(Path(alone.run.store))


def test_a_job_that_is_cancelled_is_asked_for_again(slurm: Mapping[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with subprocess.Popen(
        command("featurize", run), env={**os.environ, **slurm}, stderr=subprocess.PIPE, text=True
    ) as running:
        while not (found := jobs(slurm)):
            assert running.poll() is None
            time.sleep(0.2)
        subprocess.run(["scancel", found[0]], env={**os.environ, **slurm}, check=True)
        _, errors = running.communicate(timeout=240)
    assert running.returncode == 0, errors


def test_what_slurm_would_not_take_is_told_before_anything_is_written(slurm: Mapping[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", options={"partition": "none"})
    refused = gradstore("featurize", run, "--quiet", env=slurm)
    assert refused.returncode == 2, refused.stderr
    assert "Slurm refuses a job of a worker" in refused.stderr
    assert "invalid partition" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("name", ["run", "workers"])
def test_slurm_takes_the_scripts_of_deploy(slurm: Mapping[str, str], name: str) -> None:
    script = ROOT / "deploy" / "slurm" / f"{name}.sbatch"
    tested = subprocess.run(
        ["sbatch", "--test-only", "--mem=1G", "--cpus-per-task=1", "--time=10", script],
        env={**os.environ, **slurm},
        capture_output=True,
        text=True,
        check=False,
    )
    assert tested.returncode == 0, tested.stderr
