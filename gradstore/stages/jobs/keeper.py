"""The task by which a worker of a cluster drives a job: it keeps a process, and if the worker dies another takes over."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from gradstore.errors import TaskError
from gradstore.stages.jobs.report import Report, myself, now
from gradstore.store.backend import open_storage
from gradstore.store.jobs import Jobs

if TYPE_CHECKING:
    from distributed import Client

# Before the tasks of all jobs: one that drives soon lets its worker go on with these.
PRIORITY = 1_000_000
RETRIES = 2
# What a driver ends with where another process had begun its attempt before.
BEGUN_BY_ANOTHER = 75
_MOST_TOLD = 2000


def send(client: Client, store_url: str, attempt: tuple[str, int]) -> str:
    """Hand an attempt, (job, number), to the workers of a scheduler, which go on without this client; return the task's key."""
    from distributed import fire_and_forget

    job, number = attempt
    # Keys are global to a scheduler, which may serve several stores.
    key = f"gradstore-job-{blake2b(store_url.encode(), digest_size=6).hexdigest()}-{job}-{number}"
    future = client.submit(keep, store_url, job, number, key=key, pure=False, priority=PRIORITY, retries=RETRIES)
    fire_and_forget(future)
    return key


def keep(store_url: str, job: str, number: int) -> None:
    """Task: keep the process that drives an attempt; where its worker died before, hand the next one to the workers.

    It holds no thread of the worker: tasks go on beside it. The next attempt is a task of its own, so that deaths do not add
    up until Dask gives it up.
    """
    from distributed import get_client, get_worker, secede

    secede()
    jobs = Jobs(open_storage(store_url, copies=False))
    sight = jobs.sight(job)
    if sight.ended or sight.cancelled:
        return
    if sight.attempt == number and sight.begun is None:
        if _keep_process(jobs, job, number, get_worker().scheduler.address):
            return
        sight = jobs.sight(job)
        if sight.ended or sight.cancelled:
            return
    if sight.attempt == number:
        # This task has run before, and its worker died with the process, or dies while that was starting.
        jobs.start(job, replace(jobs.attempt(job, number), number=number + 1, by=myself(), at=now()))
    elif sight.attempt > number + 1 or sight.begun is not None:
        return
    # Also where a worker died between the two: sent again, it is the same task.
    send(get_client(), store_url, (job, number + 1))


def _keep_process(jobs: Jobs, job: str, number: int, scheduler: str) -> bool:
    """Keep the process that drives an attempt until it ends; False if another process had begun the attempt before."""
    command = [sys.executable, "-m", "gradstore.stages.jobs", jobs.storage.url, job, str(number), scheduler]
    # Its standard input closes with this process, however that ends.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # noqa: S603 - our own
        assert process.stderr is not None, "it is a pipe"
        said = process.stderr.read().decode(errors="replace")
        code = process.wait()
    if code not in (0, BEGUN_BY_ANOTHER):
        error = TaskError(
            f"the process that drives the job ended with {code} on {myself()}, most likely out of memory. `gradstore jobs "
            "resume` goes on from there."
        )
        told = {"message": str(error), "traceback": said[-_MOST_TOLD:]}
        Report(jobs, job, number).end("failed", error.exit_code, told)
    return code != BEGUN_BY_ANOTHER
