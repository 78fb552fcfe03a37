"""The demo on fewer articles, run once for every slow test that looks at it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from filelock import FileLock

from tests.browser import Browser
from tests.runs import gradstore

ROOT = Path(__file__).parents[2]


def quickstart(folder: Path, changes: Mapping[str, str]) -> Path:
    """Make a folder with the demo's run.toml in which some lines are others; return the file."""
    text = (ROOT / "pipelines" / "quickstart" / "run.toml").read_text(encoding="utf-8")
    for found, wanted in changes.items():
        assert found in text
        text = text.replace(found, wanted)
    folder.mkdir(exist_ok=True)
    (folder / "run.toml").write_text(text, encoding="utf-8")
    return folder / "run.toml"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser with a profile of its own, for the tests of a file."""
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds ``runs/demo``, made as `make demo` makes it, of fewer articles; what it printed is in ``demo.txt``.

    `make demo` itself takes a quarter of an hour on two cores without bfloat16.
    """
    base = tmp_path_factory.getbasetemp()
    # Of the processes that tests are shared among one runs it, and the others wait.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(f"{folder}.lock"):
        if not (folder / "demo.txt").exists():
            fewer = {"rows = 400": "rows = 160", "rows = 60": "rows = 16", "queries = 10": "queries = 2"}
            done = gradstore("run", quickstart(folder, fewer), cwd=folder)
            assert done.returncode == 0, done.stderr
            (folder / "demo.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder
