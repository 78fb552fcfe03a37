from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gradstore.cli import main
from gradstore.spec import read_spec
from tests.runs import gradstore, make_run

ROOT = Path(__file__).parents[2]
Invoke = Callable[..., tuple[int, str, str]]
COMMANDS = (
    *("init", "plan", "doctor", "featurize", "kernel", "self-influence", "contribute", "learn"),
    *("score", "report", "run", "status", "export", "delete", "prune", "verify", "repair", "gc", "stat", "synth"),
    *("submit", "jobs"),
)


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Run the command line in this process: code, standard output, standard error."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["gradstore", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return run


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    shown = gradstore("--help")
    assert shown.returncode == 0
    for name in COMMANDS:
        assert re.search(rf"^\s+{name}\s", shown.stdout, re.MULTILINE)
    heavy = "import sys, gradstore.cli; print([m for m in ('torch', 'transformers', 'dask', 'zarr', 'pydantic', 'numpy') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


def test_the_version_is_printed() -> None:
    assert re.fullmatch(r"gradstore \d+\.\d+\.\d+\S*\n", gradstore("--version").stdout)


def test_init_writes_a_file_that_plan_reads_and_never_overwrites_one(invoke: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    assert invoke("init", path)[0] == 0
    text = path.read_text(encoding="utf-8")
    assert "#" in text
    assert read_spec(path).run.name == "my-run"
    code, _, message = invoke("init", path)
    assert code == 2
    assert "exists already" in message
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.slow
def test_plan_of_the_reference_study_needs_neither_weights_nor_data() -> None:
    shown = gradstore("plan", ROOT / "pipelines" / "openwebtext-llama3-8b" / "run.toml", "--json")
    assert shown.returncode == 0, shown.stderr
    plan = json.loads(shown.stdout)
    assert plan["rows"] == 99_642
    assert plan["groups"] == 224
    assert plan["features"] == 224 * 64 * 64
    # 183 GB within 3 %, as one multiplication gives it.
    assert plan["feature_bytes"] == 99_642 * 224 * 64 * 64 * 2
    assert abs(plan["feature_bytes"] / 183e9 - 1) < 0.03
    assert plan["blocks"] * plan["block_rows"] >= plan["rows"] > (plan["blocks"] - 1) * plan["block_rows"]
    assert 0 < plan["task_memory_bytes"] <= plan["worker_memory_bytes"]
    assert plan["objects"] > plan["blocks"] * plan["groups"]


def test_plan_as_a_table_says_what_is_skipped(invoke: Invoke) -> None:
    _, shown, _ = invoke("plan", ROOT / "pipelines" / "openwebtext-llama3-8b" / "run.toml")
    assert "183 GB" in shown
    assert "output head" in shown


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"model": {"adapter": "gpt"}}, 2, "model.adapter: found 'gpt'; accepted: causal_lm"),
        (
            {"features": {"projection": {"kind": "trak"}}},
            2,
            "features.projection.kind: found 'trak'; accepted: dense, fact-sjlt, identity, logra",
        ),
        (
            {"features": {"projection": {"rank": 4}}},
            2,
            "features.projection.kind: is missing; accepted: dense, fact-sjlt",
        ),
        ({"learn": {"k": 49}}, 2, "learn.k: found 49; accepted: at most the 48 rows of data.train"),
        (
            {"kernel": {"kind": "fisher"}},
            2,
            "kernel.kind: found 'fisher'; accepted: block, diagonal, ekfac, full, identity",
        ),
        ({"kernel": {"dampnig": 1.0}}, 2, "kernel.dampnig: unknown key; accepted for block: damping, mode"),
        ({"kernel": {"damping": 0.0}}, 2, "kernel.damping: found 0.0"),
        ({"features.groups": {"include": "nothing"}}, 2, "no parameter group is left"),
        ({"data.eval": {"start": 3}}, 2, "data.eval: rows [3, 15)"),
        ({"data.train": {"rows": 4000}}, 3, "4,000"),
        ({"data": {"label": "colour"}}, 3, "colour"),
        ({"model": {"source": "nowhere/at-all"}}, 2, "nowhere/at-all"),
        ({"cluster": {"memory_per_worker": "100MB"}}, 5, "each of 2 workers may use 100 MB"),
        ({"data": {"length": 65}}, 2, "reads at most 64 tokens"),
    ],
)
def test_what_cannot_work_is_refused_before_it_starts_and_leaves_no_store(
    invoke: Invoke, tiny_run: Path, tmp_path: Path, change: dict[str, dict[str, object]], code: int, message: str
) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    (tmp_path / "texts.jsonl").symlink_to(tiny_run / "texts.jsonl")
    run = make_run(tmp_path, str(tmp_path / "store"), change)
    found, shown, explained = invoke("run", run)
    assert found == code, explained
    assert message in explained
    assert shown == ""
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("stage", ["kernel", "contribute", "learn", "score"])
def test_a_stage_before_its_time_says_which_one_to_run(invoke: Invoke, tiny_run: Path, stage: str) -> None:
    code, _, message = invoke(stage, tiny_run / "run.toml")
    assert code == 6
    assert "Run `gradstore featurize` first" in message


def test_an_error_of_the_installed_program_is_one_message_on_standard_error(tmp_path: Path) -> None:
    refused = gradstore("status", tmp_path, "--json")
    assert refused.returncode == 6
    assert refused.stderr.startswith("error: ")
    assert "no store is there" in refused.stderr
    assert refused.stdout == ""
