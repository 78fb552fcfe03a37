"""A task, and what a worker does with it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gradstore.errors import GradstoreError, IntegrityError, ObjectMissingError, StorageError, TaskError

# What libraries of linear algebra read when they are loaded.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Topic of Dask's events, before the name of a submission, that counts tasks which failed in a way that may pass.
RETRIES_TOPIC = "gradstore-retries"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One unit of work: what to call, with which names and numbers, and how many rows it stands for.

    A task may run more than once, even after it has finished: its worker may be lost with what it returned. So it looks
    first whether what it is to commit is committed, and then only returns.

    Attributes
    ----------
    name
        Unique among the tasks that are submitted together. It ends in its number: ``kernel-block-0004``.
    after
        Names of tasks, earlier among those submitted together, that must have finished before this one starts. If one of
        them fails, this one is not run.
    smaller
        Makes the tasks that do the same work, each a part of it, for where this one takes the lives of its workers, most
        likely their memory. They are submitted in its place, with its rows among them; what is to run after it, runs after
        all of them. They may name each other in ``after``, and nothing else. Without such the task itself is submitted once
        more.
    lower
        Keys of run.toml to lower if a worker has too little memory for it.
    resources
        What Dask calls resources of a worker, such as one GPU. Where some workers have it and others do not, it goes to the
        former alone.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    rows: int = 1
    after: tuple[str, ...] = ()
    smaller: Callable[[], Sequence[Task]] | None = None
    lower: tuple[str, ...] = ()
    resources: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """The error of a task. A worker returns gradstore's own instead of raising it: trying again would find the same."""

    error: BaseException


def attempt(function: Callable[..., Any], arguments: tuple[Any, ...], run: str, opened: bool = True) -> Any:
    """Call a task on a worker, with one thread of computation; ``opened`` says whether what it is to run after went well.

    Storage may answer the next time; gradstore's other errors are not worth a retry. ``run`` names the submission, whose
    engine is told of what is.
    """
    if not opened:
        return Failed(TaskError("a task before it failed"))
    from distributed import get_worker

    try:
        with one_thread():
            return function(*arguments)
    except Exception as error:
        # The frames of a worker are not sent with an error; as text they are.
        error.add_note(f"On the worker:\n{traceback.format_exc()}")
        if isinstance(error, GradstoreError) and not _may_pass(error):
            return Failed(error)
        get_worker().log_event(f"{RETRIES_TOPIC}-{run}", str(error))
        raise


def _may_pass(error: GradstoreError) -> bool:
    return isinstance(error, StorageError) and not isinstance(error, IntegrityError | ObjectMissingError)


def gate(*results: Any) -> bool:
    """Return whether none of these results of tasks is an error."""
    return not any(isinstance(result, Failed) for result in results)


@contextmanager
def one_thread() -> Iterator[None]:
    """Enter with one thread of computation for numpy's and torch's linear algebra, whoever started this process.

    Sums are then in one order, so numbers are bit-identical whatever the worker, and workers do not fight over cores.
    """
    from threadpoolctl import threadpool_limits

    # For what the task is the first to load.
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    with threadpool_limits(1):
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(1)
        yield
