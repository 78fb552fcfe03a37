"""What becomes of the tasks of one submission: their order, retries, and smaller ones in their place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from gradstore.cluster.tasks import Failed, Task, attempt, gate
from gradstore.errors import GradstoreError, TaskError

if TYPE_CHECKING:
    from distributed import Client, Future

# A transient fault deserves another try, a deterministic one should not cost many (architecture.md, engine).
RETRIES = 2


class Submission:
    """Tasks that were submitted as one graph, and what has become of each so far.

    A task is settled when it is done, failed, replaced by smaller ones, or not to be run because one that it is after
    failed. Everything else is in the hands of the scheduler.
    """

    def __init__(self, client: Client, tasks: Sequence[Task], priority: int = 0) -> None:
        self._client = client
        self._priority = priority
        # Keys are global to a scheduler, and other runs may share it.
        self.run = uuid4().hex
        """Names this submission among all that a scheduler has had."""
        self._groups = 0
        self._tasks: dict[str, Task] = {}
        self._futures: dict[str, Future] = {}
        self._done: set[str] = set()
        self._replaced: dict[str, list[str]] = {}
        self._failed: dict[str, BaseException] = {}
        self._not_run: dict[str, str] = {}
        # Errors of tasks whose turn had not come as far as is known here: of those before them is not yet heard.
        self._early: dict[str, Failed] = {}
        # Tasks that have had their second chance: those in place of others, and those that were submitted again as they are.
        self._last: set[str] = set()
        self._add(tasks)
        self.fresh = self._submit(list(self._tasks))
        """Futures that nobody waits for yet; who takes them clears the list."""

    def release(self) -> None:
        """Let go of what is not settled: the scheduler forgets it, but for what workers are at, which ends unheard."""
        # Not Client.cancel: it also cancels what is after each task, and stumbles over gates, which nobody holds.
        for future in self._futures.values():
            future.release()

    def settle(self, future: Future, outcome: Any) -> Iterator[tuple[Task, Any]]:
        """Take in the outcome of a future; yield each (task, result) that is done."""
        _, name = future.key
        if name not in self._futures or self._futures[name].key != future.key:
            # Submitted anew since, or not to be run.
            return
        if isinstance(outcome, Failed):
            self._settle_error(name, outcome)
            return
        self._done.add(name)
        del self._futures[name]
        yield self._tasks[name], outcome
        for waiting in [waiting for waiting in self._early if not self._awaited(waiting)]:
            self._settle_error(waiting, self._early.pop(waiting))

    def refuse_failed(self, *, local: bool) -> None:
        """Raise what went wrong, if anything did.

        Raises
        ------
        GradstoreError
            The error of a task, if it was one of gradstore's own.
        TaskError
            If a task failed otherwise, naming every task that did.
        """
        if self._failed:
            failure, cause = _failure(self._failed, self._not_run, self._tasks, local=local)
            raise failure from cause

    def _add(self, tasks: Sequence[Task]) -> None:
        for task in tasks:
            assert task.name not in self._tasks, f"two tasks are called {task.name}"
            assert all(name in self._tasks for name in task.after), f"{task.name}: comes after {task.after}, not before"
            self._tasks[task.name] = task

    def _awaited(self, name: str) -> list[str]:
        """Names of the tasks that are not done and must be before this one."""
        found: dict[str, None] = {}
        waiting = list(self._tasks[name].after)
        while waiting:
            before = waiting.pop()
            if before in self._replaced:
                waiting += self._replaced[before]
            elif before not in self._done:
                found[before] = None
        return list(found)

    def _submit(self, names: Sequence[str]) -> list[Future]:
        """Submit tasks as one graph, each behind those that it awaits.

        All tasks that await the same ones wait at one gate. So they are a group whose dependencies are few, and Dask keeps
        it back at the scheduler; any other it hands out at once, and a worker's death counts against all that it holds.
        """
        groups: dict[tuple[str, ...], str] = {}
        awaited = {name: tuple(self._awaited(name)) for name in names}
        for name, before in awaited.items():
            if before not in groups:
                self._groups += 1
                groups[before] = f"{re.sub(r'-[0-9]+$', '', name)}-{self.run}-{self._groups}"
        keys = {name: (groups[before], name) for name, before in awaited.items()}
        # Dask takes the key of what is not in this graph for a plain value, and waits for its future alone.
        nodes: dict[str, Any] = {**self._futures, **keys}
        graph: dict[tuple[str, str], Any] = {}
        for name, before in awaited.items():
            task = self._tasks[name]
            work = partial(attempt, task.function, task.arguments, self.run)
            if before:
                waiting = f"gate-{groups[before]}", "gate"
                graph[waiting] = (gate, *(nodes[other] for other in before))
                graph[keys[name]] = (work, waiting)
            else:
                graph[keys[name]] = (work,)
        asked = {keys[name]: dict(self._tasks[name].resources) for name in names if self._tasks[name].resources}
        resources = partial(asked_of, asked) if asked and self._is_mixed() else None
        found = self._client.get(
            graph,
            [keys[name] for name in names],
            sync=False,
            retries=RETRIES,
            resources=resources,
            priority=self._priority,
        )
        self._futures |= dict(zip(names, found, strict=True))
        return list(found)

    def _is_mixed(self) -> bool:
        """Whether some workers have resources and others have none.

        Only then are tasks bound to the former: Dask hands out at once what is bound, and keeps back what is not, so that
        a worker's death counts against the one task that it runs.
        """
        workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        return len({bool(worker["resources"]) for worker in workers}) > 1

    def _settle_error(self, name: str, failed: Failed) -> None:
        if self._awaited(name):
            self._early[name] = failed
            return
        task, error = self._tasks[name], failed.error
        killed = type(error).__name__ == "KilledWorker"
        if killed and error.args[0] != self._futures[name].key:
            # Of a task before it, done but run again because its result was lost. It is committed: no need to wait.
            self.fresh += self._submit([name])
            return
        del self._futures[name]
        behind = self._behind(name)
        if killed and task.smaller is not None:
            smaller = task.smaller()
            assert smaller, f"{name}: nothing smaller to run"
            self._add(smaller)
            self._replaced[name] = [other.name for other in smaller]
            self._last |= {*self._replaced[name]}
            self.fresh += self._submit([*self._replaced[name], *behind])
        elif killed and name not in self._last:
            # Whole: deaths may have counted that were not its doing, of a task beside it or of a machine that was taken away.
            self._last.add(name)
            self.fresh += self._submit([name, *behind])
        else:
            self._failed[name] = error
            self._not_run |= dict.fromkeys(behind, name)
            for waiting in behind:
                self._futures.pop(waiting)
        for waiting in behind:
            self._early.pop(waiting, None)

    def _behind(self, name: str) -> list[str]:
        """Names of the tasks that are to run after this one, or after one that is, in order."""
        found = {name: None}
        for other in self._tasks:
            if other in self._futures and not found.keys().isdisjoint(self._awaited(other)):
                found[other] = None
        del found[name]
        return list(found)


def _failure(
    failed: Mapping[str, BaseException], not_run: Mapping[str, str], tasks: Mapping[str, Task], *, local: bool
) -> tuple[GradstoreError, BaseException]:
    """What to raise and for what: a task's own error before others, with the names of all that failed or were not run."""
    own = [(name, error) for name, error in failed.items() if isinstance(error, GradstoreError)]
    name, error = own[0] if own else next(iter(failed.items()))
    more = [other for other in failed if other != name]
    told = [
        *([f"{len(more)} more failed: {_some(more)}"] if more else []),
        *([f"{len(not_run)} that come after were not run: {_some(not_run)}"] if not_run else []),
    ]
    others = f" ({'; '.join(told)})" if told else ""
    committed = "Everything else was committed; the same command goes on from there."
    if own:
        return type(own[0][1])(f"{name}: {error}{others}"), error
    if type(error).__name__ == "KilledWorker":
        # KilledWorker(task, last worker, deaths beyond the first)
        deaths = error.args[2] + 1
        raised = "raise cluster.memory_per_worker" if local else "start workers with more memory"
        lower = f"Lower {' or '.join(tasks[name].lower)}, or {raised}" if tasks[name].lower else raised.capitalize()
        message = f"{name}: its worker died {deaths} times, most likely out of memory{others}. {committed} {lower}."
        return TaskError(message), error
    return TaskError(f"{name}: {type(error).__name__}: {error}{others}. {committed}"), error


def asked_of(asked: Mapping[Any, dict[str, float]], key: Any) -> dict[str, float]:
    """Return what one key of a graph asks of a worker; Dask calls it for each."""
    return asked.get(key, {})


def _some(names: Iterable[str], most: int = 5) -> str:
    found = sorted(names)
    return ", ".join(found[:most]) + (", ..." if len(found) > most else "")
