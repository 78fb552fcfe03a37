"""Submitting a run, and resuming one: a job is handed to who drives it, unless somebody does already."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradstore.cluster import Engine
from gradstore.errors import ContractError, SpecError, TaskError
from gradstore.spec import RunSpec, content_hash
from gradstore.stages.jobs.keeper import send
from gradstore.stages.jobs.report import Report, myself, now
from gradstore.stages.jobs.states import ALIVE, state_of
from gradstore.stages.run import stages_of
from gradstore.store.backend import open_storage
from gradstore.store.jobs import JOBS_FOLDER, Attempt, JobRecord, Jobs

if TYPE_CHECKING:
    from distributed import Client

    from gradstore.spec import ClusterSection

Launch = Callable[[str, int], None]
"""Starts a driver of an attempt: of a job, and with a number."""

_TAKEN_WITHIN_SECONDS = 30.0
_POLL_SECONDS = 0.05
_HASH_DIGITS = 10
_LONGEST_NAME = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """How a job is to be driven.

    Attributes
    ----------
    priority
        Of its tasks among those of other jobs on one scheduler.
    after
        Job that has to be done before.
    append
        Whether sets may have grown.
    """

    priority: int = 0
    after: str | None = None
    append: bool = False


def submit(spec: RunSpec, wishes: Wishes) -> dict[str, Any]:
    """Hand a run to who drives it, and return its job at once: its id, its state, and whether this call began it.

    The same run in the same store is the same job, whatever its cluster. One that somebody drives or that is done is left
    alone; one that failed, was cancelled or is lost goes on.

    Raises
    ------
    SpecError, TaskError
        If its cluster cannot be used.
    NotReadyError
        If the run needs weights that the store lacks, or there is no job that it is to come after.
    """
    stages_of(spec)
    jobs = Jobs(open_storage(spec.run.store, copies=False))
    record = record_of(spec)
    if wishes.after == record.id:
        raise SpecError(f"--after: found {wishes.after}, which is this job itself. Name another, or leave it out.")
    if wishes.after is not None:
        jobs.record(wishes.after)
    state, last = state_of(jobs, record.id)
    if state in ALIVE or (state == "done" and not wishes.append):
        _refuse_another_run(jobs, record)
        return _answer(jobs, record.id, state, began=False)
    with _launcher(jobs, spec.cluster) as launch:
        if not jobs.create(record):
            _refuse_another_run(jobs, record)
        return _begin(jobs, (record.id, last + 1), spec.cluster, wishes, launch)


def resume(store_url: str, job: str, cluster: Callable[[ClusterSection], ClusterSection]) -> dict[str, Any]:
    """Have a job driven on that nobody drives; return what `submit` does.

    Parameters
    ----------
    store_url, job
        The job.
    cluster
        From the cluster of its last attempt to that on which it goes on.

    Raises
    ------
    NotReadyError
        If there is no such job.
    SpecError, TaskError
        If somebody drives it, or its cluster cannot be used.
    """
    jobs = Jobs(open_storage(store_url, copies=False))
    record = jobs.record(job)
    state, number = state_of(jobs, job)
    if state in ALIVE and state != "queued":
        raise SpecError(
            f"{store_url}: the job {job} is {state}; only one that nobody drives is resumed. Cancel it first."
        )
    if number == 0:
        raise SpecError(f"{store_url}: the job {job} was never begun. Submit its run.toml again.")
    last = jobs.attempt(job, number)
    section = cluster(RunSpec.model_validate({**record.run, "cluster": last.cluster}).cluster)
    wishes = Wishes(priority=last.priority, after=last.after, append=last.append)
    with _launcher(jobs, section) as launch:
        return _begin(jobs, (job, number + 1), section, wishes, launch)


def record_of(spec: RunSpec) -> JobRecord:
    """Return the job of a run: its id is the same whoever submits it, and on which cluster."""
    run = spec.model_dump(exclude={"cluster"})
    run_hash = content_hash(run)
    job = f"{spec.run.name[:_LONGEST_NAME]}-{run_hash[:_HASH_DIGITS]}"
    return JobRecord(id=job, name=spec.run.name, run_hash=run_hash, run=run, by=myself(), at=now())


def _begin(
    jobs: Jobs, named: tuple[str, int], cluster: ClusterSection, wishes: Wishes, launch: Launch
) -> dict[str, Any]:
    """Begin an attempt, (job, number): of those that found the same one to have ended before, one does."""
    job, number = named
    attempt = Attempt(
        number=number,
        cluster=cluster.model_dump(),
        priority=wishes.priority,
        after=wishes.after,
        append=wishes.append,
        by=myself(),
        at=now(),
    )
    if not jobs.start(job, attempt):
        # Somebody else was faster; theirs is driven.
        return _answer(jobs, job, "queued", began=False)
    try:
        launch(job, number)
    except TaskError as error:
        Report(jobs, job, number).end("failed", error.exit_code, {"message": str(error), "traceback": ""})
        raise
    return _answer(jobs, job, "queued", began=True)


def _answer(jobs: Jobs, job: str, state: str, *, began: bool) -> dict[str, Any]:
    return {"store": jobs.storage.url, "id": job, "state": state, "began": began}


def _refuse_another_run(jobs: Jobs, record: JobRecord) -> None:
    """Refuse a run whose id is another's; the part of its hash that the id has is then the same by chance."""
    stored = jobs.record(record.id)
    if stored.run_hash != record.run_hash:
        raise ContractError(
            f"{jobs.storage.url}/{JOBS_FOLDER}/{record.id}: is the job of another run. Choose another run.name."
        )


@contextmanager
def _launcher(jobs: Jobs, cluster: ClusterSection) -> Iterator[Launch]:
    """Give what starts a driver: where there is a scheduler a worker of it, else a process of this machine (ADR 0022)."""
    with Engine(cluster) as engine:
        if cluster.kind == "scheduler":
            # Connected now: nothing is written if nobody answers.
            client = engine.client
            yield lambda job, number: _hand_over(client, jobs, job, number)
        else:
            yield lambda job, number: _detach(jobs.storage.url, job, number)


def _hand_over(client: Client, jobs: Jobs, job: str, number: int) -> None:
    """Send an attempt to a scheduler, and wait until it has it: this process may end then."""
    key = send(client, jobs.storage.url, (job, number))
    deadline = time.monotonic() + _TAKEN_WITHIN_SECONDS
    while not any(client.sync(client.scheduler.get_task_status, keys=[key]).values()):
        if jobs.sight(job).begun is not None:
            return
        if time.monotonic() > deadline:
            raise TaskError(
                f"the scheduler does not take the job within {_TAKEN_WITHIN_SECONDS:.0f} s. Submit it again."
            )
        time.sleep(_POLL_SECONDS)


def _detach(store_url: str, job: str, number: int) -> None:
    """Start a process that outlives this one and its terminal."""
    subprocess.Popen(  # noqa: S603 - our own
        [sys.executable, "-m", "gradstore.stages.jobs", store_url, job, str(number)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
