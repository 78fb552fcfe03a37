"""Progress of long stages: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gradstore.plan.sizes import gigabytes

PLAIN_INTERVAL_SECONDS = 10.0


class Progress:
    """Tells how far a stage is, at what rate, and how long it still takes; written to standard error.

    Standard output stays free for results, so a program can read them while a person watches.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = not quiet and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """Print one line."""
        if not self._quiet:
            _line(text)

    @contextmanager
    def stage(
        self, label: str, total: int, unit: str, done: int = 0, total_bytes: int = 0
    ) -> Iterator[Callable[[int], None]]:
        """Enter a stage of ``total`` units of which ``done`` were finished earlier; call what it yields to advance.

        ``total_bytes`` is what all units read or write together, in proportion to their number; 0 if nobody waits for
        bytes. The time left is told by the rate of this run: what was done earlier took none of its time.
        """
        if self._quiet or total == 0:
            yield lambda _: None
            return
        course = _Course(total=total, unit=unit, done=done, total_bytes=total_bytes, started=time.monotonic())
        if self._live:
            with _live(label, course) as advance:
                yield advance
        else:
            yield _Plain(label, course).advance


@dataclass(slots=True, kw_only=True)
class _Course:
    """How far a stage is, in units and, if it has such, in bytes."""

    total: int
    unit: str
    done: int
    total_bytes: int
    started: float
    finished: int = 0

    def complete(self) -> bool:
        return self.done + self.finished >= self.total

    def reached(self) -> str:
        """Units and bytes so far, of how many."""
        now = self.done + self.finished
        told = f"{now:,}/{self.total:,} {self.unit}"
        if not self.total_bytes:
            return told
        return f"{told}, {gigabytes(self.total_bytes * now / self.total)} of {gigabytes(self.total_bytes)}"

    def rate(self) -> str:
        """Units and bytes a second, in this run."""
        rate = self._rate()
        told = f"{rate:,.1f}/s"
        return f"{told}, {gigabytes(rate * self.total_bytes / self.total)}/s" if self.total_bytes else told

    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the rate of this run; None before anything was finished in it."""
        return (self.total - self.done - self.finished) / self._rate() if self.finished else None

    def _rate(self) -> float:
        return self.finished / max(time.monotonic() - self.started, 1e-9)


def duration(seconds: float | None) -> str:
    """Return a time as people read it, 1:02:03 from a minute on; a dash if it is not known."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


@contextmanager
def _live(label: str, course: _Course) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        TextColumn("{task.fields[reached]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[left]}"),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(
            label, total=course.total, completed=course.done, reached=course.reached(), rate="", left=duration(None)
        )

        def advance(count: int) -> None:
            course.finished += count
            left = duration(course.seconds_left())
            bars.update(bar, advance=count, reached=course.reached(), rate=course.rate(), left=left)

        yield advance


class _Plain:
    """A line when the stage starts, one every few seconds, and one when it ends."""

    def __init__(self, label: str, course: _Course) -> None:
        self._label, self._course = label, course
        self._printed = course.started
        bytes_too = f", {gigabytes(course.total_bytes)}" if course.total_bytes else ""
        earlier = f", {course.done:,} done earlier" if course.done else ""
        self._print(f"{course.total:,} {course.unit}{bytes_too}{earlier}")

    def advance(self, count: int) -> None:
        course = self._course
        course.finished += count
        now = time.monotonic()
        if not course.complete() and now - self._printed < PLAIN_INTERVAL_SECONDS:
            return
        self._printed = now
        so_far, left = duration(now - course.started), duration(course.seconds_left())
        self._print(f"{course.reached()}, {course.rate()}, {so_far} so far, {left} left")

    def _print(self, text: str) -> None:
        _line(f"{self._label}: {text}")


def _line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
