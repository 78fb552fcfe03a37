"""Metrics of the stages of a command, in Prometheus' text format: in a file, or from a port of the loopback.

The format is a few lines of text (https://prometheus.io/docs/instrumenting/exposition_formats), so no client library is
needed for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from gradstore.errors import SpecError, StorageError
from gradstore.stages.output import replacing
from gradstore.stages.progress import Course

WRITE_INTERVAL_SECONDS: Final = 5.0
_KINDS: Final = {
    "gradstore_stage_units": ("gauge", "Rows, groups or blocks that are done, those of earlier calls too."),
    "gradstore_stage_expected_units": ("gauge", "Rows, groups or blocks that the stage has in all."),
    "gradstore_stage_bytes": ("gauge", "Bytes of what is done."),
    "gradstore_stage_seconds": ("gauge", "Seconds since this call began the stage, or that it took."),
    "gradstore_stage_computed_units_total": ("counter", "Rows, groups or blocks that this call has done."),
    "gradstore_invalid_rows_total": ("counter", "Rows whose output or gradient is not finite."),
    "gradstore_retries_total": ("counter", "Tasks that failed on a worker in a way that may pass."),
}


@dataclass(slots=True, kw_only=True)
class _Stage:
    course: Course
    # None while it goes on.
    seconds: float | None = None


class Metrics:
    """Watches stages, and tells their numbers as text.

    Parameters
    ----------
    run
        Name of the run, a label of every metric.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._stages: dict[str, _Stage] = {}
        self._counts = {"invalid_rows": 0, "retries": 0}

    def note(self, text: str) -> None:
        """See `Watcher.note`; a line has no number."""

    def count(self, what: str, number: int) -> None:
        """See `Watcher.count`."""
        with self._lock:
            self._counts[what] += number

    @contextmanager
    def watching(self, course: Course) -> Iterator[Callable[[], None]]:
        """See `Watcher.watching`."""
        stage = _Stage(course=course)
        with self._lock:
            self._stages[course.label] = stage
        try:
            yield lambda: None
        finally:
            stage.seconds = course.seconds()

    def text(self) -> str:
        """Return all metrics as they are now."""
        samples: dict[str, list[str]] = {name: [] for name in _KINDS}

        def add(name: str, value: float, labels: Mapping[str, str]) -> None:
            told = ",".join(f'{key}="{_escaped(label)}"' for key, label in {"run": self._run, **labels}.items())
            samples[name].append(f"{name}{{{told}}} {value!r}")

        with self._lock:
            for label, stage in self._stages.items():
                course, labels = stage.course, {"stage": label, "unit": stage.course.unit}
                add("gradstore_stage_units", course.done + course.finished, labels)
                add("gradstore_stage_expected_units", course.total, labels)
                add("gradstore_stage_computed_units_total", course.finished, labels)
                add("gradstore_stage_bytes", course.bytes_done(), {"stage": label})
                seconds = course.seconds() if stage.seconds is None else stage.seconds
                add("gradstore_stage_seconds", seconds, {"stage": label})
            for what, number in self._counts.items():
                add(f"gradstore_{what}_total", number, {})
        lines = []
        for name, (kind, help_text) in _KINDS.items():
            if samples[name]:
                lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *samples[name]]
        return "\n".join(lines) + "\n"


@contextmanager
def in_file(metrics: Metrics, path: Path) -> Iterator[None]:
    """Enter with a file that is replaced by the metrics every few seconds, and once more at the end.

    Raises
    ------
    StorageError
        If it cannot be written at first; later a disk that is full does not end the run.
    """
    _write(metrics, path)
    ended = threading.Event()

    def keep_writing() -> None:
        while not ended.wait(WRITE_INTERVAL_SECONDS):
            with suppress(StorageError):
                _write(metrics, path)

    thread = threading.Thread(target=keep_writing, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(StorageError):
            _write(metrics, path)


@contextmanager
def on_port(metrics: Metrics, port: int) -> Iterator[int]:
    """Enter with a server of the metrics on the loopback; yields its port, which with 0 is one that is free.

    Raises
    ------
    SpecError
        If the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer with the metrics."""
            if self.path != "/metrics":
                self.send_error(404)
                return
            body = metrics.text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing of requests."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise SpecError(
            f"--metrics-port: found {port}, which cannot be listened on: {error}. Choose another."
        ) from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _write(metrics: Metrics, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(metrics.text(), encoding="utf-8")


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
