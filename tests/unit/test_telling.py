from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pytest

from gradstore.errors import DataError, SpecError, StorageError
from gradstore.stages.logs import JsonLog
from gradstore.stages.metrics import Metrics, in_file, on_port
from gradstore.stages.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since some time ago, as stages see them; a test sets the first item."""
    now = [100.0]
    monkeypatch.setattr("gradstore.stages.progress.time.monotonic", lambda: now[0])
    return now


def samples(text: str) -> dict[str, float]:
    """Values by metric and labels, without the run's."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_metrics_tell_rows_bytes_and_seconds_of_every_stage_and_what_was_counted(clock: list[float]) -> None:
    metrics = Metrics("study")
    progress = Progress(watchers=[metrics])
    with progress.stage("featurize train", 100, "rows", done=20, total_bytes=1000) as advance:
        clock[0] += 4
        advance(30)
        progress.count("invalid_rows", 2)
        progress.count("retries", 1)
        progress.count("retries", 1)
    clock[0] += 60
    text = metrics.text()
    labels = 'run="study",stage="featurize train"'
    assert samples(text) == {
        f'gradstore_stage_units{{{labels},unit="rows"}}': 50,
        f'gradstore_stage_expected_units{{{labels},unit="rows"}}': 100,
        f'gradstore_stage_computed_units_total{{{labels},unit="rows"}}': 30,
        f"gradstore_stage_bytes{{{labels}}}": 500,
        f"gradstore_stage_seconds{{{labels}}}": 4,
        'gradstore_invalid_rows_total{run="study"}': 2,
        'gradstore_retries_total{run="study"}': 2,
    }
    assert "# TYPE gradstore_retries_total counter\n" in text


def test_labels_are_escaped() -> None:
    assert 'run="a\\"b\\\\c\\nd"' in Metrics('a"b\\c\nd').text()


def test_a_file_of_metrics_is_whole_at_any_time_and_has_the_last_word(tmp_path: Path) -> None:
    metrics, path = Metrics("study"), tmp_path / "gradstore.prom"
    with in_file(metrics, path):
        assert samples(path.read_text())['gradstore_retries_total{run="study"}'] == 0
        metrics.count("retries", 3)
    assert samples(path.read_text())['gradstore_retries_total{run="study"}'] == 3
    assert [found.name for found in tmp_path.iterdir()] == ["gradstore.prom"]


def test_a_file_of_metrics_that_cannot_be_written_is_refused_at_first(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="cannot be written: No such file or directory"),
        in_file(Metrics("study"), tmp_path / "nowhere" / "gradstore.prom"),
    ):
        pass


def test_a_port_of_the_loopback_serves_metrics_and_nothing_else() -> None:
    metrics = Metrics("study")
    with on_port(metrics, 0) as port:
        metrics.count("retries", 5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert samples(answer.read().decode())['gradstore_retries_total{run="study"}'] == 5
        with pytest.raises(HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/")
        assert refused.value.code == 404
        refused.value.close()
        with (
            pytest.raises(SpecError, match=f"--metrics-port: found {port}, which cannot be listened on"),
            on_port(metrics, port),
        ):
            pass


def test_a_structured_log_is_one_object_a_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    log = JsonLog("study")
    progress = Progress(watchers=[log])
    with log.telling_errors():
        progress.note("reading texts")
        with progress.stage("kernel block", 4, "groups") as advance:
            clock[0] += 30
            advance(1)
            clock[0] += 40
            advance(1)
            progress.count("retries", 1)
    with pytest.raises(DataError), log.telling_errors():
        raise DataError("texts: no such column")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["stage"], line["level"]) for line in lines] == [
        ("note", None, "info"),
        ("begin", "kernel block", "info"),
        ("progress", "kernel block", "info"),
        ("count", "kernel block", "info"),
        ("end", "kernel block", "info"),
        ("error", None, "error"),
    ]
    assert all(line["run"] == "study" and line["time"].endswith("+00:00") for line in lines)
    assert lines[2]["fields"] | {"unit": "groups", "done": 2, "total": 4, "seconds_left": 70} == lines[2]["fields"]
    assert lines[-1]["fields"] == {"kind": "DataError", "text": "texts: no such column", "exit_code": 3}
