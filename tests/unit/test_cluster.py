from __future__ import annotations

import pytest

from gradstore.cluster import Engine, worker_memory_bytes
from gradstore.errors import SpecError
from gradstore.spec import ClusterSection


@pytest.mark.parametrize(
    ("text", "expected"), [("4GiB", 4 * 2**30), ("500 MB", 500 * 10**6), ("1.5gb", 1_500_000_000), ("1024", 1024)]
)
def test_a_memory_size_is_read_in_the_units_people_write(text: str, expected: int) -> None:
    assert worker_memory_bytes(ClusterSection(memory_per_worker=text)) == expected


def test_workers_share_the_machine_unless_told_otherwise() -> None:
    assert worker_memory_bytes(ClusterSection(workers=4)) * 2 == pytest.approx(
        worker_memory_bytes(ClusterSection(workers=2)), abs=4
    )


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(SpecError, match=r'memory_per_worker: found "?\'lots\''):
        worker_memory_bytes(ClusterSection(memory_per_worker="lots"))


def test_no_cluster_starts_for_no_tasks() -> None:
    announced: list[str] = []
    with Engine(ClusterSection(workers=1), announced.append) as engine:
        assert list(engine.run([])) == []
    assert announced == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, r"cluster\.address: is missing"),
        ("tcp://192.0.2.7:8786", r"not on this machine and not encrypted"),
    ],
)
def test_a_scheduler_must_be_named_and_must_not_be_open_to_a_network(address: str | None, message: str) -> None:
    from gradstore.cluster import Task

    section = ClusterSection(kind="scheduler", address=address)
    with Engine(section) as engine, pytest.raises(SpecError, match=message):
        list(engine.run([Task(name="t", function=len, arguments=([],))]))
