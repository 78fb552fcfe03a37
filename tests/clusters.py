"""Schedulers and workers that tests start for themselves, each a process of its own, and what befalls them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import dask
import yaml
from distributed import Client

STARTS_WITHIN_SECONDS = 120.0
LOOPBACK = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")


class SeparateCluster:
    """A `dask scheduler` and `dask worker` processes on the loopback; leaving it as a context ends them.

    Its workers are started as people start them by hand: without a nanny, and with threads to spare for linear algebra.

    Parameters
    ----------
    folder
        Where it keeps its logs and what workers write beside.
    workers
        How many workers it starts with.
    env
        Variables that workers need beside those of this process.
    options
        More of the command line of a worker.

    Attributes
    ----------
    address
        Of the scheduler.
    """

    def __init__(
        self, folder: Path, workers: int, env: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> None:
        self._folder = folder
        self._env = {**os.environ, "OMP_NUM_THREADS": "2", **(env or {})}
        self._options = options
        self._wanted = workers
        self._started = 0
        self._workers: dict[str, subprocess.Popen[bytes]] = {}
        self.address = ""

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / "scheduler.json"
        self._scheduler = self._start("scheduler", *LOOPBACK, "--port", "0", "--scheduler-file", str(file))
        try:
            self.address = self._wait_for_address(file)
            for _ in range(self._wanted):
                self.start_worker()
            with Client(self.address) as client:
                client.wait_for_workers(self._wanted, timeout=STARTS_WITHIN_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for process in [*self._workers.values(), self._scheduler]:
            process.kill()
            process.wait()

    def start_worker(self, *more: str) -> None:
        """Start one more, with more of its command line than the others."""
        self._started += 1
        name = f"worker-{self._started}"
        options = ("--nthreads", "1", "--no-nanny", "--name", name, *self._options, *more)
        self._workers[name] = self._start("worker", self.address, *LOOPBACK, *options, log=name)

    def kill_worker(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Kill one, at once or so that it may leave first, and start another as a supervisor would."""
        process = self._workers.pop(name)
        process.send_signal(how)
        assert process.wait() == (-how if how is signal.SIGKILL else 0)
        self.start_worker()

    def at_work(self, client: Client) -> list[str]:
        """Names of the workers that live and that the scheduler knows."""
        known = client.scheduler_info(n_workers=-1)["workers"].values()
        return sorted(worker["name"] for worker in known if worker["name"] in self._workers)

    def kill_scheduler(self) -> None:
        self._scheduler.kill()
        self._scheduler.wait()

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def _wait_for_address(self, file: Path) -> str:
        deadline = time.monotonic() + STARTS_WITHIN_SECONDS
        while True:
            # It may be there and not yet written.
            with suppress(FileNotFoundError, json.JSONDecodeError):
                return str(json.loads(file.read_text())["address"])
            assert self._scheduler.poll() is None, self.log("scheduler")
            assert time.monotonic() < deadline, self.log("scheduler")
            time.sleep(0.05)

    def _start(self, what: str, *options: str, log: str | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *options]
        # In a folder of their own, as on another machine: nothing may hang on where the command runs.
        with (self._folder / f"{log or what}.log").open("wb") as output:
            return subprocess.Popen(command, cwd=self._folder, env=self._env, stdout=output, stderr=output)


@contextmanager
def with_certificates(folder: Path) -> Iterator[None]:
    """Enter with Dask's settings as a process has them whose DASK_CONFIG names those that were made in a folder."""
    comm = yaml.safe_load((folder / "dask.yaml").read_text())["distributed"]["comm"]
    tls = comm.pop("tls")
    flat = {f"distributed.comm.{key}": value for key, value in comm.items()}
    with dask.config.set({**flat, **{f"distributed.comm.tls.{key}": value for key, value in tls.items()}}):
        yield


@contextmanager
def restless(
    cluster: SeparateCluster,
    choice: random.Random,
    kills: int,
    committed: Callable[[], int],
    how: signal.Signals = signal.SIGKILL,
) -> Iterator[Callable[[], int]]:
    """Kill a worker of a cluster at random, again and again, while entered; yields what tells how many were killed.

    Between two deaths something is committed, else the work would go on for ever, and a random time passes.
    """
    stopped = threading.Event()
    killed = 0

    def kill_on() -> None:
        nonlocal killed
        last = committed()
        with Client(cluster.address, set_as_default=False) as client:
            while killed < kills and not stopped.wait(0.05):
                if committed() == last:
                    continue
                stopped.wait(choice.uniform(0, 0.5))
                if at_work := cluster.at_work(client):
                    cluster.kill_worker(choice.choice(at_work), how)
                    killed += 1
                    last = committed()

    thread = threading.Thread(target=kill_on)
    thread.start()
    try:
        yield lambda: killed
    finally:
        stopped.set()
        thread.join()
