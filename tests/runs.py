"""Whole runs in small: a tiny model, texts with topics, and a run.toml, made in a folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.cluster import Task
from tests.models import make_tiny_model

TOPICS = {
    "sport": "striker goal club season match coach league keeper cup final",
    "money": "bank shares profit market price growth trade budget tax firm",
    "music": "song band album theatre singer stage tour chart award guitar",
}
PROGRAM = Path(sys.executable).parent / "gradstore"
# Seconds that a command may take, in the environment: less than a test may (tests/conftest.py).
PATIENCE = "TEST_COMMAND_SECONDS"
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"precision": "float32"},
    "data": {"format": "jsonl", "label": "topic", "length": 24},
    "data.train": {"rows": 48},
    "data.learn": {"rows": 12},
    "data.eval": {"rows": 12},
    "features": {"projection": {"kind": "logra", "rank": 4}, "token_budget": 96},
    "kernel": {"kind": "block", "damping": 0.1},
    "learn": {"k": 3, "epochs": 3},
    "score": {"k": 10},
    "score.tail_patch": {"queries": 2, "k": 2},
    "cluster": {"workers": 2, "memory_per_worker": "4GiB"},
}


def make_run(folder: Path, store: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> Path:
    """Write a model, a corpus of 90 texts and a run.toml into a folder; return the run.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        make_tiny_model(folder / "model", "llama")
    if not (folder / "texts.jsonl").exists():
        write_corpus(folder / "texts.jsonl", 90)
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "small", "store": store, "seed": 3},
        "model": {"source": str(folder / "model")},
        "data": {"source": str(folder / "texts.jsonl")},
    }
    for table, values in (*SETTINGS.items(), *(changes or {}).items()):
        tables.setdefault(table, {}).update(values)
    return write_run(folder / "run.toml", tables)


def write_run(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write the tables of a run.toml; return its path."""
    lines = []
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {toml(value)}" for key, value in values.items()), ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_corpus(path: Path, count: int) -> None:
    """Write texts of random words of their topic, of different lengths."""
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            topic = list(TOPICS)[index % len(TOPICS)]
            words = rng.choice(TOPICS[topic].split(), int(rng.integers(4, 12)))
            file.write(json.dumps({"id": f"text-{index}", "topic": topic, "text": " ".join(words)}) + "\n")


def toml(value: Any) -> str:
    """A value as TOML spells it."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


class InThisProcess:
    """An engine without a cluster, which runs tasks in the order in which they are given."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        ran: set[str] = set()
        for task in tasks:
            assert ran.issuperset(task.after), f"{task.name}: given before {set(task.after) - ran}"
            yield task, task.function(*task.arguments)
            ran.add(task.name)


class InSmallerTasks:
    """An engine that runs smaller tasks, where there are such, as if workers had died of the whole ones."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        for task in tasks:
            for smaller in [task] if task.smaller is None else task.smaller():
                yield smaller, smaller.function(*smaller.arguments)


def gradstore(
    *arguments: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None, program: Path = PROGRAM
) -> subprocess.CompletedProcess[str]:
    """Run the installed command line as a user does.

    One that does not end is ended, with its workers: each tells on standard error where it was.
    """
    process = subprocess.Popen(
        command(*arguments, program=program),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONFAULTHANDLER": "1", **(env or {})},
        cwd=cwd,
        # A worker that outlived the command would be in its group, and hold the pipes.
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=float(os.environ[PATIENCE]))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        output, errors = process.communicate(timeout=30)
        pytest.fail(f"gradstore {' '.join(map(str, arguments))} does not end:\n{output}\n{errors}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command(*arguments, program=program), process.returncode, output, errors)


def command(*arguments: str | Path, program: Path = PROGRAM) -> Sequence[str]:
    """The command line of the installed program, or of one that is installed elsewhere."""
    return [str(program), *map(str, arguments)]
