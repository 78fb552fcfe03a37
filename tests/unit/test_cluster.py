from __future__ import annotations

import pytest

from gradstore.cluster import Engine
from gradstore.errors import SpecError
from gradstore.spec import ClusterSection


@pytest.mark.parametrize(
    ("text", "expected"), [("4GiB", 4 * 2**30), ("500 MB", 500 * 10**6), ("1.5gb", 1_500_000_000), ("1024", 1024)]
)
def test_a_memory_size_is_read_in_the_units_people_write(text: str, expected: int) -> None:
    assert ClusterSection(memory_per_worker=text).worker_memory_bytes == expected


def test_workers_share_the_machine_unless_told_otherwise() -> None:
    four, two = ClusterSection(workers=4).worker_memory_bytes, ClusterSection(workers=2).worker_memory_bytes
    assert 2 * four == pytest.approx(two, abs=4)


def test_a_size_that_is_none_is_refused() -> None:
    with pytest.raises(SpecError, match=r'memory_per_worker: found "?\'lots\''):
        ClusterSection(memory_per_worker="lots")


def test_no_cluster_starts_for_no_tasks() -> None:
    announced: list[str] = []
    with Engine(ClusterSection(workers=1), announced.append) as engine:
        assert list(engine.run([])) == []
    assert announced == []


def test_a_scheduler_needs_an_address() -> None:
    with pytest.raises(SpecError, match=r"cluster\.address: is missing"):
        ClusterSection(kind="scheduler")


def test_a_scheduler_must_not_be_open_to_a_network() -> None:
    section = ClusterSection(kind="scheduler", address="tcp://192.0.2.7:8786")
    with pytest.raises(SpecError, match="not on this machine and not encrypted"):
        Engine(section)


@pytest.mark.parametrize("address", ["127.0.0.1:8786", "localhost", "http://127.0.0.1:8787", "inproc://1"])
def test_an_address_that_no_scheduler_has_is_refused(address: str) -> None:
    with pytest.raises(SpecError, match=r"cluster\.address: found .*; accepted: tls://HOST:PORT"):
        Engine(ClusterSection(kind="scheduler", address=address))
