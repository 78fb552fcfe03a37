"""Commands of deploy's READMEs: those that can run here run, of the others the programs are known and their files exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gradstore.stages.certificates import certificates
from tests.runs import gradstore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
# docker needs an engine, sbatch a Slurm (test_slurm.py), and these of kubectl a cluster.
ELSEWHERE = ("docker ", "sbatch ", "kubectl apply ", "kubectl logs ", "kubectl delete ", "gradstore run ")


def commands() -> list[tuple[str, str]]:
    """(page, line) of every command that is shown."""
    found = []
    for page in sorted(DEPLOY.rglob("*.md")):
        for code in re.findall(r"^ *```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            found += [(str(page.relative_to(DEPLOY)), line.strip()) for line in code.splitlines() if line.strip()]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what the commands name: deploy, a run, certificates."""
    (tmp_path / "deploy").symlink_to(DEPLOY)
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    (tmp_path / "run.toml").write_text("[run]\n")
    return tmp_path


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_that_is_shown_runs_or_names_what_is_there(folder: Path, page: str, line: str) -> None:
    program, *words = line.split()
    files = [word.rpartition("=")[2] for word in words if re.match(r"(--\w+=)?(deploy|pipelines)/", word)]
    assert all((ROOT / name).exists() for name in files), f"{page}: {line}"
    if line.startswith(ELSEWHERE):
        return
    if program == "gradstore":
        done = gradstore(*words, cwd=folder)
        assert done.returncode == 0, f"{page}: {done.stderr}"
    elif line.startswith("kubectl create "):
        if shutil.which("kubectl") is None:
            pytest.skip("needs kubectl")
        certificates(folder / "certificates")
        made = subprocess.run(
            [*line.split(), "--dry-run=client", "--output=yaml"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, f"{page}: {made.stderr}"
        assert set(yaml.safe_load(made.stdout)["data"]) == {
            Path(name).name for name in words if "/" in name or ".toml" in name
        }
    else:
        assert program == "sed", f"{page}: {line}"
        done_sed = subprocess.run(line.split(), cwd=folder, capture_output=True, text=True, check=True)
        policy = json.loads(done_sed.stdout)
        assert policy["Statement"][0]["Resource"] == "arn:aws:s3:::attribution/openwebtext-llama3-8b/*"
        assert "BUCKET" not in done_sed.stdout
        assert "PREFIX" not in done_sed.stdout


def test_programs_of_the_image_are_those_of_this_environment() -> None:
    for name in ("gradstore", "dask"):
        assert (Path(sys.executable).parent / name).exists()
    assert len(commands()) >= 15
