"""Where tasks run: one function per kind of cluster, and the engine that sends a stage's tasks there.

Arguments and results of tasks are names and numbers, never arrays: a task reads from the store and ends in commit
records, so losing a worker, the scheduler or this process loses no committed work.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlparse
from uuid import uuid4

from gradstore.errors import GradstoreError, IntegrityError, ObjectMissingError, SpecError, StorageError, TaskError

if TYPE_CHECKING:
    from distributed import Client

    from gradstore.spec import ClusterSection

# A transient fault deserves another try, a deterministic one should not cost many (architecture.md, engine).
RETRIES = 2
POLL_SECONDS = 0.02
PATIENCE_SECONDS = 30.0
RESULT_SECONDS = 10.0
ALLOWED_WORKER_DEATHS = 4
# A batch frees and takes gigabytes of activations. Giving them back to the system each time doubled featurize's CPU
# seconds in page faults; glibc keeps them for the next batch instead.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One unit of work: what to call, with which names and numbers, and how many rows it stands for."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    rows: int = 1


class Engine:
    """Runs tasks on the cluster of a run; the cluster starts with the first task, so finished stages cost nothing.

    Use as a context manager; closing it ends an embedded cluster and leaves a shared one alone.
    """

    def __init__(self, section: ClusterSection, announce: Callable[[str], None] = lambda _: None) -> None:
        self._section = section
        self._announce = announce
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
        """Submit all tasks at once and yield (task, result) as they finish.

        A task that fails is retried twice; the others go on, and only then is the failure raised.

        Raises
        ------
        GradstoreError
            The error of a task, if it was one of gradstore's own.
        TaskError
            If a task failed otherwise, naming every task that did.
        """
        if not tasks:
            return
        from distributed import as_completed

        # Keys are global to a scheduler, and other runs may share it.
        run = uuid4().hex
        by_key = {f"{task.name}-{run}": task for task in tasks}
        futures = [
            self.client.submit(_attempt, task.function, *task.arguments, key=key, pure=False, retries=RETRIES)
            for key, task in by_key.items()
        ]
        failed: dict[str, BaseException] = {}
        for key, outcome in self._as_they_finish(as_completed(futures)):
            task = by_key[key]
            if isinstance(outcome, _Failed):
                failed[task.name] = outcome.error
            else:
                yield task, outcome
        if failed:
            raise _failure(failed)

    def _as_they_finish(self, futures: Any) -> Iterator[tuple[str, Any]]:
        """(key, outcome) as tasks finish; where no worker is left, say so, and give up on an embedded cluster."""
        alone_since = last_told = time.monotonic()
        while not futures.is_empty():
            if futures.has_ready():
                future = next(futures)
                try:
                    outcome = _outcome(future)
                except TimeoutError:
                    # Its worker went away with the result: the task runs again, and finds its block committed.
                    futures.add(future)
                else:
                    yield future.key, outcome
                    alone_since = time.monotonic()
                    continue
            time.sleep(POLL_SECONDS)
            if time.monotonic() - max(alone_since, last_told) < PATIENCE_SECONDS:
                continue
            last_told = time.monotonic()
            if self.client.nthreads():
                alone_since = last_told
            elif self._section.kind == "local":
                raise TaskError(
                    "no worker process is left, and none could be started again. What was committed stays; the same "
                    "command goes on from there."
                )
            else:
                self._announce(f"no worker is left at {self._section.address}; waiting for one")


@dataclass(frozen=True, slots=True)
class _Failed:
    """The error of a task. A worker returns gradstore's own instead of raising it: trying again would find the same."""

    error: BaseException


def _outcome(future: Any) -> Any:
    """Result of a finished task, or its error; TimeoutError where the result is not to be had now."""
    if future.status == "error":
        return _Failed(future.exception())
    if future.status == "cancelled":
        return _Failed(TaskError("it was cancelled"))
    return future.result(timeout=RESULT_SECONDS)


def _attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a task on a worker. Storage may answer the next time; gradstore's other errors are not worth a retry."""
    try:
        return function(*arguments)
    except (IntegrityError, ObjectMissingError) as error:
        return _Failed(error)
    except StorageError:
        raise
    except GradstoreError as error:
        return _Failed(error)


def _local(section: ClusterSection, stack: ExitStack) -> Client:
    """Start an embedded cluster of processes on loopback that ends with this process."""
    import dask
    from distributed import Client, LocalCluster, WorkerPlugin

    # One compute thread a worker: bit-identical features, and BLAS pools that do not fight over cores. Spawned, because
    # the object store's runtime and torch hang after a fork.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    settings: Mapping[str, Any] = {
        "distributed.nanny.pre-spawn-environ": {**threads, **_KEEP_FREED_MEMORY},
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.scheduler.allowed-failures": ALLOWED_WORKER_DEATHS,
        "distributed.worker.daemon": True,
        # Tasks hand over names and numbers, so there is nothing to spill; a pause would only wait for memory that the
        # process keeps for its next batch. Above the limit a worker ends, and its task is tried again.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": 1.0,
    }
    stack.enter_context(dask.config.set(settings))
    cluster = stack.enter_context(
        LocalCluster(
            n_workers=section.num_workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=section.worker_memory_bytes,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )
    )
    client: Client = stack.enter_context(Client(cluster))

    class IgnoreInterrupts(WorkerPlugin):  # type: ignore[misc]
        def setup(self, worker: object) -> None:
            """Leave Ctrl-C, which a terminal sends to every process, to the command, which ends its workers."""
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    client.register_plugin(IgnoreInterrupts())
    return client


def _scheduler(section: ClusterSection, stack: ExitStack) -> Client:
    """Connect to a scheduler that is already running; its workers need gradstore installed."""
    from distributed import Client

    address = section.address
    assert address is not None, "ClusterSection refuses a scheduler without an address"
    if urlparse(address).scheme != "tls" and not _is_loopback(address):
        raise SpecError(
            f"cluster.address: {address} is not on this machine and not encrypted: anyone on its network could run code "
            f"there. Use tls:// and Dask's TLS settings."
        )
    try:
        client: Client = stack.enter_context(Client(address, timeout="30s"))
    except (OSError, TimeoutError) as error:
        raise TaskError(f"cluster.address: no scheduler answers at {address}: {error}") from error
    threads = client.nthreads()
    if not threads:
        raise TaskError(f"cluster.address: the scheduler at {address} has no workers. Start some, then run again.")
    for worker, count in threads.items():
        if count != 1:
            # A model's hooks belong to one pass at a time.
            raise SpecError(
                f"cluster.address: worker {worker} has {count} threads; accepted: 1. Start workers with --nthreads 1, "
                "several per machine."
            )
    return client


CLUSTERS: Mapping[str, Callable[[ClusterSection, ExitStack], Client]] = {"local": _local, "scheduler": _scheduler}


def _is_loopback(address: str) -> bool:
    host = urlparse(address).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _failure(failed: Mapping[str, BaseException]) -> GradstoreError:
    """What to raise: a task's own error before others, with the names of all tasks that failed."""
    own = [(name, error) for name, error in failed.items() if isinstance(error, GradstoreError)]
    name, error = own[0] if own else next(iter(failed.items()))
    others = f" ({len(failed) - 1} more tasks failed: {_some(failed, but=name)})" if len(failed) > 1 else ""
    committed = "Everything else was committed; the same command goes on from there."
    if own:
        return type(own[0][1])(f"{name}: {error}{others}")
    if type(error).__name__ == "KilledWorker":
        return TaskError(
            f"{name}: its worker died {ALLOWED_WORKER_DEATHS} times, most likely out of memory{others}. {committed} Lower "
            "features.token_budget or features.block_rows, or raise cluster.memory_per_worker."
        )
    return TaskError(f"{name}: {type(error).__name__}: {error}{others}. {committed}")


def _some(failed: Mapping[str, BaseException], *, but: str, most: int = 5) -> str:
    names = sorted(name for name in failed if name != but)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
