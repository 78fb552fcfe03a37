"""One function per kind of cluster: section of run.toml -> Dask client."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from gradstore.cluster.tasks import THREAD_VARIABLES
from gradstore.errors import SpecError, TaskError

if TYPE_CHECKING:
    from distributed import Client

    from gradstore.spec import ClusterSection

SCHEMES = ("tcp", "tls")
# Dask counts the deaths beyond the first.
ALLOWED_FAILURES = 3
# A batch frees and takes gigabytes of activations. Giving them back to the system each time doubled featurize's CPU
# seconds in page faults; glibc keeps them for the next batch instead.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def _local(section: ClusterSection, stack: ExitStack) -> Client:
    """Start an embedded cluster of processes on loopback that ends with this process."""
    import dask
    from distributed import Client, LocalCluster, WorkerPlugin

    # One compute thread a worker: bit-identical features, and BLAS pools that do not fight over cores. Spawned, because
    # the object store's runtime and torch hang after a fork.
    threads = dict.fromkeys(THREAD_VARIABLES, "1")
    settings: Mapping[str, Any] = {
        "distributed.nanny.pre-spawn-environ": {**threads, **_KEEP_FREED_MEMORY},
        "distributed.worker.multiprocessing-method": "spawn",
        "distributed.scheduler.allowed-failures": ALLOWED_FAILURES,
        # A death counts against every task that its worker holds, so it holds none but the one that it runs.
        "distributed.scheduler.worker-saturation": 1.0,
        # A worker is started again however often it dies. Dask gives up one that is away some time after a death, even
        # if it came back and has died again since.
        "distributed.deploy.lost-worker-timeout": "1 day",
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
    """Connect to a scheduler that is already running; it and its workers need gradstore installed."""
    from distributed import Client
    from distributed.utils import silence_logging_cmgr

    # What matters of a worker's end is told by the engine.
    stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
    address = section.address
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


def refuse_address(section: ClusterSection) -> None:
    """Refuse the address of a scheduler that anyone on a network could use, or that is none.

    Raises
    ------
    SpecError
        If it is neither on this machine nor encrypted.
    """
    if section.kind == "local":
        return
    address = section.address
    assert address is not None, "ClusterSection refuses a scheduler without an address"
    scheme = urlparse(address).scheme
    if scheme not in SCHEMES:
        raise SpecError(
            f"cluster.address: found {address!r}; accepted: tls://HOST:PORT, or on this machine tcp://HOST:PORT."
        )
    if scheme != "tls" and not _is_loopback(address):
        raise SpecError(
            f"cluster.address: {address} is not on this machine and not encrypted: anyone on its network could run code "
            f"there. Use tls:// and Dask's TLS settings."
        )


CLUSTERS: Mapping[str, Callable[[ClusterSection, ExitStack], Client]] = {"local": _local, "scheduler": _scheduler}


def _is_loopback(address: str) -> bool:
    host = urlparse(address).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
