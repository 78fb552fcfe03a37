"""Tasks that workers find by name: what they leave is a file each, and some fail or take their worker's life."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gradstore.errors import DataError, ObjectMissingError, StorageError

ROW_BYTES = 100 * 2**20


def leave(folder: str, name: str, *, needs: Sequence[str] = ()) -> str:
    """Write a file, after those that it needs."""
    missing = [other for other in needs if not (Path(folder) / other).exists()]
    assert not missing, f"{name}: ran before {missing}"
    (Path(folder) / name).touch()
    return name


def leave_after(folder: str, name: str, *needs: str) -> str:
    return leave(folder, name, needs=needs)


def leave_late(folder: str, name: str, seconds: float) -> str:
    """Write a file, some time after another that tells of the beginning."""
    (Path(folder) / f"{name} begun").touch()
    time.sleep(seconds)
    return leave(folder, name)


def fail_until(folder: str, name: str, times: int) -> int:
    """Fail some times as storage does; return how often it was called."""
    calls = len(list(Path(folder).glob(f"{name} *"))) + 1
    (Path(folder) / f"{name} {calls}").touch()
    if calls <= times:
        raise StorageError(f"{name}: call {calls}")
    return calls


def refuse(kind: str) -> None:
    """Raise an error: one of the data, of an object that is not there, or one of a mistake."""
    errors = {
        "data": DataError("no good"),
        "missing": ObjectMissingError("not there"),
        "other": ValueError("a mistake"),
    }
    raise errors[kind]


def hold(folder: str, first: int, last: int) -> int:
    """Hold as much memory as some rows take, for a while, and leave a file for each; return how many."""
    import numpy as np

    held = np.ones((last - first) * ROW_BYTES, np.uint8)
    time.sleep(2)
    for row in range(first, last):
        leave(folder, f"row {row}")
    return len(held) // ROW_BYTES


def die(folder: str, name: str, times: int) -> str:
    """Kill this process some times; then leave a file."""
    deaths = len(list(Path(folder).glob(f"{name} died *")))
    if deaths < times:
        (Path(folder) / f"{name} died {deaths}").touch()
        # A nanny takes a worker that dies at once for one that cannot be started.
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return leave(folder, name)


def threads() -> dict[str, list[int]]:
    """Threads of computation that the libraries use which were loaded before, and of torch, which this task may load."""
    from threadpoolctl import threadpool_info

    before = [library["num_threads"] for library in threadpool_info()]
    assert "numpy" in sys.modules
    import torch

    return {
        "before": before,
        "after": [library["num_threads"] for library in threadpool_info()] + [torch.get_num_threads()],
    }
