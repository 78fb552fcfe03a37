"""Worker processes of this command, on this machine."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from gradstore.cluster.kinds.settings import PROCESS, SCHEDULER, WORKER

if TYPE_CHECKING:
    from distributed import Client

    from gradstore.spec import ClusterSection


def on_this_machine(section: ClusterSection, stack: ExitStack) -> Client:
    """Start an embedded cluster of processes on loopback that ends with this process."""
    import dask
    from distributed import Client, LocalCluster, WorkerPlugin

    settings: Mapping[str, Any] = {
        **SCHEDULER,
        **WORKER,
        "distributed.nanny.pre-spawn-environ": dict(PROCESS),
        # The user's settings for TLS are for schedulers that a network reaches.
        "distributed.comm.require-encryption": False,
        # A worker is started again however often it dies. Dask gives up one that is away some time after a death, even
        # if it came back and has died again since.
        "distributed.deploy.lost-worker-timeout": "1 day",
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
