"""Writer processes, as tests start, kill, stop and hear them."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
_PATIENCE_SECONDS = 120.0


class Writer:
    """A running `tests.faults.writer`; leaving it as a context ends the process.

    Attributes
    ----------
    committed
        Attempt of every block that the process has said to be committed.
    error
        Its last words, if it ended with an error: the kind and the message.
    """

    def __init__(self, url: str, *options: str, env: Mapping[str, str], heard: queue.Queue[int] | None = None) -> None:
        self.committed: dict[int, str] = {}
        self.error: dict[str, str] | None = None
        self._heard = heard
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.writer", url, *options],
            cwd=ROOT,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> bool:
        """Kill -9, and return whether the process was still at work."""
        self._process.kill()
        return self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Exit status, when it has ended and all that it said was heard."""
        status = self._process.wait(_PATIENCE_SECONDS)
        self._listener.join()
        return status

    def stop(self) -> bool:
        """Stop the process, wherever it is, and return whether it was still at work."""
        self._process.send_signal(signal.SIGSTOP)
        return self._process.poll() is None

    def wait_until_it_stops(self) -> None:
        """Wait until SIGSTOP has taken hold."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert self._process.poll() is None, f"it ended before it stopped: {self.error}"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def go_on(self) -> None:
        """Let a stopped process go on."""
        os.kill(self._process.pid, signal.SIGCONT)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._hear(json.loads(line))

    def _hear(self, said: dict[str, Any]) -> None:
        if "error" in said:
            self.error = said
            return
        self.committed[said["block"]] = said["attempt"]
        if self._heard is not None:
            self._heard.put(said["block"])


def resume(url: str, env: Mapping[str, str]) -> dict[int, str]:
    """Write what is missing in a fresh process; return the attempts of what it wrote."""
    with Writer(url, env=env) as writer:
        assert writer.wait() == 0, writer.error
        return writer.committed
