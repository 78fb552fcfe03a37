"""The driver of a job: a process that runs its stages one after another, and keeps nothing that is not in the store.

So being run again is going on, and whoever drives is soon replaced.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from functools import partial

from gradstore.cluster import Engine
from gradstore.errors import GradstoreError, NotReadyError, StoppedError
from gradstore.spec import RunSpec
from gradstore.stages.featurize import featurize
from gradstore.stages.jobs.keeper import BEGUN_BY_ANOTHER
from gradstore.stages.jobs.report import Report
from gradstore.stages.jobs.states import state_of
from gradstore.stages.progress import Progress
from gradstore.stages.run import Stage, stages_of
from gradstore.store.backend import open_storage
from gradstore.store.jobs import Attempt, JobRecord, Jobs

LOOK_SECONDS = 5.0


def main() -> None:
    """Drive the attempt that the command line names: STORE ID NUMBER, and for who keeps it on a cluster the scheduler."""
    store_url, job, number, *scheduler = sys.argv[1:]
    # Who started this process may have it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if scheduler:
        threading.Thread(target=_end_with_the_keeper, daemon=True).start()
        _use_certificates_of_the_worker()
    if not drive(store_url, job, int(number), scheduler=scheduler[0] if scheduler else None):
        sys.exit(BEGUN_BY_ANOTHER)


def drive(store_url: str, job: str, number: int, *, scheduler: str | None = None) -> bool:
    """Drive an attempt at a job to its end and write down how it ended; False if somebody else had begun it before.

    Parameters
    ----------
    store_url, job, number
        The attempt.
    scheduler
        Where its tasks run, as the machine of this process reaches it; by default as the attempt says.
    """
    jobs = Jobs(open_storage(store_url, copies=False))
    record, attempt = jobs.record(job), jobs.attempt(job, number)
    report = Report(jobs, job, number)
    if not report.begin():
        return False
    with report.beating():
        try:
            try:
                _run(jobs, record, attempt, scheduler, report)
            except KeyboardInterrupt:
                if report.stop == "superseded":
                    return True
                raise StoppedError("cancelled. What was committed stays.") from None
        except StoppedError as error:
            report.end("cancelled", error.exit_code)
        except Exception as error:
            code = error.exit_code if isinstance(error, GradstoreError) else GradstoreError.exit_code
            told = str(error) if isinstance(error, GradstoreError) else f"{type(error).__name__}: {error}"
            report.write(f"error: {told}")
            report.end("failed", code, {"message": told, "traceback": traceback.format_exc()})
        else:
            report.write("done")
            report.end("done", 0)
    return True


def _run(jobs: Jobs, record: JobRecord, attempt: Attempt, scheduler: str | None, report: Report) -> None:
    if attempt.after is not None:
        report.phase = "waiting"
        _wait_for(jobs, attempt.after, report)
        report.phase = "running"
    spec = RunSpec.model_validate({**record.run, "cluster": attempt.cluster})
    if scheduler is not None:
        spec = spec.model_copy(update={"cluster": spec.cluster.at(scheduler)})
    progress = Progress(watchers=[report])
    stages: tuple[Stage, ...] = (partial(featurize, append=attempt.append), *stages_of(spec)[1:])
    with Engine(spec.cluster, progress.note, priority=attempt.priority, count=progress.count) as engine:
        for stage in stages:
            stage(spec, engine, progress)


def _wait_for(jobs: Jobs, other: str, report: Report) -> None:
    """Wait until another job is done.

    Raises
    ------
    NotReadyError
        If it failed or was cancelled.
    """
    report.write(f"waiting for the job {other}")
    while (state := state_of(jobs, other)[0]) != "done":
        if state in ("failed", "cancelled"):
            raise NotReadyError(
                f"the job {other}, which has to be done before, {'failed' if state == 'failed' else 'was cancelled'}. Resume "
                "it, then this one."
            )
        time.sleep(LOOK_SECONDS)


def _end_with_the_keeper() -> None:
    """End this process when the worker that keeps it is gone: another drives on."""
    # Unbuffered: a thread in the midst of a buffered read aborts the process when it ends by itself.
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _use_certificates_of_the_worker() -> None:
    """Show the scheduler the certificate that this machine has, which is a worker's."""
    import dask

    if own := dask.config.get("distributed.comm.tls.worker", None):
        dask.config.set({"distributed.comm.tls.client": own})
