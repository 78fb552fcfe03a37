"""What README and docs show works: Python blocks run beside the demo's store, commands exist, links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.runs import gradstore
from tests.unit.test_docs import NOTEBOOKS, PAGES, ROOT, blocks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_a_block_of_python_runs_beside_the_demo(demo: Path, page: str, code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=demo, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_beside_the_demo(demo: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Notebooks call commands by their names.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]

    ran = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(demo)}}).execute()

    printed = "".join(output.get("text", "") for cell in ran.cells for output in cell.get("outputs", []))
    assert "without weights" in printed
    assert any("image/png" in output.get("data", {}) for cell in ran.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize(("page", "code"), blocks("sh"))
def test_a_command_that_is_shown_exists(page: str, code: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    targets |= {f"tables-{study.parent.name}" for study in (ROOT / "pipelines").glob("*/study.toml")}
    for line in filter(None, (text.partition("#")[0].strip() for text in code.splitlines())):
        program, *arguments = line.split()
        if program == "make":
            assert set(arguments) <= targets, f"{page}: {line}"
        elif program == "dask":
            shown = subprocess.run(
                [Path(sys.executable).parent / "dask", arguments[0], "--help"],
                capture_output=True,
                text=True,
                check=True,
            )
            options = [word for word in arguments if word.startswith("--")]
            assert all(option in shown.stdout for option in options), f"{page}: {line}"
        else:
            assert program == "gradstore", f"{page}: {line}"
            assert gradstore(arguments[0], "--help").returncode == 0, f"{page}: {line}"


def test_every_command_is_documented() -> None:
    shown = gradstore("--help").stdout
    commands = re.findall(r"^  ([\w-]+)  ", shown[shown.index("Commands:") :], re.MULTILINE)
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(commands) == 33
    for command in commands:
        assert re.search(rf"(`|gradstore ){command}\b", text), command


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    mkdocs = Path(sys.executable).parent / "mkdocs"
    built = subprocess.run(
        [mkdocs, "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "index.html").exists()
