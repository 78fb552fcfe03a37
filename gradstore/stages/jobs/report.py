"""What the driver of a job tells the store: events, heartbeats, and how the attempt ended."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

from gradstore.errors import StorageError
from gradstore.stages.progress import Course, Lines
from gradstore.store.jobs import Jobs

HEARTBEAT_SECONDS = 5.0


def now() -> str:
    """Return this machine's time, for people to read: no decision hangs on it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def myself() -> str:
    """Return who this process belongs to, and on which machine."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        # Containers run under numbers that no table of users names.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


class Report:
    """Tells the store of one attempt, and hears from it whether the attempt is to stop.

    It watches the progress of stages. While it is `beating`, a thread publishes heartbeats; where somebody has cancelled the
    attempt, or another one has taken its place, the process is interrupted as by Ctrl-C.

    Attributes
    ----------
    phase
        ``waiting`` for another job, or ``running``.
    stop
        Why the process was interrupted: ``cancelled`` or ``superseded``; None before.
    """

    def __init__(self, jobs: Jobs, job: str, attempt: int) -> None:
        self._jobs, self._job, self._attempt = jobs, job, attempt
        self._started = time.monotonic()
        self._events = 0
        self._lines = Lines(self.write)
        self._course: Course | None = None
        self._stages: list[dict[str, Any]] = []
        self._counts: dict[str, int] = {}
        self.phase = "running"
        self.stop: str | None = None

    def begin(self) -> bool:
        """Say that the attempt has begun; False if somebody else has."""
        return self._add({"kind": "begun", "text": f"begun by {myself()}, process {os.getpid()}"})

    def write(self, text: str) -> None:
        """Publish one line."""
        self._add({"kind": "line", "text": text})

    def note(self, text: str) -> None:
        """See `Watcher.note`."""
        self._lines.note(text)

    def count(self, what: str, number: int) -> None:
        """See `Watcher.count`."""
        self._counts[what] = self._counts.get(what, 0) + number

    @contextmanager
    def watching(self, course: Course) -> Iterator[Callable[[], None]]:
        """See `Watcher.watching`."""
        with self._lines.watching(course) as advanced:
            self._course = course
            try:
                yield advanced
            finally:
                self._course = None
                self._stages.append({**_position(course), "seconds": course.seconds()})

    def end(self, state: str, exit_code: int, error: Mapping[str, str] | None = None) -> None:
        """Say how the attempt ended."""
        told = {
            "state": state,
            "exit_code": exit_code,
            "at": now(),
            "seconds": time.monotonic() - self._started,
            "stages": self._stages,
            "counts": self._counts,
            "error": None if error is None else dict(error),
        }
        self._jobs.end(self._job, self._attempt, told)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Enter with a thread that publishes heartbeats."""
        ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _beat(self, ended: threading.Event) -> None:
        number = 0
        while True:
            # A storage that does not answer may the next time; if it does not, readers see a job that is lost.
            with suppress(StorageError):
                self._jobs.beat(self._job, self._attempt, number, self._state())
                number += 1
                if self.stop is None and (reason := self._reason_to_stop()) is not None:
                    self.stop = reason
                    os.kill(os.getpid(), signal.SIGINT)
            if ended.wait(HEARTBEAT_SECONDS):
                return

    def _reason_to_stop(self) -> str | None:
        if self._jobs.has_attempt(self._job, self._attempt + 1):
            return "superseded"
        return "cancelled" if self._jobs.is_cancelled(self._job, self._attempt) else None

    def _state(self) -> dict[str, Any]:
        course = self._course
        return {
            "at": now(),
            "phase": self.phase,
            "seconds": time.monotonic() - self._started,
            "stages": len(self._stages),
            "counts": dict(self._counts),
            "progress": None if course is None else _position(course) | _rate(course),
        }

    def _add(self, event: Mapping[str, Any]) -> bool:
        added = self._jobs.add_event(self._job, self._attempt, self._events, {"at": now(), **event})
        self._events += 1
        return added


def _position(course: Course) -> dict[str, Any]:
    return {
        "stage": course.label,
        "unit": course.unit,
        "done": course.done + course.finished,
        "total": course.total,
        "bytes_done": course.bytes_done(),
        "bytes_total": course.total_bytes,
    }


def _rate(course: Course) -> dict[str, Any]:
    return {"per_second": course.units_per_second(), "seconds_left": course.seconds_left()}
