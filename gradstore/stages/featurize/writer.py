"""Writing one block while the next is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class BackgroundWriter(Generic[T]):
    """Runs one write at a time beside the work of its thread; at most one waits, and no error is lost.

    Use as a context manager: leaving it waits for the last write and raises what it raised, unless an error of the work
    itself is on its way.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: Future[T] | None = None
        self.results: list[T] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._collect()
        finally:
            self._pool.shutdown(wait=True)

    def submit(self, write: Callable[[], T]) -> None:
        """Begin a write when the one before has ended; raises what that one raised."""
        self._collect()
        self._pending = self._pool.submit(write)

    def _collect(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self.results.append(pending.result())
