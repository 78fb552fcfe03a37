"""The demo, run once for every slow test that looks at it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from tests.runs import gradstore

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds ``runs/demo``, made as `make demo` makes it; what it printed is in ``demo.txt``."""
    base = tmp_path_factory.getbasetemp()
    # Of the processes that tests are shared among one runs it, and the others wait.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"
    with FileLock(f"{folder}.lock"):
        if not (folder / "demo.txt").exists():
            folder.mkdir(exist_ok=True)
            done = gradstore("run", ROOT / "pipelines" / "quickstart" / "run.toml", cwd=folder)
            assert done.returncode == 0, done.stderr
            (folder / "demo.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder
