"""The adapter of one's own that docs/extending.md shows, run as it is printed there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gradstore.stages.query import Session
from gradstore.store.examples import from_table
from gradstore.store.features import FeatureStore
from tests.runs import gradstore

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the page's module was trained and its run.toml was run."""
    folder = tmp_path_factory.mktemp("own")
    (code,), (run,) = (
        re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
        for language in ("python", "toml")
    )
    (folder / "regression.py").write_text(code, encoding="utf-8")
    (folder / "run.toml").write_text(f"{run}\n[cluster]\nworkers = 1\n", encoding="utf-8")
    subprocess.run([sys.executable, "regression.py"], cwd=folder, check=True)
    done = gradstore("run", "run.toml", env={"PYTHONPATH": str(folder)}, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Label precision@10" in done.stdout
    return folder


def test_the_features_are_the_gradients_of_the_users_own_output(finished: Path) -> None:
    feature_set = FeatureStore.open(str(finished / "store")).open_set("eval")
    weights = torch.load(finished / "regression.pt", weights_only=True)
    examples = [
        example
        for block in range(feature_set.info.num_blocks)
        for example in from_table(feature_set.read_inputs(block))
    ]
    table = feature_set.read_examples(["example_id", "label", "loss"]).to_pydict()

    assert len(examples) == 40
    assert table["example_id"] == [example.example_id for example in examples]
    for example, label, loss in zip(examples, table["label"], table["loss"], strict=True):
        x, y = example.inputs["x"].astype(np.float64), float(example.inputs["y"])
        hidden = np.tanh(weights["0.weight"].numpy() @ x + weights["0.bias"].numpy())
        predicted = float(weights["2.weight"].numpy()[0] @ hidden) + float(weights["2.bias"])
        assert loss == pytest.approx((predicted - y) ** 2, rel=1e-4, abs=1e-6)
        assert label == ("above" if y > 0 else "below")


def test_a_new_example_is_answered_as_a_stored_query_of_its_inputs(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(finished))
    url = str(finished / "store")
    example = from_table(FeatureStore.open(url).open_set("eval").read_inputs(0))[3]

    with Session(url) as session:
        new = session.query(record={"inputs": example.inputs}, k=5)
        stored = session.query(index="eval:3", k=5)

    for name, ranking in stored.rankings.items():
        assert [found.row for found in new.rankings[name].proponents] == [found.row for found in ranking.proponents]
        np.testing.assert_allclose(
            [found.score for found in new.rankings[name].proponents],
            [found.score for found in ranking.proponents],
            rtol=1e-3,
        )


def test_an_edit_of_the_code_is_refused_by_the_store(finished: Path, tmp_path: Path) -> None:
    code = (finished / "regression.py").read_text(encoding="utf-8")
    (tmp_path / "regression.py").write_text(code.replace("** 2", "** 4"), encoding="utf-8")

    refused = gradstore("featurize", "run.toml", env={"PYTHONPATH": str(tmp_path)}, cwd=finished)

    assert refused.returncode == 4
    assert "model.code: store has" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_without_pythonpath_the_command_says_what_to_set(finished: Path) -> None:
    refused = gradstore("plan", "run.toml", cwd=finished)

    assert refused.returncode == 2
    assert "model.adapter: 'regression:Regression': Python finds no module 'regression'" in refused.stderr
    assert "set PYTHONPATH" in refused.stderr
