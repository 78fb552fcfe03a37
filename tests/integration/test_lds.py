"""From features to metric: LDS of logistic regression on real digits, attributed by the product, retrained here."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import kendalltau, spearmanr
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from gradstore.numerics.generator import derive_key, permutation, words
from gradstore.numerics.metrics import SubsetSums, linear_datamodeling_score, subset_mask
from gradstore.store.artifacts import ContributionArtifact, EvaluationArtifact, RetrainedArtifact, ScoresArtifact
from gradstore.store.features import FeatureStore
from tests.runs import gradstore, write_run

pytestmark = pytest.mark.slow

NUM_TRAIN, NUM_LEARN, NUM_EVAL = 1000, 20, 200
SUBSETS = 64
RETRAINED = 24
SHUFFLES = 20
SEED = 0
NETWORK = """
    import numpy as np
    import torch
    from sklearn.linear_model import LogisticRegression
    from torch import nn


    def logistic():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


    def fit(adapter, examples, *, seed, device, strength):
        # Minimises the summed cross-entropy plus half the squared norm of the weights to convergence, from zero.
        images = np.stack([example.inputs["image"] for example in examples]).reshape(len(examples), -1) / 255
        classes = [int(example.inputs["class"]) for example in examples]
        fitted = LogisticRegression(C=strength, tol=1e-6, max_iter=1000).fit(images, classes)
        model = logistic()
        with torch.no_grad():
            model[1].weight.copy_(torch.from_numpy(fitted.coef_))
            model[1].bias.copy_(torch.from_numpy(fitted.intercept_))
        return model
"""


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images uint8 [n, 8, 8] and their digits [n]."""

    images: np.ndarray
    classes: np.ndarray

    @property
    def inputs(self) -> np.ndarray:
        """What the model sees of them: [n, 64] in [0, 1]."""
        return self.images.reshape(len(self.images), -1) / 255


@dataclass(frozen=True, kw_only=True)
class Study:
    """Scores of the product for every query and training example, and what retrained models output."""

    folder: Path
    digits: dict[str, Digits]
    store: FeatureStore
    scores: np.ndarray
    masks: np.ndarray
    actual: np.ndarray

    def lds(self, scores: np.ndarray) -> float:
        sums = SubsetSums(self.masks, len(scores))
        sums.add(scores, np.arange(scores.shape[1]))
        return linear_datamodeling_score(sums.total(), self.actual).mean


def shuffled(count: int, what: str) -> np.ndarray:
    return permutation(words(derive_key(SEED, "digits", what), count))


def read_digits() -> dict[str, Digits]:
    """Disjoint splits of the digits of scikit-learn, whose pixels are 0 to 16."""
    found = load_digits()
    order = shuffled(len(found.target), "splits")
    edges = np.cumsum([NUM_TRAIN, NUM_LEARN, NUM_EVAL])
    pixels = (15 * found.images).astype(np.uint8)
    return {
        name: Digits(images=pixels[rows], classes=found.target[rows])
        for name, rows in zip(("train", "learn", "eval"), np.split(order, edges), strict=False)
    }


def fit(digits: Digits, mask: np.ndarray) -> LogisticRegression:
    """Minimise the summed cross-entropy plus half the squared norm of the weights to convergence, from zero."""
    return LogisticRegression(C=1.0, tol=1e-6, max_iter=1000).fit(digits.inputs[mask], digits.classes[mask])


def outputs(model: LogisticRegression, digits: Digits) -> np.ndarray:
    """Minus the cross-entropy of every image: larger is better."""
    found: np.ndarray = model.predict_log_proba(digits.inputs)[np.arange(len(digits.classes)), digits.classes]
    return found


def attribute(folder: Path, digits: dict[str, Digits], model: LogisticRegression) -> FeatureStore:
    """Featurize, build the kernel and C, learn and score, by the command line."""
    (folder / "digit_networks.py").write_text(textwrap.dedent(NETWORK), encoding="utf-8")
    state = {"1.weight": model.coef_, "1.bias": model.intercept_}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value, np.float32)) for name, value in state.items()}
    save_file(tensors, folder / "w.safetensors")
    for name, split in digits.items():
        names = np.array([f"{name}-{row}" for row in range(len(split.images))])
        np.savez(folder / f"{name}.npz", image=split.images, label=split.classes, name=names)
    run = write_run(
        folder / "run.toml",
        {
            "run": {"name": "digits", "store": str(folder / "store")},
            "model": {
                "adapter": "image_classifier",
                "source": "digit_networks:logistic",
                "weights": "w.safetensors",
                "precision": "float32",
            },
            "data": {"id": "name"},
            **{f"data.{name}": {"source": f"{name}.npz"} for name in digits},
            "features": {"dtype": "float32", "projection": {"kind": "identity"}},
            "features.groups": {"biases": True},
            "kernel": {"kind": "block", "damping": 0.1},
            "learn": {"epochs": 1},
            "score.tail_patch": {"queries": 0},
            "training": {"trainer": "digit_networks:fit", "options": {"strength": 1.0}},
            "evaluate.lds": {"subsets": RETRAINED},
            "cluster": {"workers": 2, "memory_per_worker": "4GiB", "device": "cpu"},
        },
    )
    done = gradstore("run", run, env={"PYTHONPATH": str(folder)}, cwd=folder)
    assert done.returncode == 0, done.stderr
    return FeatureStore.open(str(folder / "store"))


def rows_of(store: FeatureStore, set_name: str) -> list[int]:
    """Where each row of a set was in its split."""
    names = store.open_set(set_name).read_examples(["example_id"])["example_id"].to_pylist()
    return [int(name.rpartition("-")[2]) for name in names]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    digits = read_digits()
    model = fit(digits["train"], np.ones(NUM_TRAIN, bool))
    assert model.score(digits["eval"].inputs, digits["eval"].classes) > 0.9

    folder = tmp_path_factory.mktemp("digits")
    store = attribute(folder, digits, model)
    artifact = ContributionArtifact.open(store.storage, "block", "eval")
    c = np.concatenate(list(artifact.read_blocks(0, artifact.shape.queries)), axis=1)

    masks = np.stack([shuffled(NUM_TRAIN, f"subset {subset}") < NUM_TRAIN // 2 for subset in range(SUBSETS)])
    actual = np.stack([outputs(fit(digits["train"], mask), digits["eval"]) for mask in masks])
    train, queries = rows_of(store, "train"), rows_of(store, "eval")
    return Study(
        folder=folder,
        digits=digits,
        store=store,
        scores=c.mean(2),
        masks=masks[:, train],
        actual=actual[:, queries],
    )


def test_scores_predict_what_models_retrained_on_half_of_the_digits_output(study: Study) -> None:
    assert study.scores.shape == (NUM_EVAL, NUM_TRAIN)
    assert study.masks.sum(1).tolist() == [NUM_TRAIN // 2] * SUBSETS
    assert study.lds(study.scores) >= 0.6


def test_negated_scores_predict_the_opposite(study: Study) -> None:
    assert study.lds(-study.scores) <= -0.6


def test_shuffled_scores_predict_nothing(study: Study) -> None:
    # One shuffle of 200 queries has a standard deviation of 0.008 around 0, the mean of twenty one of 0.002.
    found = [
        study.lds(np.stack([row[shuffled(NUM_TRAIN, f"{draw} {query}")] for query, row in enumerate(study.scores)]))
        for draw in range(SHUFFLES)
    ]
    assert np.abs(found).max() <= 0.05
    assert abs(np.mean(found)) <= 0.01


def test_the_kernel_predicts_better_than_inner_products_of_the_same_features(study: Study) -> None:
    train, queries = (study.store.open_set(name) for name in ("train", "eval"))
    (group,) = [array.name for array in train.info.arrays]
    phi, psi = (
        {group: np.concatenate([item.read_block(block)[group] for block in range(item.info.num_blocks)])}
        for item in (train, queries)
    )

    inner_products = psi[group] @ phi[group].T

    assert 0.2 <= study.lds(inner_products) <= study.lds(study.scores) - 0.2


def evaluate(study: Study) -> dict[str, Any]:
    done = gradstore(
        "evaluate", "lds", study.folder / "run.toml", "--json", env={"PYTHONPATH": str(study.folder)}, cwd=study.folder
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def found(study: Study) -> dict[str, Any]:
    """What the command tells the first time."""
    return evaluate(study)


def test_the_command_retrains_and_finds_the_same(study: Study, found: dict[str, Any]) -> None:
    assert (found["queries"], found["queries_without"], found["subsets"]) == (NUM_EVAL, 0, RETRAINED)
    measured = {row["method"]: row["measures"]["lds"] for row in found["methods"]}
    assert 0.6 <= measured["unweighted"]["low"] <= measured["unweighted"]["mean"] <= measured["unweighted"]["high"]
    assert measured["random"]["low"] <= 0 <= measured["random"]["high"]
    accuracy = {row["method"]: row["measures"]["ranking_accuracy"] for row in found["methods"]}
    assert 0.7 <= accuracy["unweighted"]["low"] <= accuracy["unweighted"]["mean"] <= accuracy["unweighted"]["high"] < 1
    assert accuracy["random"]["low"] <= 0.5 <= accuracy["random"]["high"]
    # Of one group there is one weight, which changes no order.
    assert measured["learned"]["difference"] == {"mean": 0, "low": 0, "high": 0}

    storage, retrained = study.store.storage, []
    train, queries = rows_of(study.store, "train"), rows_of(study.store, "eval")
    masks = np.stack([subset_mask(subset, NUM_TRAIN, share=0.5, seed=0) for subset in range(RETRAINED)])
    for subset in range(RETRAINED):
        table = RetrainedArtifact.open(storage, "half", f"{subset:06d}.0").read().to_pylist()
        retrained.append([-row["output"] for row in table if row["set"] == "eval"])
    mask = np.zeros(NUM_TRAIN, bool)
    mask[np.array(train)[masks[3]]] = True
    alone = outputs(fit(study.digits["train"], mask), study.digits["eval"])[queries]
    assert retrained[3] == pytest.approx(alone, rel=1e-3, abs=1e-3)
    values = EvaluationArtifact.open(storage, f"lds.half.{RETRAINED}x1", "block.unweighted").read()
    sums = study.scores.astype(np.float64) @ masks.T
    assert np.array(values["predicted"].to_pylist()) == pytest.approx(sums, rel=1e-9, abs=1e-12)
    correlations = [
        spearmanr(predicted, actual).statistic for predicted, actual in zip(sums, np.array(retrained).T, strict=True)
    ]
    assert values["correlation"].to_pylist() == pytest.approx(correlations, abs=1e-9)
    assert measured["unweighted"]["mean"] == pytest.approx(np.mean(correlations))
    # No two are equal: Kendall's tau is the share in the right order less that in the wrong one.
    taus = [
        kendalltau(predicted, actual).statistic for predicted, actual in zip(sums, np.array(retrained).T, strict=True)
    ]
    assert accuracy["unweighted"]["mean"] == pytest.approx((1 + np.mean(taus)) / 2)


def test_models_that_were_trained_are_not_trained_again(study: Study, found: dict[str, Any]) -> None:
    storage = study.store.storage
    before = {info.path: storage.read(info.path) for info in storage.list_objects("retrained")}
    (lost,) = [path for path in before if "000005.0/commits" in path]
    storage.delete(lost)

    assert evaluate(study) == found
    after = {info.path: storage.read(info.path) for info in storage.list_objects("retrained")}
    assert {path for path in before if after.get(path) != before[path]} <= {lost}


@pytest.mark.usefixtures("found")
def test_other_code_of_the_trainer_is_refused(study: Study) -> None:
    file = study.folder / "digit_networks.py"
    text = file.read_text()
    file.write_text(text.replace("max_iter=1000", "max_iter=5"))
    try:
        done = gradstore(
            "evaluate", "lds", study.folder / "run.toml", env={"PYTHONPATH": str(study.folder)}, cwd=study.folder
        )
    finally:
        file.write_text(text)
    assert done.returncode != 0
    assert "code: store has" in done.stderr
    assert "choose another evaluate.lds.name" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_ranking_that_the_product_reports_is_that_of_these_scores(study: Study) -> None:
    ranked = ScoresArtifact.open(study.store.storage, "block.unweighted").read().to_pylist()
    for query in (0, NUM_EVAL - 1):
        best = [row["example"] for row in ranked if row["query"] == query and row["side"] == "proponent"]
        assert best == np.argsort(-study.scores[query], kind="stable")[: len(best)].tolist()
