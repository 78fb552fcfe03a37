"""Progress of long stages: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    def stage(self, label: str, total: int, unit: str, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Enter a stage of ``total`` units of which ``done`` were finished earlier; call what it yields to advance."""
        if self._quiet or total == 0:
            yield lambda _: None
        elif self._live:
            with _live(label, total, unit, done) as advance:
                yield advance
        else:
            yield _Plain(label, total, unit, done).advance


@contextmanager
def _live(label: str, total: int, unit: str, done: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    started = time.monotonic()
    with Bars(*columns, console=Console(stderr=True)) as bars:
        bar = bars.add_task(label, total=total, completed=done, unit=unit, rate="")
        finished = 0

        def advance(count: int) -> None:
            nonlocal finished
            finished += count
            rate = finished / max(time.monotonic() - started, 1e-9)
            bars.update(bar, advance=count, rate=f"{rate:.1f}/s")

        yield advance


class _Plain:
    """A line when the stage starts, one every few seconds, and one when it ends."""

    def __init__(self, label: str, total: int, unit: str, done: int) -> None:
        self._label, self._total, self._unit, self._done = label, total, unit, done
        self._finished = 0
        self._started = self._printed = time.monotonic()
        earlier = f", {done} done earlier" if done else ""
        self._print(f"{total} {unit}{earlier}")

    def advance(self, count: int) -> None:
        self._finished += count
        now = time.monotonic()
        complete = self._done + self._finished >= self._total
        if not complete and now - self._printed < PLAIN_INTERVAL_SECONDS:
            return
        self._printed = now
        rate = self._finished / max(now - self._started, 1e-9)
        left = (self._total - self._done - self._finished) / max(rate, 1e-9)
        self._print(
            f"{self._done + self._finished}/{self._total} {self._unit}, {rate:.1f}/s, "
            f"{now - self._started:.0f} s so far, {left:.0f} s left"
        )

    def _print(self, text: str) -> None:
        _line(f"{self._label}: {text}")


def _line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
