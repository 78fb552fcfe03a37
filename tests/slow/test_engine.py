"""The engine on its embedded cluster: order, errors, retries, and tasks that take their workers' lives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from gradstore.cluster import Engine, Task
from gradstore.errors import DataError, GradstoreError, IntegrityError, ObjectMissingError, StorageError, TaskError
from gradstore.spec import ClusterSection
from tests import works

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    # Room for three rows of tests.works, beside the libraries.
    with Engine(ClusterSection(workers=2, memory_per_worker="520MiB")) as started:
        yield started


def leaving(folder: Path, name: str, after: Sequence[str] = ()) -> Task:
    return Task(name=name, function=works.leave_after, arguments=(str(folder), name, *after), after=tuple(after))


def late(folder: Path, name: str, seconds: float = 0.3) -> Task:
    return Task(name=name, function=works.leave_late, arguments=(str(folder), name, seconds))


def results(engine: Engine, tasks: Sequence[Task]) -> dict[str, Any]:
    return {task.name: result for task, result in engine.run(tasks)}


def run_to_an_error(engine: Engine, tasks: Sequence[Task]) -> tuple[dict[str, Any], GradstoreError]:
    """What was yielded before the error, and the error."""
    found: dict[str, Any] = {}
    try:
        for task, result in engine.run(tasks):
            found[task.name] = result
    except GradstoreError as error:
        return found, error
    pytest.fail("nothing failed")


def test_a_task_runs_after_those_that_it_names(engine: Engine, tmp_path: Path) -> None:
    first = [leaving(tmp_path, f"first-{index}") for index in range(5)]
    second = [leaving(tmp_path, f"second-{index}", [task.name for task in first]) for index in range(12)]
    last = leaving(tmp_path, "last", [*(task.name for task in second), "first-0"])
    tasks = [*first, *second, last]
    assert results(engine, tasks) == {task.name: task.name for task in tasks}


def test_a_task_after_one_that_failed_is_not_run_and_told_of_as_such(engine: Engine, tmp_path: Path) -> None:
    for kind, error in (("data", DataError), ("missing", ObjectMissingError), ("other", TaskError)):
        folder = tmp_path / kind
        folder.mkdir()
        tasks = [
            leaving(folder, "before"),
            Task(name="bad-0001", function=works.refuse, arguments=(kind,), after=("before",)),
            leaving(folder, "behind", ["bad-0001"]),
            leaving(folder, "far-behind", ["before", "behind"]),
            leaving(folder, "beside", ["before"]),
        ]
        found, raised = run_to_an_error(engine, tasks)
        assert found == {"before": "before", "beside": "beside"}
        assert type(raised) is error
        assert str(raised).startswith("bad-0001: ")
        assert "(2 that come after were not run: behind, far-behind)" in str(raised)
        assert sorted(path.name for path in folder.iterdir()) == ["before", "beside"]


def test_every_task_that_failed_is_named(engine: Engine, tmp_path: Path) -> None:
    bad = [Task(name=f"bad-{index}", function=works.refuse, arguments=("other",)) for index in range(7)]
    found, raised = run_to_an_error(engine, [*bad, leaving(tmp_path, "good")])
    assert found == {"good": "good"}
    assert "ValueError: a mistake (6 more failed: " in str(raised)
    assert ", ...)" in str(raised)


def test_what_storage_refuses_is_tried_three_times(engine: Engine, tmp_path: Path) -> None:
    task = Task(name="flaky", function=works.fail_until, arguments=(str(tmp_path), "flaky", 2))
    assert results(engine, [task]) == {"flaky": 3}
    _, raised = run_to_an_error(
        engine, [Task(name="out", function=works.fail_until, arguments=(str(tmp_path), "out", 9))]
    )
    assert type(raised) is StorageError
    assert "out: call 3" in str(raised)
    assert not isinstance(raised, IntegrityError)


def test_what_takes_too_much_memory_is_done_by_smaller_tasks_and_what_is_after_it_waits(
    engine: Engine, tmp_path: Path
) -> None:
    rows = [f"row {row}" for row in range(6)]

    def halves() -> list[Task]:
        first = Task(name="rows-0-half", function=works.hold, arguments=(str(tmp_path), 0, 3), rows=3)
        second = Task(name="rows-3-half", function=works.hold, arguments=(str(tmp_path), 3, 6), rows=3)
        return [first, second]

    tasks = [
        Task(name="rows-0", function=works.hold, arguments=(str(tmp_path), 0, 6), rows=6, smaller=halves),
        Task(name="sum", function=works.leave_after, arguments=(str(tmp_path), "sum", *rows), after=("rows-0",)),
        Task(name="end", function=works.leave_after, arguments=(str(tmp_path), "end", "sum"), after=("sum",)),
        leaving(tmp_path, "beside"),
    ]
    assert results(engine, tasks) == {
        "rows-0-half": 3,
        "rows-3-half": 3,
        "sum": "sum",
        "end": "end",
        "beside": "beside",
    }


def test_a_smaller_task_that_still_takes_too_much_is_named_with_what_to_lower_and_the_rest_is_done(
    engine: Engine, tmp_path: Path
) -> None:
    def smaller() -> list[Task]:
        small = Task(name="block-000000", function=works.hold, arguments=(str(tmp_path), 0, 1))
        lower = ("features.block_rows",)
        return [small, Task(name="block-000001", function=works.hold, arguments=(str(tmp_path), 1, 6), lower=lower)]

    tasks = [
        Task(name="blocks-000000", function=works.hold, arguments=(str(tmp_path), 0, 6), smaller=smaller),
        leaving(tmp_path, "behind", ["blocks-000000"]),
        leaving(tmp_path, "beside"),
    ]
    found, raised = run_to_an_error(engine, tasks)
    assert found == {"block-000000": 1, "beside": "beside"}
    assert str(raised) == (
        "block-000001: its worker died 4 times, most likely out of memory (1 that come after were not run: behind). "
        "Everything else was committed; the same command goes on from there. Lower features.block_rows, or raise "
        "cluster.memory_per_worker."
    )


def test_a_task_without_smaller_ones_is_given_as_many_lives_again(engine: Engine, tmp_path: Path) -> None:
    tasks = [
        Task(name="unlucky", function=works.die, arguments=(str(tmp_path), "unlucky", 5)),
        leaving(tmp_path, "behind", ["unlucky"]),
    ]
    assert results(engine, tasks) == {"unlucky": "unlucky", "behind": "behind"}


def test_leaving_the_results_early_cancels_what_has_not_begun(engine: Engine, tmp_path: Path) -> None:
    running = engine.run([late(tmp_path, f"late-{index}") for index in range(20)])
    next(running)
    running.close()  # type: ignore[attr-defined]
    assert results(engine, [leaving(tmp_path, "next")]) == {"next": "next"}
    assert engine.client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) <= 2
    assert len(list(tmp_path.glob("* begun"))) < 10


@pytest.mark.parametrize(("priority", "go_first"), [(5, True), (0, False)])
def test_tasks_of_a_higher_priority_go_before_those_that_were_submitted_earlier(
    engine: Engine, tmp_path: Path, *, priority: int, go_first: bool
) -> None:
    running = engine.run([late(tmp_path, f"earlier-{index}", 0.1) for index in range(30)])
    next(running)
    section = ClusterSection(kind="scheduler", address=engine.client.scheduler.address)
    with Engine(section, priority=priority) as other:
        results(other, [late(tmp_path, f"urgent-{index}", 0.1) for index in range(20)])
    begun = len(list(tmp_path.glob("earlier-* begun")))
    # Of one priority they take turns.
    assert (begun < 10) == go_first
    running.close()  # type: ignore[attr-defined]


def test_tasks_compute_with_one_thread(engine: Engine) -> None:
    found = results(engine, [Task(name="threads", function=works.threads, arguments=())])["threads"]
    assert {*found["before"], *found["after"]} == {1}


def test_names_that_are_not_among_the_earlier_tasks_are_our_mistake(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="comes after"):
        list(engine.run([leaving(tmp_path, "a", ["b"]), leaving(tmp_path, "b")]))
    with pytest.raises(AssertionError, match="two tasks are called a"):
        list(engine.run([leaving(tmp_path, "a"), leaving(tmp_path, "a")]))
