"""Reading what comes next while what came last is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Step = TypeVar("Step")
Buffer = TypeVar("Buffer")
Result = TypeVar("Result")


def read_ahead(
    steps: Iterable[Step],
    buffers: Iterable[Buffer],
    begin: Callable[[ThreadPoolExecutor, Step, Buffer], Callable[[], Result]],
    *,
    threads: int,
) -> Generator[Result, None, None]:
    """Results of ``steps``, in order: with n buffers the steps after the last one asked for, n - 1 of them, are being read.

    What was begun ends, and the threads with it, when the iterator does: at its end, when it is closed or no longer
    referred to. What a step raises is raised at its turn.

    Parameters
    ----------
    steps
        What is to be read, one after another.
    buffers
        What a step is read into: a result stays as it is until the next is asked for, and then its buffer is used again.
    begin
        Hands the reading of a step into a buffer to the pool, and returns what waits for the result.
    threads
        Threads of the pool.
    """
    remaining, free = iter(steps), deque(buffers)
    begun: deque[tuple[Callable[[], Result], Buffer]] = deque()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="gradstore-read")
    try:
        while True:
            while free and (step := next(remaining, None)) is not None:
                buffer = free.popleft()
                begun.append((begin(pool, step, buffer), buffer))
            if not begun:
                return
            wait, buffer = begun.popleft()
            yield wait()
            free.append(buffer)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
