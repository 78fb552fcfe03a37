"""Reading ahead, whatever it is that is read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from gradstore.store.read_ahead import read_ahead


def begin(pool: ThreadPoolExecutor, step: int, buffer: list[int]) -> Callable[[], tuple[int, list[int]]]:
    """Read a step into a buffer: put its number there; those below zero cannot be read."""

    def read() -> tuple[int, list[int]]:
        if step < 0:
            raise OSError(f"no step {step}")
        buffer[:] = [step]
        return step, buffer

    return pool.submit(read).result


@pytest.mark.parametrize("num_buffers", [1, 2, 7])
def test_every_step_is_in_its_buffer_when_its_turn_comes(num_buffers: int) -> None:
    buffers: list[list[int]] = [[] for _ in range(num_buffers)]
    seen = []
    for step, buffer in read_ahead(range(5), buffers, begin, threads=3):
        assert buffer == [step]
        assert any(buffer is one for one in buffers)
        seen.append(step)
    assert seen == [0, 1, 2, 3, 4]


def test_a_step_that_cannot_be_read_spares_those_before_it() -> None:
    results = read_ahead([3, 4, -1, 5], [[0], [0], [0], [0]], begin, threads=2)
    assert [next(results)[0], next(results)[0]] == [3, 4]
    with pytest.raises(OSError, match="no step -1"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_no_more_steps_are_begun_than_there_are_buffers() -> None:
    begun: list[int] = []

    def note(pool: ThreadPoolExecutor, step: int, buffer: None) -> Callable[[], int]:
        begun.append(step)
        return pool.submit(lambda: step).result

    results = read_ahead(range(100), [None, None, None], note, threads=1)
    assert begun == []
    assert next(results) == 0
    assert begun == [0, 1, 2]
    assert next(results) == 1
    assert begun == [0, 1, 2, 3]
    results.close()


def test_steps_that_wait_for_a_thread_are_not_begun_once_the_results_are_closed() -> None:
    has_begun, may_end, read = threading.Event(), threading.Event(), []

    def slow(pool: ThreadPoolExecutor, step: int, buffer: None) -> Callable[[], int]:
        def wait_and_read() -> int:
            if step == 1:
                has_begun.set()
                may_end.wait(20)
            read.append(step)
            return step

        return pool.submit(wait_and_read).result

    results = read_ahead(range(9), [None] * 9, slow, threads=1)
    assert next(results) == 0
    assert has_begun.wait(20)
    threading.Timer(0.1, may_end.set).start()
    results.close()
    assert read == [0, 1]
