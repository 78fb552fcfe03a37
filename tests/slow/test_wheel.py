"""What is released: a wheel and a source distribution that hold what they should, and a run from the installed wheel alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.runs import make_run
from tests.slow.conftest import ROOT

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a command that has to succeed, in an environment that knows nothing of this checkout."""
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


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both distributions, the wheel made of the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, cwd=ROOT)
    return folder


def test_distributions_hold_what_they_should(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    (source,) = dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    package = {name for name in names if name.startswith("gradstore/")}
    here = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "gradstore").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # Templates, styles, scripts, methods and py.typed lie among the modules.
    assert package == here
    assert {"gradstore/py.typed", "gradstore/stages/serve/viewer.css", "gradstore/spec/methods/trak.toml"} <= package
    assert {name.partition("/")[0] for name in names - package} == {f"{wheel.name.partition('-py3')[0]}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "License-Expression: Apache-2.0" in metadata
    assert "Provides-Extra: report" in metadata
    with tarfile.open(source) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "docs/index.md", "tests/runs.py", "pipelines/study.py"} <= inside
    assert not [name for name in inside if name.startswith(("runs/", ".venv", "build/"))]


def test_the_installed_wheel_goes_the_whole_path(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    pip: list[str | Path] = [
        venv / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "-c",
        ROOT / "constraints.txt",
    ]
    run(*pip, f"{wheel}[transformers,report]", cwd=tmp_path)
    program = venv / "bin" / "gradstore"
    path = make_run(tmp_path / "run", str(tmp_path / "store"))

    assert run(program, "--version", cwd=tmp_path).startswith("gradstore 0.")
    assert "featurize" in run(
        program,
        cwd=tmp_path,
        env={"_GRADSTORE_COMPLETE": "complete_bash", "COMP_WORDS": "gradstore fea", "COMP_CWORD": "1"},
    )
    assert "report:" in run(program, "run", path, cwd=tmp_path)
    assert (tmp_path / "store" / "report.html").exists()
    where = run(venv / "bin" / "python", "-c", "import gradstore; print(gradstore.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(venv)
