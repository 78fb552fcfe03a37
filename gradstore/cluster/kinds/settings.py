"""What Dask is told, whoever starts its scheduler and workers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradstore.cluster.tasks import THREAD_VARIABLES

# Dask counts the deaths beyond the first.
ALLOWED_FAILURES = 3
SCHEDULER: Mapping[str, Any] = {
    "distributed.scheduler.allowed-failures": ALLOWED_FAILURES,
    # A death counts against every task that its worker holds, so it holds none but the one that it runs.
    "distributed.scheduler.worker-saturation": 1.0,
}
WORKER: Mapping[str, Any] = {
    # The object store's runtime and torch hang after a fork.
    "distributed.worker.multiprocessing-method": "spawn",
    "distributed.worker.daemon": True,
    # Tasks hand over names and numbers, so there is nothing to spill; a pause would only wait for memory that the
    # process keeps for its next batch. Above the limit a worker ends, and its task is tried again.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 1.0,
}
# One compute thread a worker: bit-identical features, and BLAS pools that do not fight over cores. A batch frees and takes
# gigabytes of activations: giving them back to the system each time doubled featurize's CPU seconds in page faults; glibc
# keeps them for the next batch instead.
PROCESS: Mapping[str, str] = {
    **dict.fromkeys(THREAD_VARIABLES, "1"),
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}


def variables() -> dict[str, str]:
    """Return the environment by which a worker that is started elsewhere has these settings."""
    settings = {_variable(key): str(value) for key, value in WORKER.items()}
    # A nanny gives its worker variables of its own, over those that it has itself.
    nanny = {"DASK_DISTRIBUTED__NANNY__PRE_SPAWN_ENVIRON": repr(dict(PROCESS))}
    return {**settings, **nanny, **PROCESS}


def _variable(key: str) -> str:
    return "DASK_" + key.upper().replace("-", "_").replace(".", "__")
