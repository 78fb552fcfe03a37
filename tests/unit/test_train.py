"""gradstore train: models where [model] looks for them, made once, of every kind of adapter that makes models anew."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.cli import main
from gradstore.errors import ContractError, SpecError
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.progress import Progress
from gradstore.stages.train import train_model
from tests import oracle
from tests.digits import write_digits
from tests.pictures import draw, write_npz
from tests.runs import make_run, write_run
from tests.unets import on_path

QUIET = Progress(quiet=True)


def digits(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> RunSpec:
    monkeypatch.syspath_prepend(str(folder))
    tables = {"data.train": {"rows": 60}, "training": {"options": {"epochs": 3}}, **changes}
    return read_spec(write_digits(folder, tables))


def test_a_model_is_trained_once_and_loads_as_it_was_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (told,) = train_model(digits(tmp_path, monkeypatch), QUIET)

    place = tmp_path / "trained.safetensors"
    assert (told["model"], told["examples"], told["kept"]) == (str(place), 60, False)
    spec = read_spec(tmp_path / "run.toml")
    adapter = make_adapter(spec)
    examples = adapter.examples().splits
    with torch.no_grad():
        found = {name: adapter.outputs(adapter.load("cpu"), rows).mean().item() for name, rows in examples.items()}
    assert found == pytest.approx(told["output"], rel=1e-5)

    before = place.read_bytes()
    (again,) = train_model(spec, QUIET)
    assert (again, place.read_bytes()) == ({**told, "kept": True}, before)
    other = {"training": {"options": {"epochs": 4}}}
    with pytest.raises(
        ContractError, match=r"trained\.safetensors was made with other settings:\n.*epochs: store has 3"
    ):
        train_model(digits(tmp_path, monkeypatch, **other), QUIET)
    assert place.read_bytes() == before
    train_model(digits(tmp_path, monkeypatch, **other), QUIET, force=True)
    assert place.read_bytes() != before
    assert [path.name for path in tmp_path.glob(".gradstore-*")] == []


def test_every_member_is_trained_by_a_seed_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = digits(tmp_path, monkeypatch)
    members = [{"name": name, "weights": str(tmp_path / f"{name}.safetensors")} for name in ("a", "b")]
    model = type(spec.model).model_validate({**spec.model.model_dump(), "members": members})

    train_model(spec.model_copy(update={"model": model}), QUIET)

    first, second = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("a", "b"))
    assert first != second
    assert not (tmp_path / "trained.safetensors").exists()


def test_members_of_one_model_and_runs_of_another_output_share_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_model(digits(tmp_path, monkeypatch), QUIET)
    before = (tmp_path / "trained.safetensors").read_bytes()

    spec = digits(tmp_path, monkeypatch, model={"output": "margin"})
    members = [{"name": name, "eta": 0.5} for name in ("a", "b")]
    model = type(spec.model).model_validate({**spec.model.model_dump(), "members": members})
    told = train_model(spec.model_copy(update={"model": model}), QUIET)

    assert [(row["member"], row["kept"]) for row in told] == [("a", True)]
    assert (tmp_path / "trained.safetensors").read_bytes() == before


def test_a_language_model_is_made_of_a_base_and_written_as_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tables: dict[str, dict[str, Any]] = {
        "model": {"source": "trained"},
        "training": {"base": str(tmp_path / "model"), "options": {"epochs": 2, "learning_rate": 0.01}},
    }
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, str(tmp_path / "store"), tables)
    monkeypatch.setattr(sys, "argv", ["gradstore", "train", str(run), "--json", "--quiet"])
    with pytest.raises(SystemExit) as ended:
        main()

    assert not ended.value.code
    (told,) = json.loads(capsys.readouterr().out)["models"]
    adapter = make_adapter(read_spec(run))
    model, examples = adapter.load("cpu"), adapter.examples().splits["eval"]
    with torch.no_grad():
        assert adapter.outputs(model, examples).mean().item() == pytest.approx(told["output"]["eval"], rel=1e-4)

    (tmp_path / "model").rename(tmp_path / "moved")
    moved = read_spec(run)
    moved = moved.model_copy(update={"training": moved.training.model_copy(update={"base": str(tmp_path / "moved")})})
    assert [row["kept"] for row in train_model(moved, QUIET)] == [True]
    config = tmp_path / "moved" / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(ContractError, match=r"trained was made with other settings:\n.*base: store has"):
        train_model(moved, QUIET)


def test_a_diffusion_model_sees_random_noise_at_random_timesteps_and_learns(tmp_path: Path) -> None:
    with on_path(tmp_path) as module:
        write_npz(tmp_path / "a.npz", *draw(15))
        run = write_run(
            tmp_path / "run.toml",
            {
                "run": {"name": "d", "store": str(tmp_path / "store")},
                "model": {
                    "adapter": "diffusion",
                    "source": f"{module}:make",
                    "weights": str(tmp_path / "w.safetensors"),
                },
                "model.options": {"arguments": {"classes": 3}, "class_argument": "y", "timesteps": 4},
                "data": {"source": "a.npz"},
                "data.train": {"rows": 9},
                "data.learn": {"rows": 2, "generate": {"steps": 5}},
                "data.eval": {"rows": 2, "generate": {"steps": 5}},
                "training": {"options": {"epochs": 30, "batch": 3, "learning_rate": 3e-3}},
            },
        )
        spec = read_spec(run)
        adapter: Any = make_adapter(spec.model_copy(update={"model": spec.model.model_copy(update={"weights": None})}))
        examples = adapter.training_examples()
        model = adapter.fresh(3, "cpu").double()

        torch.manual_seed(7)
        found = adapter.losses(model, examples)

        torch.manual_seed(7)
        levels = oracle.noise_levels(1000, 1e-4, 0.02)
        times = torch.randint(1000, (len(examples),))
        noise = torch.randn(len(examples), *examples[0].inputs["image"].shape).double()
        for row, example in enumerate(examples):
            image = torch.from_numpy(example.inputs["image"]).double() / 127.5 - 1
            level = levels[int(times[row])]
            noisy = math.sqrt(level) * image + math.sqrt(1 - level) * noise[row]
            number = torch.tensor([int(example.inputs["class"])])
            error = (model(noisy[None], times[row][None], number)[0] - noise[row]).square().mean()
            assert found[row].item() == pytest.approx(error.item(), rel=1e-6)

        (told,) = train_model(spec, QUIET)
        trained: Any = make_adapter(read_spec(run))
        with torch.no_grad():
            before, after = (
                float(trained.outputs(each.float().eval(), examples).mean()) for each in (model, trained.load("cpu"))
            )
        assert set(told["output"]) == {"train"}
        assert after < 0.8 * before
        # With a model the splits can be made that it is to generate.
        assert len(trained.examples().splits["eval"]) == 2


def test_what_cannot_be_written_or_was_not_trained_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for weights, match in (
        (None, r"model\.weights: is missing; accepted: a file \.safetensors"),
        ("w.pt", r"model\.weights: found 'w\.pt'; accepted: a file \.safetensors"),
    ):
        spec = digits(tmp_path, monkeypatch)
        model = spec.model.model_copy(update={"weights": weights})
        with pytest.raises(SpecError, match=match):
            train_model(spec.model_copy(update={"model": model}), QUIET)
    place = tmp_path / "trained.safetensors"
    place.write_bytes(b"mine")
    with pytest.raises(SpecError, match="is there, and `gradstore train` did not make it"):
        train_model(digits(tmp_path, monkeypatch), QUIET)
    assert place.read_bytes() == b"mine"
    assert not np.any([path.suffix == ".json" for path in tmp_path.iterdir()])
