from __future__ import annotations

import sys

import pytest

from gradstore.stages.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since some time ago, as a stage sees them; a test sets the first item."""
    now = [100.0]
    monkeypatch.setattr("gradstore.stages.progress.time.monotonic", lambda: now[0])
    return now


def test_a_stage_tells_rows_and_bytes_and_the_time_left_at_the_rate_of_this_run(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress().stage("featurize train", 100_000, "rows", done=50_000, total_bytes=200 * 10**9) as advance:
        clock[0] += 5
        advance(1_000)
        clock[0] += 95
        advance(9_000)
        clock[0] += 400
        advance(40_000)
    assert capsys.readouterr().err.splitlines() == [
        "featurize train: 100,000 rows, 200 GB, 50,000 done earlier",
        "featurize train: 60,000/100,000 rows, 120 GB of 200 GB, 100.0/s, 200 MB/s, 0:01:40 so far, 0:06:40 left",
        "featurize train: 100,000/100,000 rows, 200 GB of 200 GB, 100.0/s, 200 MB/s, 0:08:20 so far, 0 s left",
    ]


def test_a_stage_without_bytes_tells_none_and_one_line_a_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress().stage("kernel block", 4, "groups") as advance:
        clock[0] += 59
        advance(0)
        clock[0] += 1
        advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "kernel block: 4 groups",
        "kernel block: 1/4 groups, 0.0/s, 0:01:00 so far, 0:03:00 left",
    ]


def test_a_bar_tells_rows_and_bytes_and_the_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "160")
    with Progress().stage("contribute block", 200, "rows", total_bytes=4 * 10**6) as advance:
        clock[0] += 10
        advance(50)
    shown = capsys.readouterr().err
    assert "50/200 rows, 1 MB of 4 MB 5.0/s, 100 kB/s" in shown
    assert "left 30 s" in shown


def test_a_quiet_stage_and_one_with_nothing_to_do_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(quiet=True).stage("featurize train", 10, "rows") as advance:
        advance(10)
    with Progress().stage("featurize train", 0, "rows"):
        pass
    assert capsys.readouterr().err == ""
