"""The engine: starts the cluster of a run, submits a stage's tasks, and yields what finishes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

from gradstore.cluster.kinds import CLUSTERS, refuse_cluster
from gradstore.cluster.submission import Submission
from gradstore.cluster.tasks import RETRIES_TOPIC, Failed, Task
from gradstore.errors import TaskError

if TYPE_CHECKING:
    from distributed import Client, Future

    from gradstore.spec import ClusterSection

POLL_SECONDS = 0.02
# One worker that is started again may take long on a machine that is busy.
LOOK_SECONDS = 5.0
PATIENCE_SECONDS = 30.0
RESULT_SECONDS = 10.0


class Engine:
    """Runs tasks on the cluster of a run; the cluster starts with the first task, so finished stages cost nothing.

    Use as a context manager; closing it ends an embedded cluster and leaves a shared one alone.

    Parameters
    ----------
    section
        [cluster] of run.toml.
    announce
        Takes one line for who watches.
    priority
        Of its tasks among those of others on one scheduler: higher goes first.
    count
        Takes that something happened so many times: ``retries``, tasks that were begun again.

    Raises
    ------
    SpecError
        If the kind of cluster has no such options, or its scheduler is neither on this machine nor encrypted.
    """

    def __init__(
        self,
        section: ClusterSection,
        announce: Callable[[str], None] = lambda _: None,
        *,
        priority: int = 0,
        count: Callable[[str, int], None] = lambda _, __: None,
    ) -> None:
        refuse_cluster(section)
        self._section = section
        self._announce = announce
        self._priority = priority
        self._count = count
        self._stack = ExitStack()
        self._client: Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client = None
        self._stack.close()

    @property
    def client(self) -> Client:
        """The Dask client, connected on first use."""
        if self._client is None:
            self._client = CLUSTERS[self._section.kind](self._section, self._stack)
            workers = self._client.scheduler_info(n_workers=-1)["workers"]
            self._announce(f"{len(workers)} workers; dashboard {self._client.dashboard_link}")
        return self._client

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Submit all tasks as one graph and yield (task, result) as they finish.

        A task that fails is retried twice. One that takes the lives of its workers is replaced by smaller ones, if it has
        such: those are yielded then. The others go on, and only then is a failure raised. Leaving the iterator early, or
        stopping it, cancels what has not finished.

        Raises
        ------
        GradstoreError
            The error of a task, if it was one of gradstore's own.
        TaskError
            If a task failed otherwise, naming every task that did and every one that was not run for that.
        """
        if not tasks:
            return
        submission = Submission(self.client, tasks, self._priority)
        try:
            with self._counting_retries(submission):
                yield from self._finished(submission)
        finally:
            submission.release()
        submission.refuse_failed(local=self._section.kind == "local")

    @contextmanager
    def _counting_retries(self, submission: Submission) -> Iterator[None]:
        """Enter to be told of tasks that fail on their workers, most of which are tried again."""
        topic = f"{RETRIES_TOPIC}-{submission.run}"
        self.client.subscribe_topic(topic, lambda _: self._count("retries", 1))
        try:
            yield
        finally:
            if self.client.status == "running":
                self.client.unsubscribe_topic(topic)

    def _finished(self, submission: Submission) -> Iterator[tuple[Task, Any]]:
        """(task, result) as tasks finish."""
        from distributed import as_completed

        futures = as_completed(loop=self.client.loop)
        looked = seen = time.monotonic()
        while True:
            futures.update(submission.fresh)
            submission.fresh.clear()
            if futures.is_empty():
                return
            if futures.has_ready():
                future = next(futures)
                self._refuse_a_lost_scheduler(future)
                try:
                    outcome = _outcome(future)
                except TimeoutError:
                    # Its worker went away with the result: the task runs again, and finds its block committed.
                    futures.add(future)
                else:
                    yield from submission.settle(future, outcome)
                    continue
            time.sleep(POLL_SECONDS)
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                seen = self._look_for_workers(seen)

    def _refuse_a_lost_scheduler(self, future: Future) -> None:
        if future.status == "cancelled" and self.client.status != "running":
            raise TaskError(
                f"the scheduler at {self._section.address or self.client.scheduler.address} is gone. What was committed "
                "stays; the same command goes on from there once it has one."
            )

    def _look_for_workers(self, seen: float) -> float:
        """When a worker was seen last; if that is too long ago, say so, and on an embedded cluster give up."""
        now = time.monotonic()
        if self.client.nthreads():
            return now
        if now - seen < PATIENCE_SECONDS:
            return seen
        if self._section.kind == "local":
            raise TaskError(
                "no worker process is left, and none could be started again. What was committed stays; the same command "
                "goes on from there."
            )
        at = self._section.address or f"the {self._section.kind} cluster"
        self._announce(f"no worker is at {at}; waiting for one")
        return now


def _outcome(future: Future) -> Any:
    """Result of a finished task, or its error; TimeoutError where the result is not to be had now."""
    if future.status == "cancelled":
        return Failed(TaskError("it was cancelled"))
    if future.status == "error":
        return Failed(future.exception())
    try:
        return future.result(timeout=RESULT_SECONDS)
    except TimeoutError:
        raise
    except Exception as error:
        # It was finished, lost with its worker and run again, and then it failed.
        return Failed(error)
