"""Progress of long stages: a live bar on a terminal, a plain line a minute elsewhere, and whoever else watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

from gradstore.plan.sizes import gigabytes

PLAIN_INTERVAL_SECONDS = 60.0


@dataclass(slots=True, kw_only=True)
class Course:
    """How far a stage is, in units and, if it has such, in bytes.

    Attributes
    ----------
    label
        What the stage does, such as ``featurize train``.
    total, unit
        How much it is: so many rows, groups or blocks.
    done, finished
        How much of that earlier calls did, and how much this one.
    total_bytes
        What all units read or write together; 0 if nobody waits for bytes.
    started
        When it began, by this process's steady clock.
    """

    label: str
    total: int
    unit: str
    done: int
    total_bytes: int
    started: float
    finished: int = 0

    def complete(self) -> bool:
        """Whether all is done."""
        return self.done + self.finished >= self.total

    def bytes_done(self) -> int:
        """Bytes so far, earlier calls' too."""
        return self.total_bytes * (self.done + self.finished) // self.total

    def reached(self) -> str:
        """Units and bytes so far, of how many."""
        told = f"{self.done + self.finished:,}/{self.total:,} {self.unit}"
        if not self.total_bytes:
            return told
        return f"{told}, {gigabytes(self.bytes_done())} of {gigabytes(self.total_bytes)}"

    def rate(self) -> str:
        """Units and bytes a second, in this run."""
        rate = self.units_per_second()
        told = f"{rate:,.1f}/s"
        return f"{told}, {gigabytes(rate * self.total_bytes / self.total)}/s" if self.total_bytes else told

    def units_per_second(self) -> float:
        """Units a second, in this run."""
        return self.finished / max(self.seconds(), 1e-9)

    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.started

    def seconds_left(self) -> float | None:
        """Seconds that the rest takes at the rate of this run; None before anything was finished in it."""
        return (self.total - self.done - self.finished) / self.units_per_second() if self.finished else None


class Watcher(Protocol):
    """Who is told how far stages are."""

    def note(self, text: str) -> None:
        """Take in one line about what happens."""

    def watching(self, course: Course) -> AbstractContextManager[Callable[[], None]]:
        """Enter while a stage goes on; what it yields is called whenever the course has advanced."""

    def count(self, what: str, number: int) -> None:
        """Take in that something happened so many times, such as ``invalid_rows``."""


class Progress:
    """Tells how far a stage is, at what rate, and how long it still takes.

    Standard output stays free for results, so a program can read them while a person watches.

    Parameters
    ----------
    quiet
        Whether nobody is told on standard error.
    watchers
        Who is told instead of standard error.
    """

    def __init__(self, *, quiet: bool = False, watchers: Sequence[Watcher] | None = None) -> None:
        if watchers is None:
            watchers = [] if quiet else [on_standard_error()]
        self._watchers = tuple(watchers)

    def note(self, text: str) -> None:
        """Tell one line."""
        for watcher in self._watchers:
            watcher.note(text)

    def count(self, what: str, number: int) -> None:
        """Tell that something happened so many times; for who counts, not for who reads along."""
        for watcher in self._watchers:
            watcher.count(what, number)

    @contextmanager
    def stage(
        self, label: str, total: int, unit: str, done: int = 0, total_bytes: int = 0
    ) -> Iterator[Callable[[int], None]]:
        """Enter a stage of ``total`` units of which ``done`` were finished earlier; call what it yields to advance.

        ``total_bytes`` is what all units read or write together, in proportion to their number; 0 if nobody waits for
        bytes. The time left is told by the rate of this run: what was done earlier took none of its time.
        """
        if total == 0:
            yield lambda _: None
            return
        started = time.monotonic()
        course = Course(label=label, total=total, unit=unit, done=done, total_bytes=total_bytes, started=started)
        with ExitStack() as stack:
            tell = [stack.enter_context(watcher.watching(course)) for watcher in self._watchers]

            def advance(count: int) -> None:
                course.finished += count
                for advanced in tell:
                    advanced()

            yield advance


def on_standard_error() -> Watcher:
    """Return what tells a person: bars on a terminal, else lines."""
    return Bars() if sys.stderr.isatty() else Lines()


class Bars:
    """A live bar for each stage."""

    def note(self, text: str) -> None:
        """See `Watcher.note`."""
        _line(text)

    def count(self, what: str, number: int) -> None:
        """See `Watcher.count`; what a person should know comes as a note."""

    @contextmanager
    def watching(self, course: Course) -> Iterator[Callable[[], None]]:
        """See `Watcher.watching`."""
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Live

        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TextColumn("{task.fields[reached]}"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
        )
        with Live(*columns, console=Console(stderr=True)) as bars:
            bar = bars.add_task(
                course.label,
                total=course.total,
                completed=course.done,
                reached=course.reached(),
                rate="",
                left=duration(None),
            )

            def advanced() -> None:
                left = duration(course.seconds_left())
                completed = course.done + course.finished
                bars.update(bar, completed=completed, reached=course.reached(), rate=course.rate(), left=left)

            yield advanced


class Lines:
    """A line when a stage starts, one a minute, and one when it ends.

    Parameters
    ----------
    write
        What becomes of a line; it goes to standard error by default.
    """

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self._write = write or _line

    def note(self, text: str) -> None:
        """See `Watcher.note`."""
        self._write(text)

    def count(self, what: str, number: int) -> None:
        """See `Watcher.count`; what a person should know comes as a note."""

    @contextmanager
    def watching(self, course: Course) -> Iterator[Callable[[], None]]:
        """See `Watcher.watching`."""
        bytes_too = f", {gigabytes(course.total_bytes)}" if course.total_bytes else ""
        earlier = f", {course.done:,} done earlier" if course.done else ""
        self._write(f"{course.label}: {course.total:,} {course.unit}{bytes_too}{earlier}")
        written = course.started

        def advanced() -> None:
            nonlocal written
            now = time.monotonic()
            if not course.complete() and now - written < PLAIN_INTERVAL_SECONDS:
                return
            written = now
            so_far, left = duration(now - course.started), duration(course.seconds_left())
            self._write(f"{course.label}: {course.reached()}, {course.rate()}, {so_far} so far, {left} left")

        yield advanced


def duration(seconds: float | None) -> str:
    """Return a time as people read it, 1:02:03 from a minute on; a dash if it is not known."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
