"""evaluate mislabel: wrong labels that are drawn, values against scores of all pairs of rows, AUC, and what is refused."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

from gradstore.cli import main
from gradstore.errors import DataError, SpecError
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.evaluate import evaluate_mislabel
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.train import train_model
from gradstore.store.artifacts import EvaluationArtifact, WeightsArtifact
from gradstore.store.features import FeatureStore
from tests.digits import DAMPING, write_digits
from tests.runs import InThisProcess

QUIET = Progress(quiet=True)
ENGINE: Any = InThisProcess()
TRAIN, SHARE, TOP, ROWS = 150, 0.2, 3, 120


def spec_of(folder: Path, **changes: Any) -> RunSpec:
    """A run of the digits in which some labels are wrong."""
    tables = {
        "model": {"output": changes.pop("output", "cross_entropy")},
        "model.options": {"mislabelled": changes.pop("mislabelled", SHARE)},
        "data.train": {"rows": TRAIN},
        "training": {"options": {"epochs": 60, "learning_rate": 0.02, "batch": 30}},
        "evaluate.mislabel": {"rows": ROWS, "top": TOP, **changes},
    }
    return read_spec(write_digits(folder, tables))


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write, train and attribute a run."""
    return partial(attribute, tmp_path, monkeypatch)


def attribute(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> RunSpec:
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    train_model(spec_of(folder, **changes), QUIET)
    spec = read_spec(folder / "run.toml")
    for stage in (featurize, build_kernel, contribute, learn):
        stage(spec, ENGINE, QUIET)
    return spec


def features(store: FeatureStore) -> dict[str, np.ndarray]:
    train = store.open_set("train")
    blocks = [train.read_block(block) for block in range(train.info.num_blocks)]
    return {name: np.concatenate([block[name] for block in blocks]).astype(np.float64) for name in blocks[0]}


def scores_of_pairs(store: FeatureStore, weights: dict[str, float]) -> np.ndarray:
    """S[n, m] of all train rows, of which the first is the query; by inverses in float64."""
    total = 0.0
    for name, phi in features(store).items():
        gram = phi.T @ phi
        inverse = np.linalg.inv(gram + DAMPING * np.trace(gram) / len(gram) * np.eye(len(gram)))
        total = total + weights[name] * (phi @ inverse @ phi.T)
    return np.asarray(total)


def auc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """By the definition: pairs of a wrong label and a right one in which the wrong one scores higher."""
    return float((rankdata(scores)[wrong].sum() - wrong.sum() * (wrong.sum() + 1) / 2) / (wrong.sum() * (~wrong).sum()))


def test_wrong_labels_are_drawn_by_seed_and_id_and_the_true_ones_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = spec_of(tmp_path)
    given, true = (
        np.array([int(example.inputs[name]) for example in make_adapter(spec).examples().splits["train"]])
        for name in ("class", "true_class")
    )
    plain = make_adapter(spec_of(tmp_path, mislabelled=0.0)).examples().splits
    assert [int(example.inputs["class"]) for example in plain["train"]] == true.tolist()
    assert "true_class" not in plain["train"][0].inputs
    wrong = given != true
    # Of 150 draws of probability 0.2 the deviation is 4.9.
    assert 15 < wrong.sum() < 45
    assert len({*given[wrong]}) > 5
    fewer = spec_of(tmp_path)
    data = fewer.data.model_copy(update={"train": fewer.data.train.model_copy(update={"rows": 100})})
    some = make_adapter(fewer.model_copy(update={"data": data})).examples().splits["train"]
    assert [int(example.inputs["class"]) for example in some] == given[:100].tolist()
    assert [example.label for example in some] == [str(number) for number in given[:100]]


@pytest.mark.parametrize("output", ["cross_entropy", "margin"])
def test_values_and_auc_are_those_of_the_scores_of_all_pairs(make: Any, output: str) -> None:
    spec = make(output=output)
    told = evaluate_mislabel(spec, ENGINE, QUIET)

    store = FeatureStore.open(spec.run.store)
    groups = [array.name for array in store.open_set("train").info.arrays]
    learned = WeightsArtifact.open(store.storage, "learned").read()
    weights = {
        "unweighted": dict.fromkeys(groups, 1 / len(groups)),
        "learned": dict(zip(learned["group"].to_pylist(), learned["weight"].to_pylist(), strict=True)),
    }
    p = store.open_set("train").read_column("p")
    factor = np.array([1 - value for value in p]) if output == "margin" else np.ones(TRAIN)
    loss = np.array(store.open_set("train").read_column("loss"))
    found = {row["method"]: row["measures"] for row in told["methods"]}
    assert [*found] == ["unweighted", "learned", "loss", "random"]
    for name, of_groups in weights.items():
        values = EvaluationArtifact.open(store.storage, "mislabel", f"block.{name}").read()
        rows, wrong = np.array(values["example"]), np.array(values["wrong"])
        assert len(rows) == ROWS
        scores = scores_of_pairs(store, of_groups) * factor
        own = np.diag(scores)[rows]
        top = np.sort(scores[rows])[:, -TOP:].mean(1)
        assert np.array(values["auc"]) == pytest.approx(own, rel=1e-4)
        assert np.array(values["auc normalized"]) == pytest.approx(own / top, rel=1e-3)
        assert found[name]["auc"]["mean"] == pytest.approx(auc(np.array(values["auc"]), wrong))
        assert found[name]["auc normalized"]["mean"] == pytest.approx(auc(np.array(values["auc normalized"]), wrong))
    assert told["wrong"] == wrong.sum()
    sign = -1 if output == "margin" else 1
    assert found["loss"]["auc"]["mean"] == pytest.approx(auc(sign * loss[rows], wrong))
    # Three deviations of the AUC of a random order of some 25 and 95 rows.
    assert abs(found["random"]["auc"]["mean"] - 0.5) < 0.2
    # Images whose label is wrong are hard to fit.
    assert found["unweighted"]["auc"]["low"] > 0.6
    assert evaluate_mislabel(spec, ENGINE, QUIET) == told


def test_a_file_may_name_them_and_wrong_files_and_settings_are_refused(
    make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make(mislabelled=0.0)
    with pytest.raises(SpecError, match=r"evaluate\.mislabel: nothing says which labels are wrong; accepted: examples"):
        evaluate_mislabel(spec, ENGINE, QUIET)
    ids = FeatureStore.open(spec.run.store).open_set("train").read_column("example_id")
    (tmp_path / "wrong.txt").write_text("\n".join(ids[:30]))
    told = evaluate_mislabel(spec_of(tmp_path, mislabelled=0.0, examples="wrong.txt"), ENGINE, QUIET)
    assert 10 < told["wrong"] < 31

    (tmp_path / "wrong.txt").write_text("nobody\n")
    with pytest.raises(DataError, match=r"wrong\.txt: 'nobody' is not the id of a train example"):
        evaluate_mislabel(read_spec(tmp_path / "run.toml"), ENGINE, QUIET)
    (tmp_path / "wrong.txt").write_text("\n".join(ids))
    with pytest.raises(DataError, match=r"120 of 120 labels that are looked at are wrong; it needs some of both"):
        evaluate_mislabel(read_spec(tmp_path / "run.toml"), ENGINE, QUIET)
    monkeypatch.setattr(sys, "argv", ["gradstore", "train", str(tmp_path / "run.toml")])
    # With labels that are right it is another model.
    spec_of(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code
    assert "trained.safetensors was made with other settings" in (error := capsys.readouterr().err)
    assert "Traceback" not in error
