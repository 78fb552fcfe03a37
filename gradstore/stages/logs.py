"""Structured logs: one JSON object a line on standard error, for what collects logs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Literal

from gradstore.errors import GradstoreError
from gradstore.stages.progress import PLAIN_INTERVAL_SECONDS, Course


class JsonLog:
    """Watches stages, and writes an object when one begins, once a minute, when it ends, and for every line that is told.

    Keys of each: ``time`` (UTC), ``level`` (info or error), ``run``, ``stage`` (or null), ``event`` (note, begin, progress,
    end, count or error), and ``fields``, which depend on the event.

    Parameters
    ----------
    run
        Name of the run.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._stage: str | None = None

    def note(self, text: str) -> None:
        """See `Watcher.note`."""
        self._write("note", {"text": text})

    def count(self, what: str, number: int) -> None:
        """See `Watcher.count`."""
        self._write("count", {what: number})

    @contextmanager
    def watching(self, course: Course) -> Iterator[Callable[[], None]]:
        """See `Watcher.watching`."""
        written = course.started

        def advanced() -> None:
            nonlocal written
            now = time.monotonic()
            if now - written >= PLAIN_INTERVAL_SECONDS:
                written = now
                self._write("progress", _fields(course))

        self._stage = course.label
        self._write("begin", _fields(course))
        try:
            yield advanced
            self._write("end", _fields(course))
        finally:
            self._stage = None

    @contextmanager
    def telling_errors(self) -> Iterator[None]:
        """Enter to have an error of gradstore's written, too, before it ends the command."""
        try:
            yield
        except GradstoreError as error:
            fields = {"kind": type(error).__name__, "text": str(error), "exit_code": error.exit_code}
            self._write("error", fields, level="error")
            raise

    def _write(self, event: str, fields: dict[str, Any], *, level: Literal["info", "error"] = "info") -> None:
        told = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "level": level,
            "run": self._run,
            "stage": self._stage,
            "event": event,
            "fields": fields,
        }
        sys.stderr.write(json.dumps(told) + "\n")
        sys.stderr.flush()


def _fields(course: Course) -> dict[str, Any]:
    return {
        "unit": course.unit,
        "done": course.done + course.finished,
        "total": course.total,
        "bytes_done": course.bytes_done(),
        "bytes_total": course.total_bytes,
        "seconds": course.seconds(),
        "seconds_left": course.seconds_left(),
    }
