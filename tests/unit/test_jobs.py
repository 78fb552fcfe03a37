from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from gradstore.cli import main
from gradstore.errors import IntegrityError, NotReadyError, SpecError
from gradstore.spec import RunSpec
from gradstore.stages.gc import collect_garbage
from gradstore.stages.jobs import Wishes, cancel, exit_code_of, list_jobs, read_lines, resume, show, states, submit
from gradstore.stages.jobs.keeper import _keep_process
from gradstore.stages.jobs.report import Report
from gradstore.stages.jobs.submit import record_of
from gradstore.stages.progress import Progress
from gradstore.stages.prune import prune
from gradstore.stages.stat import stat
from gradstore.stages.status import status
from gradstore.store.backend import open_storage
from gradstore.store.jobs import Attempt, JobRecord, Jobs
from tests.health import check, written_store
from tests.synthetic import make

_NAMES = count()
RECORD = JobRecord(id="small-1", name="small", run_hash="1", run={"run": {"name": "small"}}, by="me@here", at="today")


Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run the command line in this process: code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradstore", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


def attempt(number: int, **changes: Any) -> Attempt:
    return Attempt(number=number, cluster={"kind": "local"}, by="me@here", at="today", **changes)


@pytest.fixture
def jobs() -> Jobs:
    """A store with one job, of one attempt that nobody has begun."""
    made = Jobs(open_storage(f"memory://jobs-{next(_NAMES)}"))
    assert made.create(RECORD)
    assert made.start("small-1", attempt(1))
    return made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks takes a driver for lost after a fraction of a second."""
    monkeypatch.setattr(states, "SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(states, "START_SECONDS", 0.3)
    monkeypatch.setattr(states, "POLL_SECONDS", 0.02)


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    return make(tmp_path / "run")


def state(jobs: Jobs) -> str:
    return str(show(jobs.storage.url, "small-1")["state"])


def test_a_job_is_written_down_once_and_its_attempts_count_up(jobs: Jobs) -> None:
    assert not jobs.create(RECORD)
    assert jobs.record("small-1") == RECORD
    assert not jobs.start("small-1", attempt(1, priority=9))
    assert jobs.attempt("small-1", 1).priority == 0
    assert jobs.start("small-1", attempt(2, priority=9))
    assert jobs.sight("small-1").attempt == 2


def test_states_follow_what_the_driver_writes(jobs: Jobs) -> None:
    assert state(jobs) == "queued"
    report = Report(jobs, "small-1", 1)
    assert report.begin()
    assert not Report(jobs, "small-1", 1).begin()
    assert state(jobs) == "running"
    jobs.beat("small-1", 1, 0, {"phase": "waiting", "at": "now"})
    assert state(jobs) == "waiting"
    jobs.beat("small-1", 1, 1, {"phase": "running", "at": "now"})
    assert state(jobs) == "running"
    assert cancel(jobs.storage.url, "small-1")["state"] == "cancelling"
    report.end("cancelled", 130)
    assert state(jobs) == "cancelled"
    assert jobs.start("small-1", attempt(2))
    assert state(jobs) == "queued"


def test_a_job_that_is_cancelled_before_it_begins_never_does(jobs: Jobs) -> None:
    assert cancel(jobs.storage.url, "small-1")["state"] == "cancelled"
    found = show(jobs.storage.url, "small-1")
    assert exit_code_of(found) == 130
    with pytest.raises(SpecError, match="the job small-1 is cancelled: there is nothing to cancel"):
        cancel(jobs.storage.url, "small-1")


@pytest.mark.usefixtures("impatient")
def test_a_driver_from_which_nothing_new_is_heard_is_lost(jobs: Jobs) -> None:
    Report(jobs, "small-1", 1).begin()
    jobs.beat("small-1", 1, 0, {"phase": "running", "at": "now"})
    time.sleep(0.4)
    found = show(jobs.storage.url, "small-1")
    assert found["state"] == "lost"
    assert exit_code_of(found) == 11


@pytest.mark.usefixtures("impatient")
def test_clocks_that_differ_do_not_make_a_living_driver_lost_nor_a_dead_one_live(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    Report(jobs, "small-1", 1).begin()
    jobs.beat("small-1", 1, 0, {"phase": "running", "at": "now"})
    for hours in (-5, 5):
        shifted = time.time() + hours * 3600
        monkeypatch.setattr("gradstore.stages.jobs.states.time.time", lambda shifted=shifted: shifted)
        assert state(jobs) == "lost"
        number = jobs.sight("small-1").heartbeat
        assert number is not None
        beats = threading.Timer(0.1, jobs.beat, ("small-1", 1, number + 1, {"phase": "running", "at": "now"}))
        beats.start()
        assert state(jobs) == "running"
        beats.join()


def test_heartbeats_that_nobody_needs_are_removed_and_events_stay(jobs: Jobs) -> None:
    report = Report(jobs, "small-1", 1)
    report.begin()
    for number in range(5):
        jobs.beat("small-1", 1, number, {"phase": "running", "at": "now"})
        report.write(f"line {number}")
    paths = sorted(info.path for info in jobs.storage.list_objects("jobs/small-1/heartbeats"))
    assert paths == ["jobs/small-1/heartbeats/000003.1.json", "jobs/small-1/heartbeats/000004.1.json"]
    lines = [line["text"] for line in read_lines(jobs.storage.url, "small-1")["lines"]]
    assert lines[1:] == [f"line {number}" for number in range(5)]


def test_a_report_tells_rows_bytes_rate_and_what_was_counted(jobs: Jobs) -> None:
    report = Report(jobs, "small-1", 1)
    report.begin()
    progress = Progress(watchers=[report])
    with progress.stage("featurize train", 100, "rows", done=20, total_bytes=1000) as advance:
        advance(30)
        progress.count("invalid_rows", 2)
        with report.beating():
            pass
        beat = jobs.heartbeat(jobs.sight("small-1"))
        assert beat["counts"] == {"invalid_rows": 2}
        assert {key: beat["progress"][key] for key in ("stage", "done", "total", "bytes_done", "bytes_total")} == {
            "stage": "featurize train",
            "done": 50,
            "total": 100,
            "bytes_done": 500,
            "bytes_total": 1000,
        }
        assert beat["progress"]["seconds_left"] > 0
    report.end("done", 0)
    found = show(jobs.storage.url, "small-1")
    assert [stage["stage"] for stage in found["stages"]] == ["featurize train"]
    assert found["counts"] == {"invalid_rows": 2}
    assert exit_code_of(found) == 0


def test_a_driver_is_interrupted_when_it_is_cancelled_or_another_attempt_takes_its_place(jobs: Jobs) -> None:
    for number, asked in ((1, "cancelled"), (2, "superseded")):
        report = Report(jobs, "small-1", number)
        report.begin()
        if asked == "cancelled":
            jobs.cancel("small-1", number, "me", "now")
        else:
            jobs.start("small-1", attempt(number + 1))
        with pytest.raises(KeyboardInterrupt), report.beating():
            time.sleep(10)
        assert report.stop == asked
        jobs.start("small-1", attempt(number + 1))


def test_the_same_run_is_the_same_job_whatever_its_cluster(spec: RunSpec) -> None:
    elsewhere = spec.model_copy(update={"cluster": spec.cluster.at("tcp://127.0.0.1:1")})
    assert record_of(elsewhere).id == record_of(spec).id
    changed = spec.model_copy(update={"run": spec.run.model_copy(update={"seed": 7})})
    assert record_of(changed).id != record_of(spec).id
    assert record_of(spec).id.startswith(f"{spec.run.name}-")


@pytest.mark.parametrize("ended", [None, "done"])
def test_a_run_that_somebody_drives_or_that_is_done_is_not_begun_again(spec: RunSpec, ended: str | None) -> None:
    jobs, record = Jobs(open_storage(spec.run.store)), record_of(spec)
    jobs.create(record)
    jobs.start(record.id, attempt(1))
    report = Report(jobs, record.id, 1)
    report.begin()
    if ended is not None:
        report.end(ended, 0)
    found = submit(spec, Wishes())
    assert found == {"store": spec.run.store, "id": record.id, "state": ended or "running", "began": False}
    assert jobs.sight(record.id).attempt == 1


def test_a_job_that_somebody_drives_is_neither_resumed_nor_forgotten(jobs: Jobs) -> None:
    Report(jobs, "small-1", 1).begin()
    with pytest.raises(SpecError, match="the job small-1 is running; only one that nobody drives is resumed"):
        resume(jobs.storage.url, "small-1", lambda last: last)
    with pytest.raises(SpecError, match="jobs/small-1: somebody drives it"):
        prune(jobs.storage.url, ["jobs/small-1"], stale=False, dry_run=False)


def test_what_is_asked_of_a_job_that_is_not_there_is_refused_with_those_that_are(jobs: Jobs, spec: RunSpec) -> None:
    for ask in (show, cancel, read_lines):
        with pytest.raises(NotReadyError, match="there is no such job; found: small-1"):
            ask(jobs.storage.url, "other")
    with pytest.raises(NotReadyError, match="there is no such job; found: none"):
        submit(spec, Wishes(after="other"))
    with pytest.raises(SpecError, match="which is this job itself"):
        submit(spec, Wishes(after=record_of(spec).id))
    assert not Path(spec.run.store).exists()


def test_a_scheduler_that_anyone_may_use_is_refused_and_the_store_untouched(spec: RunSpec, invoke: Invoke) -> None:
    run = str(Path(spec.run.store).parent / "run.toml")
    code, _, message = invoke("submit", run, "--scheduler", "tcp://192.0.2.7:8786")
    assert code == 2
    assert "not on this machine and not encrypted" in message
    assert not Path(spec.run.store).exists()


def with_a_job() -> Jobs:
    """A sound store, and the documents of a job that is done in it."""
    made = Jobs(written_store())
    made.create(RECORD)
    made.start("small-1", attempt(1))
    report = Report(made, "small-1", 1)
    report.begin()
    made.beat("small-1", 1, 0, {"phase": "running", "at": "now"})
    report.end("done", 0)
    return made


def test_a_store_with_jobs_is_sound_and_counts_them() -> None:
    jobs = with_a_job()
    found = check(jobs.storage, full=True)
    assert (found.problems, found.orphans, found.unknown) == ((), (), ())
    counted = stat(jobs.storage.url)
    assert counted["jobs"]["objects"] == 5
    assert counted["unknown"]["objects"] == 0
    assert status(jobs.storage.url)["jobs"] == ["small-1"]
    assert collect_garbage(jobs.storage.url, grace="0", dry_run=False)["unknown"]["objects"] == 0
    assert len(list(jobs.storage.list_objects("jobs"))) == 5


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        ("job.json", show),
        ("attempts/000001.json", show),
        ("events/000000.1.json", read_lines),
        ("ends/000001.json", show),
    ],
)
def test_a_damaged_document_of_a_job_is_found_and_the_job_can_be_forgotten(
    name: str, reading: Callable[[str, str], Any]
) -> None:
    jobs = with_a_job()
    path = f"jobs/small-1/{name}"
    jobs.storage.replace(path, [jobs.storage.read(path).replace(b'"', b"'", 1)])
    problems = check(jobs.storage).problems
    assert [(problem.kind, problem.path) for problem in problems] == [("damaged document", path)]
    assert f"gradstore prune {jobs.storage.url} jobs/small-1" in problems[0].remedy
    with pytest.raises(IntegrityError, match="jobs/small-1"):
        reading(jobs.storage.url, "small-1")
    removed = prune(jobs.storage.url, ["jobs/small-1"], stale=False, dry_run=False)["removed"]
    assert removed == [{"path": "jobs/small-1", "stale": {}, "objects": 5}]
    assert check(jobs.storage).problems == ()
    assert list_jobs(jobs.storage.url)["jobs"] == []


def test_a_driver_that_comes_second_ends_as_one_and_does_not_end_the_attempt(tmp_path: Path) -> None:
    jobs = Jobs(open_storage(str(tmp_path / "store")))
    jobs.create(RECORD)
    jobs.start("small-1", attempt(1))
    Report(jobs, "small-1", 1).begin()
    assert not _keep_process(jobs, "small-1", 1, "tcp://127.0.0.1:1")
    assert not jobs.sight("small-1").ended


@pytest.mark.parametrize(("ended", "code"), [("done", 0), ("failed", 3), ("cancelled", 130)])
def test_waiting_for_a_job_returns_what_its_run_would_have(jobs: Jobs, invoke: Invoke, ended: str, code: int) -> None:
    report = Report(jobs, "small-1", 1)
    report.begin()
    error = {"message": "no such column", "traceback": "Traceback: here"} if ended == "failed" else None
    report.end(ended, code, error)
    url = jobs.storage.url
    assert invoke("jobs", "show", url, "small-1")[0] == 0
    returned, shown, _ = invoke("jobs", "show", url, "small-1", "--wait", "--json")
    assert returned == code
    assert json.loads(shown)["state"] == ended
    assert json.loads(shown)["error"] == error
    _, shown, _ = invoke("jobs", "show", url, "small-1")
    assert ("Traceback: here" in shown) == (ended == "failed")
    _, shown, _ = invoke("jobs", "list", url)
    assert ended in shown
    _, shown, _ = invoke("jobs", "logs", url, "small-1")
    assert "begun by" in shown
