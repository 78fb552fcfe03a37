"""The demo, run once for every slow test that looks at it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runs import gradstore

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds ``runs/demo``, made as `make demo` makes it; what it printed is in ``demo.txt``."""
    folder = tmp_path_factory.mktemp("demo")
    done = gradstore("run", ROOT / "pipelines" / "quickstart" / "run.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "demo.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder
