"""What is read of jobs: their states, how far they are, their lines; and asking one to stop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gradstore.errors import SpecError, StoppedError
from gradstore.stages.jobs.report import HEARTBEAT_SECONDS, myself, now
from gradstore.stages.progress import duration
from gradstore.store.backend import open_storage
from gradstore.store.jobs import JobRecord, Jobs, Sight

if TYPE_CHECKING:
    from rich.console import RenderableType

ALIVE: Final = ("queued", "waiting", "running", "cancelling")
# A driver may miss some heartbeats while it waits for its storage, and takes a while to load what it needs.
SILENCE_SECONDS = 4 * HEARTBEAT_SECONDS
START_SECONDS = 60.0
LOST_EXIT_CODE = 11
POLL_SECONDS = 0.5


def state_of(jobs: Jobs, job: str) -> tuple[str, int]:
    """Return the state of a job, ``absent`` if it has no attempt yet, and the number of the attempt whose state it is."""
    sight = jobs.sight(job)
    if sight.attempt == 0:
        return "absent", 0
    found = _look(jobs, [sight])[0]
    return found["state"], found["attempt"]


def is_driven(jobs: Jobs, job: str) -> bool:
    """Whether somebody drives a job or is about to; what its documents say is not read, so they may be damaged."""
    seen, silent = _watch(jobs, [jobs.sight(job)])
    sight = seen[0]
    if sight.ended or sight.attempt == 0:
        return False
    return not sight.cancelled if sight.begun is None else job not in silent


def list_jobs(store_url: str) -> dict[str, Any]:
    """Plain values: every job of a store, its state, and how far it is."""
    jobs = Jobs(open_storage(store_url, copies=False))
    return {"store": jobs.storage.url, "jobs": _look(jobs, jobs.sights())}


def show(store_url: str, job: str, *, wait: bool = False) -> dict[str, Any]:
    """Plain values: one job, with who submitted it, on which cluster it runs, and how it ended.

    With ``wait`` only once nobody drives it any more.

    Raises
    ------
    NotReadyError
        If there is no such job.
    """
    jobs = Jobs(open_storage(store_url, copies=False))
    record = jobs.record(job)
    while True:
        found = _look(jobs, [jobs.sight(job)])[0]
        if not wait or found["state"] not in ALIVE:
            return {"store": jobs.storage.url, **found, **_origin(jobs, record, found["attempt"])}
        time.sleep(HEARTBEAT_SECONDS)


def exit_code_of(found: Mapping[str, Any]) -> int:
    """Return the exit code for who waited for a job: 0 if it is done, else what `gradstore run` would have returned."""
    if found["state"] == "lost":
        return LOST_EXIT_CODE
    # One that was cancelled before it began has written no end.
    return StoppedError.exit_code if found["state"] == "cancelled" else int(found["exit_code"])


def read_lines(store_url: str, job: str) -> dict[str, Any]:
    """Plain values: the lines that drivers of a job wrote, in order.

    Raises
    ------
    NotReadyError
        If there is no such job.
    """
    jobs = Jobs(open_storage(store_url, copies=False))
    jobs.record(job)
    return {"store": jobs.storage.url, "id": job, "lines": jobs.events(job)}


def cancel(store_url: str, job: str) -> dict[str, Any]:
    """Ask the driver of a job to stop; what was committed stays.

    Raises
    ------
    NotReadyError
        If there is no such job.
    SpecError
        If nobody drives it.
    """
    jobs = Jobs(open_storage(store_url, copies=False))
    jobs.record(job)
    sight = jobs.sight(job)
    if (state := _look(jobs, [sight])[0]["state"]) not in ALIVE:
        raise SpecError(f"{jobs.storage.url}: the job {job} is {state}: there is nothing to cancel.")
    jobs.cancel(job, sight.attempt, myself(), now())
    return {"store": jobs.storage.url, "id": job, "state": state_of(jobs, job)[0]}


def _look(jobs: Jobs, sights: Sequence[Sight]) -> list[dict[str, Any]]:
    """State of jobs and how far they are; those that may be lost are watched for some time, all together."""
    seen, silent = _watch(jobs, sights)
    return [_describe(jobs, sight, silent=sight.id in silent) for sight in seen]


def _watch(jobs: Jobs, sights: Sequence[Sight]) -> tuple[list[Sight], set[str]]:
    """The jobs as they are now, and the ids of those from which nothing is heard.

    Clocks differ from machine to machine. So a heartbeat that looks old only raises a doubt: the job is lost if no other comes
    for as long as its driver would be silent at most.
    """
    seen = {sight.id: sight for sight in sights}
    doubtful = {sight.id for sight in sights if _is_doubtful(sight)}
    deadline = time.monotonic() + SILENCE_SECONDS
    while doubtful and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        for job in [*doubtful]:
            sight = jobs.sight(job)
            if sight != seen[job]:
                seen[job] = sight
                doubtful.remove(job)
    return [*seen.values()], doubtful


def _is_doubtful(sight: Sight) -> bool:
    if sight.ended or sight.begun is None:
        return False
    heard, patience = (sight.begun, START_SECONDS) if sight.beaten is None else (sight.beaten, SILENCE_SECONDS)
    return abs(time.time() - heard) > patience


def _describe(jobs: Jobs, sight: Sight, *, silent: bool) -> dict[str, Any]:
    ending = jobs.ending(sight.id, sight.attempt) if sight.ended else {}
    beat = {} if sight.ended else jobs.heartbeat(sight)
    return {
        "id": sight.id,
        "state": _state(sight, ending, beat, silent=silent),
        "attempt": sight.attempt,
        "heard": ending.get("at") or beat.get("at"),
        "seconds": ending.get("seconds", beat.get("seconds")),
        "progress": beat.get("progress"),
        "counts": ending.get("counts", beat.get("counts", {})),
        "stages": ending.get("stages", []),
        "exit_code": ending.get("exit_code"),
        "error": ending.get("error"),
    }


def _state(sight: Sight, ending: Mapping[str, Any], beat: Mapping[str, Any], *, silent: bool) -> str:
    if sight.ended:
        return str(ending["state"])
    if sight.begun is None or silent:
        # Who has not begun looks first whether it is cancelled.
        return "cancelled" if sight.cancelled else "lost" if silent else "queued"
    return "cancelling" if sight.cancelled else str(beat.get("phase", "running"))


def _origin(jobs: Jobs, record: JobRecord, number: int) -> dict[str, Any]:
    submitted = {"name": record.name, "submitted": {"by": record.by, "at": record.at}}
    if number == 0:
        return {**submitted, "cluster": None, "priority": 0, "after": None}
    attempt = jobs.attempt(record.id, number)
    cluster = {key: attempt.cluster.get(key) for key in ("kind", "address")}
    return {**submitted, "cluster": cluster, "priority": attempt.priority, "after": attempt.after}


def render_jobs(found: Mapping[str, Any]) -> RenderableType:
    """Draw a list of jobs for a terminal."""
    from rich.table import Column, Table

    table = Table(Column("job", no_wrap=True), title=f"jobs of {found['store']}", title_justify="left")
    for column in ("state", "heard", "what"):
        table.add_column(column)
    for job in found["jobs"]:
        table.add_row(job["id"], job["state"], job["heard"] or "", _what(job))
    return table


def render_show(found: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal."""
    cluster = found["cluster"] or {"kind": "none yet", "address": None}
    rows = {
        "state": found["state"],
        "what": _what(found),
        "heard": found["heard"],
        "submitted": f"{found['submitted']['at']} by {found['submitted']['by']}",
        "attempt": found["attempt"],
        "cluster": " ".join(filter(None, (cluster["kind"], cluster["address"]))),
        "priority": found["priority"] or None,
        "after": found["after"],
        **{what.replace("_", " "): count for what, count in found["counts"].items()},
    }
    lines = [found["id"], *(f"  {key}: {value}" for key, value in rows.items() if value not in (None, ""))]
    lines += [
        f"  {row['stage']}: {row['total']:,} {row['unit']}, {duration(row['seconds'])}" for row in found["stages"]
    ]
    if found["error"] is not None and found["error"]["traceback"]:
        lines.append(found["error"]["traceback"].rstrip())
    return lines


def _what(job: Mapping[str, Any]) -> str:
    """How far a job is, or what went wrong, in one line."""
    if job["state"] == "lost":
        return f"resume it: gradstore jobs resume STORE {job['id']}"
    if job["error"] is not None:
        return str(job["error"]["message"])
    progress = job["progress"]
    if progress is None:
        return ""
    left = duration(progress["seconds_left"])
    return f"{progress['stage']}: {progress['done']:,}/{progress['total']:,} {progress['unit']}, {left} left"
