"""Jobs on schedulers of other processes: what dies, and the run goes on."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from gradstore.spec import RunSpec
from gradstore.stages.certificates import certificates
from gradstore.stages.jobs import cancel
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureStore
from gradstore.store.jobs import Jobs
from tests.clusters import SeparateCluster, restless, with_certificates
from tests.runs import command, gradstore
from tests.servers import S3Server
from tests.synthetic import make

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROWS = 640
ENVIRONMENT = {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, seaweed: S3Server) -> Iterator[SeparateCluster]:
    with SeparateCluster(tmp_path_factory.mktemp("cluster"), 2, {**ENVIRONMENT, **seaweed.env}) as started:
        yield started


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    """A run of 40 blocks, which takes some seconds."""
    return make(tmp_path / "run", rows=ROWS)


def run_of(spec: RunSpec) -> Path:
    return Path(spec.run.store).parent / "run.toml"


def submit(spec: RunSpec, *options: str) -> dict[str, Any]:
    done = gradstore("submit", run_of(spec), *options, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def ask(verb: str, spec: RunSpec, job: str, *options: str, code: int = 0) -> dict[str, Any]:
    done = gradstore("jobs", verb, spec.run.store, job, *options, "--json")
    assert done.returncode == code, (done.stdout, done.stderr)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def committed(spec: RunSpec) -> int:
    """How many records are in the store, of whatever."""
    paths = [info.path for info in open_storage(spec.run.store).list_objects("")]
    return sum(bool(re.search(r"/(blocks|commits)/.*\.json$", path)) for path in paths)


def wait_until_committed(spec: RunSpec, records: int) -> None:
    deadline = time.monotonic() + 120
    while committed(spec) < records:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def results(spec: RunSpec) -> dict[str, bytes]:
    """Every array and table of scores and weights, which say nothing of who wrote them."""
    storage = open_storage(spec.run.store)
    tops = ("features", "contributions", "weights", "scores")
    paths = [info.path for top in tops for info in storage.list_objects(top)]
    return {
        path: storage.read(path) for path in paths if re.search(r"/c\.[0-9.]+$|(weights|proponents)\.parquet$", path)
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an embedded cluster of one worker makes of the same run."""
    spec = make(tmp_path_factory.mktemp("expected") / "run", rows=ROWS)
    done = gradstore("run", run_of(spec), "--quiet")
    assert done.returncode == 0, done.stderr
    return results(spec)


def test_a_job_goes_on_when_its_client_is_killed_and_two_submits_do_the_work_once(
    cluster: SeparateCluster, spec: RunSpec, expected: dict[str, bytes]
) -> None:
    with subprocess.Popen(
        command("submit", run_of(spec), "--scheduler", cluster.address), stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        job = client.stdout.readline().strip()
        client.send_signal(signal.SIGKILL)
    again = submit(spec, "--scheduler", cluster.address)
    assert (again["id"], again["began"]) == (job, False)
    found = ask("show", spec, job, "--wait")
    assert (found["state"], found["attempt"]) == ("done", 1)
    assert results(spec) == expected
    before = committed(spec)
    finished = submit(spec, "--scheduler", cluster.address)
    assert (finished["id"], finished["state"], finished["began"]) == (job, "done", False)
    assert committed(spec) == before


def test_of_two_submits_at_once_one_begins(cluster: SeparateCluster, spec: RunSpec) -> None:
    line = command("submit", run_of(spec), "--scheduler", cluster.address, "--json")
    clients = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(client.communicate(timeout=120)[0]) for client in clients]
    assert sorted(answer["began"] for answer in answers) == [False, True]
    found = ask("show", spec, answers[0]["id"], "--wait")
    assert (found["state"], found["attempt"]) == ("done", 1)


def test_a_job_that_is_cancelled_stops_and_goes_on_when_resumed(
    cluster: SeparateCluster, spec: RunSpec, expected: dict[str, bytes]
) -> None:
    job = submit(spec, "--scheduler", cluster.address)["id"]
    wait_until_committed(spec, 5)
    # By this process: until a command has started, the job may have ended.
    cancel(spec.run.store, job)
    assert ask("show", spec, job, "--wait", code=130)["state"] == "cancelled"
    stopped_at = {path: data for path, data in results(spec).items() if path.startswith("features")}
    assert stopped_at
    assert ask("resume", spec, job)["began"]
    found = ask("show", spec, job, "--wait")
    assert (found["state"], found["attempt"]) == ("done", 2)
    assert results(spec) == expected


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_that_end_in_every_stage_also_with_the_driver_change_no_bit(
    spec: RunSpec, expected: dict[str, bytes], tmp_path: Path, how: signal.Signals
) -> None:
    with SeparateCluster(tmp_path / "cluster", 2, ENVIRONMENT) as cluster:
        job = submit(spec, "--scheduler", cluster.address)["id"]
        with restless(cluster, random.Random(5), 5, lambda: committed(spec), how) as killed:
            found = ask("show", spec, job, "--wait")
        assert killed() > 2
    assert found["state"] == "done"
    # Of two workers one keeps the driver, so that it died too; its attempts were taken over.
    assert found["attempt"] > 1
    assert results(spec) == expected


def test_a_job_whose_scheduler_dies_goes_on_with_another(
    spec: RunSpec, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with SeparateCluster(tmp_path / "first", 1, ENVIRONMENT) as cluster:
        job = submit(spec, "--scheduler", cluster.address)["id"]
        wait_until_committed(spec, 5)
        cluster.kill_scheduler()
    # The driver may have found that the scheduler is gone, or have died with its worker before.
    done = gradstore("jobs", "show", spec.run.store, job, "--wait", "--json")
    found = json.loads(done.stdout)
    assert (found["state"], done.returncode) in (("lost", 11), ("failed", 8)), found
    with SeparateCluster(tmp_path / "second", 1, ENVIRONMENT) as cluster:
        assert ask("resume", spec, job, "--scheduler", cluster.address)["began"]
        found = ask("show", spec, job, "--wait")
    assert (found["state"], found["attempt"]) == ("done", 2)
    assert results(spec) == expected


def test_a_job_without_a_scheduler_is_driven_by_a_process_of_this_machine(
    spec: RunSpec, expected: dict[str, bytes]
) -> None:
    job = submit(spec)["id"]
    assert ask("show", spec, job, "--wait")["state"] == "done"
    assert results(spec) == expected


def test_a_job_waits_for_the_one_that_it_is_to_come_after(cluster: SeparateCluster, spec: RunSpec) -> None:
    first = submit(spec, "--scheduler", cluster.address)["id"]
    later = run_of(spec).with_name("later.toml")
    text = run_of(spec).read_text()
    later.write_text(re.sub(r"^\[learn\]$", '[learn]\nname = "other"', text, flags=re.MULTILINE))
    done = gradstore("submit", later, "--scheduler", cluster.address, "--after", first, "--json")
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)["id"]
    assert job != first
    found = ask("show", spec, job, "--wait")
    assert (found["state"], found["after"]) == ("done", first)
    lines = [line["text"] for line in ask("logs", spec, job)["lines"]]
    assert f"waiting for the job {first}" in lines
    assert ask("show", spec, first)["state"] == "done"


def test_a_job_on_s3_is_seen_stopped_and_resumed_by_whoever_has_the_bucket(
    cluster: SeparateCluster,
    seaweed: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes],
    tmp_path: Path,
) -> None:
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    spec = make(tmp_path / "run", rows=ROWS, store=seaweed.url("jobs/store"))
    done = gradstore("submit", tmp_path / "run" / "run.toml", "--scheduler", cluster.address, "--json")
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)["id"]
    wait_until_committed(spec, 5)
    # By this process: until a command has started, the job may have ended.
    cancel(spec.run.store, job)
    assert ask("show", spec, job, "--wait", code=130)["state"] == "cancelled"
    listed = gradstore("jobs", "list", spec.run.store, "--json")
    assert [found["state"] for found in json.loads(listed.stdout)["jobs"]] == ["cancelled"]
    assert ask("resume", spec, job)["began"]
    assert ask("show", spec, job, "--wait")["state"] == "done"
    assert ask("logs", spec, job)["lines"]
    assert results(spec) == expected


def test_an_error_of_a_worker_is_told_with_the_frames_of_both_processes(
    cluster: SeparateCluster, spec: RunSpec
) -> None:
    assert gradstore("featurize", run_of(spec), "--quiet").returncode == 0
    chunk = sorted(Path(spec.run.store).glob("features/train/m0/*/c.3.0"))[0]
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    job = submit(spec, "--scheduler", cluster.address)["id"]
    found = ask("show", spec, job, "--wait", code=7)
    assert (found["state"], found["exit_code"]) == ("failed", 7)
    assert chunk.name in found["error"]["message"]
    assert "On the worker:\nTraceback (most recent call last)" in found["error"]["traceback"]


def test_nobody_keeps_a_scheduler_busy_once_a_job_is_done(cluster: SeparateCluster, spec: RunSpec) -> None:
    job = submit(spec, "--scheduler", cluster.address)["id"]
    assert ask("show", spec, job, "--wait")["state"] == "done"
    with Client(cluster.address) as client:
        deadline = time.monotonic() + 30
        while client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert Jobs(open_storage(spec.run.store)).sight(job).ended
    assert FeatureStore.open(spec.run.store).open_set("train").missing_blocks() == []


def test_a_driver_shows_the_certificate_of_its_worker_where_there_is_no_clients(spec: RunSpec, tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    certificates(mine)
    shutil.copytree(mine, theirs, ignore=shutil.ignore_patterns("client*.pem"))
    settings = theirs / "dask.yaml"
    settings.write_text(settings.read_text().replace(str(mine), str(theirs)))
    with with_certificates(mine):
        cluster = SeparateCluster(tmp_path / "cluster", 1, {**ENVIRONMENT, "DASK_CONFIG": str(settings)}).__enter__()
    try:
        line = ("submit", run_of(spec), "--scheduler", cluster.address, "--json")
        done = gradstore(*line, env={"DASK_CONFIG": str(mine / "dask.yaml")})
        assert done.returncode == 0, done.stderr
        job = json.loads(done.stdout)["id"]
        # No certificate is needed to see how it goes.
        assert ask("show", spec, job, "--wait")["cluster"]["address"].startswith("tls://")
    finally:
        cluster.__exit__()


def test_options_before_a_command_have_its_stages_logged_and_counted(spec: RunSpec, tmp_path: Path) -> None:
    metrics = tmp_path / "gradstore.prom"
    done = gradstore("--log-format", "json", "--metrics", metrics, "--metrics-port", "0", "featurize", run_of(spec))
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines()]
    assert ("end", "featurize train") in [(event["event"], event["stage"]) for event in events]
    labels = 'run="synth",stage="featurize train",unit="rows"'
    assert f"gradstore_stage_units{{{labels}}} 640\n" in metrics.read_text()
    missing = gradstore("--log-format", "json", "contribute", run_of(spec).with_name("other.toml"))
    assert missing.returncode == 2


def test_a_scheduler_that_does_not_answer_leaves_the_store_untouched(spec: RunSpec) -> None:
    refused = gradstore("submit", run_of(spec), "--scheduler", "tcp://127.0.0.1:9")
    assert refused.returncode == 8
    assert "no scheduler answers at tcp://127.0.0.1:9" in refused.stderr
    assert not Path(spec.run.store).exists()
