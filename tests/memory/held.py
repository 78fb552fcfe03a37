"""Tasks in processes of their own, where their memory is measured, while the rest of a stage runs in this one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest

from gradstore.cluster import Engine, Task
from gradstore.spec import RunSpec
from gradstore.stages.progress import Progress
from tests.memory.peak import high_water


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Memory of a process: before its task, with the libraries of a worker imported, and at the highest."""

    before: int
    highest: int

    @property
    def added(self) -> int:
        """What the task added to its process."""
        return self.highest - self.before


class HoldingEngine:
    """Runs tasks here, but those of one function: of these the first runs in a fresh process, where it is measured."""

    def __init__(self, held: Callable[..., Any], *, finish: bool) -> None:
        self.peak: Peak | None = None
        self._held = held
        self._finish = finish

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        for task in tasks:
            if task.function is not self._held:
                yield task, task.function(*task.arguments)
            elif self.peak is None:
                result, self.peak = in_a_fresh_process(task)
                yield task, result
            elif self._finish:
                yield task, task.function(*task.arguments)


class _Held(Exception):
    """The task that is to be measured has been."""


class StoppingEngine:
    """Runs tasks here until the first of one function, which runs in a fresh process, where it is measured. Then it stops."""

    def __init__(self, held: Callable[..., Any]) -> None:
        self._held = held
        self.peak: Peak | None = None

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        for task in tasks:
            if task.function is self._held:
                _, self.peak = in_a_fresh_process(task)
                raise _Held
            yield task, task.function(*task.arguments)


def first_task(stage: Callable[..., None], spec: RunSpec, held: Callable[..., Any]) -> Peak:
    """Memory of the first task of a function that a stage runs; what comes after it is not run."""
    engine = StoppingEngine(held)
    with pytest.raises(_Held):
        stage(spec, cast(Engine, engine), Progress(quiet=True))
    assert engine.peak is not None
    return engine.peak


def in_a_fresh_process(task: Task) -> tuple[Any, Peak]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # As the embedded cluster starts its workers: freed memory stays with the process.
    worker = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "OMP_NUM_THREADS": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in worker.items():
            patch.setenv(name, value)
        process = context.Process(target=measure, args=(task.function, task.arguments, theirs))
        process.start()
    theirs.close()
    try:
        result, before, highest = ours.recv()
    finally:
        process.join()
    return result, Peak(before=before, highest=highest)


def measure(function: Callable[..., Any], arguments: Sequence[Any], connection: Any) -> None:
    import distributed  # noqa: F401
    import torch
    import zarr  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    before = high_water()
    connection.send((function(*arguments), before, high_water()))
