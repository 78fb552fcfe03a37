"""What doctor says of sound runs and of models with faults, in the process of the test and without a store."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradstore.cli import main
from gradstore.errors import DataError, DoctorError, SpecError
from gradstore.spec import read_spec
from gradstore.stages.doctor import Check, Diagnosis, doctor
from tests.runs import make_run
from tests.tasks import MODULE, write_own_run

pytestmark = pytest.mark.slow

LOOKS = ["coverage", "finite", "memory", "speed", "batches", "exactness", "inner products", "forecast"]
Faulty = Callable[..., Diagnosis]


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    """Have doctor look at a task of one's own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)

    def look(**arguments: Any) -> Diagnosis:
        found = doctor(read_spec(write_own_run(tmp_path, **arguments)), 6)
        assert not (tmp_path / "store").exists()
        return found

    return look


def checks(found: Diagnosis) -> dict[str, Check]:
    return {check.name: check for check in found.checks}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"features.groups": {"rule": "head", "biases": True, "norms": True, "embeddings": True, "output_head": True}},
        {"features": {"projection": {"kind": "dense", "features": 32}, "token_budget": 96}},
        {"features": {"projection": {"kind": "lorif", "rank": 4, "factors": 2}, "token_budget": 96}},
        {"model": {"precision": "bfloat16"}},
    ],
    ids=["logra", "heads and all tensors", "dense", "factors", "bfloat16"],
)
def test_a_sound_model_passes_every_check(tiny_run: Path, tmp_path: Path, changes: dict[str, dict[str, Any]]) -> None:
    for name in ("model", "texts.jsonl"):
        (tmp_path / name).symlink_to(tiny_run / name)

    found = doctor(read_spec(make_run(tmp_path, str(tmp_path / "store"), changes)), 4)

    assert [check.name for check in found.checks] == LOOKS
    assert [check.summary for check in found.checks if check.verdict == "failed"] == []
    figures = {name: check.figures for name, check in checks(found).items()}
    assert figures["exactness"]["worst"] <= 1e-4
    assert figures["exactness"]["examples"] == 4
    assert figures["speed"]["rows_per_second"] > 0
    assert figures["memory"]["peak_bytes"] > 0
    assert figures["forecast"]["rows"] == 72
    found.refuse_failed()
    assert not (tmp_path / "store").exists()


def test_identity_has_the_inner_products_of_gradients_and_a_low_rank_says_how_far_it_is(
    tiny_run: Path, tmp_path: Path
) -> None:
    for name in ("model", "texts.jsonl"):
        (tmp_path / name).symlink_to(tiny_run / name)

    def figures(**projection: Any) -> dict[str, Any]:
        changes = {"features": {"projection": projection, "token_budget": 96}}
        found = doctor(read_spec(make_run(tmp_path, str(tmp_path / "store"), changes)), 6)
        return dict(checks(found)["inner products"].figures)

    whole, factors = figures(kind="identity"), figures(kind="lorif", rank=48, factors=1)

    assert whole["ratio"] == pytest.approx(1, rel=1e-5)
    assert whole["correlation"] == pytest.approx(1, rel=1e-5)
    # Rank 48 keeps every side as it is, so what is missing is what one pair of factors leaves out.
    assert 0.1 < factors["ratio"] < 0.99


def test_principal_components_are_found_without_a_store_and_report_what_they_cut_off(
    tiny_run: Path, tmp_path: Path
) -> None:
    for name in ("model", "texts.jsonl"):
        (tmp_path / name).symlink_to(tiny_run / name)
    projection = {"kind": "logra", "rank": 4, "matrices": "pca", "pca_rows": 16}

    changes = {"features": {"projection": projection, "token_budget": 96}}
    found = doctor(read_spec(make_run(tmp_path, str(tmp_path / "store"), changes)), 6)

    found.refuse_failed()
    figures = checks(found)["inner products"].figures
    # Norms shrink by what lies outside of the components, and never grow.
    assert 0 < figures["ratio"] < 0.9
    assert figures["correlation"] > 0.5
    assert not (tmp_path / "store").exists()


def test_principal_components_leave_out_an_example_that_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    run = write_own_run(tmp_path, broken=[2])
    text = run.read_text(encoding="utf-8")
    run.write_text(text.replace("rank = 2", 'rank = 2, matrices = "pca"'), encoding="utf-8")

    found = checks(doctor(read_spec(run), 4))

    assert found["finite"].summary.startswith("row-2: its loss is nan")
    assert found["exactness"].verdict == "ok"


def test_the_direction_of_adam_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    run = write_own_run(tmp_path)
    task = importlib.import_module(MODULE).Task()
    model = task.load("none")
    optimizer = torch.optim.Adam(model.named_parameters())
    torch.autograd.backward(task.output(model, {"x": torch.randn(8, 3)}).sum())
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "adam.pt")
    named = f"source = 'none'\noptimizer = '{tmp_path / 'adam.pt'}'"
    run.write_text(run.read_text(encoding="utf-8").replace('source = "none"', named), encoding="utf-8")

    exactness = checks(doctor(read_spec(run), 3))["exactness"]

    assert exactness.verdict == "ok", exactness.summary
    assert {*exactness.figures["groups"]} == {"0", "2", "0 (Adam's direction)", "2 (Adam's direction)"}


def test_a_figure_that_is_not_finite_is_null_in_json() -> None:
    check = Check(name="speed", verdict="ok", summary="fast.", figures={"rows": [math.nan, 1.0], "peak": math.inf})
    found = Diagnosis(run="r", examples=2, device="cpu", precision="float32", checks=(check,))

    assert found.to_json()["checks"]["speed"] == {
        "verdict": "ok",
        "summary": "fast.",
        "rows": [None, 1.0],
        "peak": None,
    }


def test_a_model_that_mixes_its_batch_is_found_out(faulty: Faulty) -> None:
    found = faulty(model="mixing")

    assert checks(found)["batches"].verdict == "failed"
    with pytest.raises(DoctorError, match=r"batches: features alone and in a batch of 6 differ by .* \(row-\d in [01]\), "
                       "so the model mixes the examples of a batch"):  # fmt: skip
        found.refuse_failed()


def test_a_parameter_that_is_used_aside_of_its_layer_is_named(faulty: Faulty) -> None:
    found = faulty(model="aside")

    exactness = checks(found)["exactness"]
    assert exactness.verdict == "failed"
    assert exactness.figures["wrong"] == ["1"]
    assert "features of 1 of 2 groups differ from autograd's gradients by more than 1e-04: 1 " in exactness.summary
    assert checks(found)["batches"].verdict == "ok"


def test_a_loss_that_is_not_finite_is_named_and_the_other_examples_are_looked_at(faulty: Faulty) -> None:
    found = faulty(broken=[2])

    finite = checks(found)["finite"]
    assert finite.verdict == "failed"
    assert finite.summary.startswith("row-2: its loss is nan. 1 of 6 examples are not finite")
    assert checks(found)["exactness"].figures["examples"] == 5


def test_losses_of_which_none_is_finite_leave_nothing_to_compare(faulty: Faulty) -> None:
    found = faulty(broken=[*range(6)])

    assert checks(found)["finite"].verdict == "failed"
    for name in ("batches", "exactness", "inner products"):
        assert checks(found)[name].verdict == "warning"
        assert "not looked at" in checks(found)[name].summary


def test_weights_that_are_not_finite_are_named(faulty: Faulty) -> None:
    with pytest.raises(DataError, match=r"tensor 2\.weight of none holds NaN"):
        faulty(model="nan")


def test_a_layer_whose_gradient_cannot_be_taken_is_a_warning_while_it_is_small(faulty: Faulty) -> None:
    coverage = checks(faulty(model="some LSTM"))["coverage"]

    assert coverage.verdict == "warning"
    assert "in 4 tensors no gradient can be taken: 2.weight_ih_l0 (LSTM is recurrent)" in coverage.summary
    assert coverage.figures["unsupported"] == [
        f"2.{name}_{side}_l0" for name in ("weight", "bias") for side in ("ih", "hh")
    ]
    with pytest.raises(SpecError, match=r"the gradients of [\d.]+% of the parameters .* cannot be taken"):
        faulty(model="mostly LSTM")


def test_the_command_prints_a_table_or_one_object_and_fails_with_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)

    def run(*options: str, **arguments: Any) -> tuple[int, str, str]:
        command = ["gradstore", "doctor", str(write_own_run(tmp_path, **arguments)), "--examples", "3", *options]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    code, shown, told = run()
    assert (code, told) == (0, "")
    assert "3 examples on cpu, in float32" in shown
    code, shown, told = run("--json", broken=[1])
    assert code == DoctorError.exit_code
    assert told.startswith("error: finite: row-1: its loss is nan.")
    assert "\n" not in told.strip()
    found = json.loads(shown)
    assert found["verdict"] == "failed"
    assert [*found["checks"]] == LOOKS
    assert not (tmp_path / "store").exists()
