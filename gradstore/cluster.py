"""Where tasks run: one function per kind of cluster, and the engine that sends a stage's tasks there.

Arguments and results of tasks are names and numbers, never arrays: a task reads from the store and ends in commit
records, so losing a worker, the scheduler or this process loses no committed work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlparse

from gradstore.errors import GradstoreError, SpecError, TaskError

if TYPE_CHECKING:
    from distributed import Client

    from gradstore.spec import ClusterSection

# A transient fault deserves another try, a deterministic one should not cost many (architecture.md, engine).
RETRIES = 2
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

        by_key = {}
        futures = []
        for task in tasks:
            future = self.client.submit(task.function, *task.arguments, pure=False, retries=RETRIES, key=task.name)
            by_key[future.key] = task
            futures.append(future)
        failed: dict[str, BaseException] = {}
        for future in as_completed(futures):
            task = by_key[future.key]
            if future.status == "error":
                failed[task.name] = future.exception()
            elif future.status == "cancelled":
                failed[task.name] = TaskError("was cancelled")
            else:
                yield task, future.result()
        if failed:
            raise _failure(failed)


def _local(section: ClusterSection, stack: ExitStack) -> Client:
    """Start an embedded cluster of processes on loopback that ends with this process."""
    import dask
    from distributed import Client, LocalCluster

    # One compute thread a worker: bit-identical features, and BLAS pools that do not fight over cores. Spawned, because
    # the object store's runtime and torch hang after a fork.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    settings: Mapping[str, Any] = {
        "distributed.nanny.pre-spawn-environ": {**threads, **_KEEP_FREED_MEMORY},
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.scheduler.allowed-failures": ALLOWED_WORKER_DEATHS,
        "distributed.worker.daemon": True,
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
            silence_logs=logging.ERROR,
        )
    )
    client: Client = stack.enter_context(Client(cluster))
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
    return client


CLUSTERS: Mapping[str, Callable[[ClusterSection, ExitStack], Client]] = {"local": _local, "scheduler": _scheduler}


def _is_loopback(address: str) -> bool:
    host = urlparse(address).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _failure(failed: Mapping[str, BaseException]) -> GradstoreError:
    names = ", ".join(sorted(failed))
    first = next(iter(failed.values()))
    if isinstance(first, GradstoreError):
        return first
    if type(first).__name__ == "KilledWorker":
        return TaskError(
            f"{names}: the worker died {ALLOWED_WORKER_DEATHS} times, most likely out of memory. Everything else was "
            f"committed. Lower features.token_budget or features.block_rows, or raise cluster.memory_per_worker."
        )
    return TaskError(
        f"{names}: {type(first).__name__}: {first}. Everything else was committed; the same command resumes."
    )
