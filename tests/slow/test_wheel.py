"""What is released: a wheel and a source distribution that hold what they should, and the demo by the installed wheel alone."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.slow.conftest import DEMO_PACKAGES, ROOT, run_alone

pytestmark = pytest.mark.slow


def test_distributions_hold_what_they_should(fresh: Path) -> None:
    (wheel,) = (fresh / "dist").glob("*.whl")
    (source,) = (fresh / "dist").glob("*.tar.gz")
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


def test_the_installed_wheel_runs_the_demo_without_this_checkout(fresh: Path, demo: Path, tmp_path: Path) -> None:
    program, python = fresh / "venv" / "bin" / "gradstore", fresh / "venv" / "bin" / "python"

    assert run_alone(program, "--version", cwd=tmp_path).startswith("gradstore 0.")
    asked = {"_GRADSTORE_COMPLETE": "complete_bash", "COMP_WORDS": "gradstore fea", "COMP_CWORD": "1"}
    assert "featurize" in run_alone(program, cwd=tmp_path, env=asked)
    where = run_alone(python, "-c", "import gradstore; print(gradstore.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(fresh / "venv")
    assert "report:" in (demo / "demo.txt").read_text(encoding="utf-8")
    assert (demo / "runs" / "demo" / "report.html").exists()


def test_the_list_of_what_a_wheel_comes_with_names_every_package_and_its_version(fresh: Path, tmp_path: Path) -> None:
    listed = json.loads((fresh / "sbom.json").read_text(encoding="utf-8"))

    assert listed["bomFormat"] == "CycloneDX"
    found = versions((listed["metadata"]["component"], *listed["components"]))
    python = fresh / "venv" / "bin" / "python"
    there = versions(json.loads(run_alone(python, "-m", "pip", "list", "--format", "json", cwd=tmp_path)))
    assert {"gradstore", "torch", "zarr", "dask"} <= found.keys()
    # The demo's own packages come later.
    assert {name: version for name, version in there.items() if name not in DEMO_PACKAGES} == found


def versions(packages: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Versions of packages by their names, however these are spelled."""
    return {re.sub("[-_.]+", "-", package["name"]).lower(): package["version"] for package in packages}
