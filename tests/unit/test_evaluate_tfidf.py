"""TF-IDF as a baseline of evaluations: only where it is named, what recall and LDS make of it, and without scikit-learn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from gradstore.errors import SpecError
from gradstore.numerics.metrics import subset_mask
from gradstore.spec import RunSpec, read_spec
from gradstore.spec.evaluation import EvaluateSection
from gradstore.stages.contribute import contribute
from gradstore.stages.evaluate import evaluate_lds, evaluate_recall, evaluate_tail_patch
from gradstore.stages.evaluate.methods import contenders
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.score.baselines import TFIDF, texts_of
from gradstore.store.artifacts import EvaluationArtifact, RetrainedArtifact
from gradstore.store.features import FeatureStore
from tests.runs import InThisProcess, make_run
from tests.unit.test_baselines import cosines_written_out

QUIET = Progress(quiet=True)
ENGINE: Any = InThisProcess()
K, SUBSETS, SEED = 5, 3, 3


def spec_of(folder: Path, baselines: list[str] | None = None) -> RunSpec:
    tables: dict[str, dict[str, Any]] = {
        "training": {"trainer": "scratch", "options": {"epochs": 1, "batch": 8}},
        "evaluate": {"baselines": baselines or ["tfidf"]},
        "evaluate.recall": {"by": "label", "k": [K]},
        "evaluate.tail_patch": {"k": K, "queries": 1},
        "evaluate.lds": {"subsets": SUBSETS, "groups": False},
        "score.tail_patch": {"queries": 0},
    }
    return read_spec(make_run(folder, str(folder / "store"), tables))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tfidf")
    for stage in (featurize, build_kernel, contribute, learn):
        stage(spec_of(made), ENGINE, QUIET)
    return made


@pytest.fixture
def store(folder: Path) -> FeatureStore:
    return FeatureStore.open(str(folder / "store"))


def cosines(store: FeatureStore) -> np.ndarray:
    """[Q, N], float64; texts of the same words have the same."""
    train, queries = (texts_of(store.open_set(name)) for name in ("train", "eval"))
    return np.round(cosines_written_out(queries, train), 6)


def values(store: FeatureStore, measure: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = EvaluationArtifact.open(store.storage, measure, "baseline.tfidf").read().to_pydict()
    return found


def test_recall_is_that_of_cosines_that_are_written_out(folder: Path, store: FeatureStore) -> None:
    told = evaluate_recall(spec_of(folder, ["random", "tfidf", "bm25"]), ENGINE, QUIET)

    assert [row["method"] for row in told["methods"] if row["kernel"] is None] == ["bm25", "tfidf", "random"]
    labels = {name: np.array(store.open_set(name).read_column("label")) for name in ("train", "eval")}
    best = np.argsort(-cosines(store), axis=1, kind="stable")[:, :K]
    shared = labels["train"][best] == labels["eval"][:, None]
    found = values(store, "recall")
    assert found[f"precision@{K}"] == pytest.approx(shared.mean(1))
    (row,) = (row for row in told["methods"] if row["method"] == "tfidf")
    assert row["measures"][f"precision@{K}"]["mean"] == pytest.approx(shared.mean())
    assert shared.mean() > 0.9
    assert evaluate_recall(spec_of(folder, ["random", "tfidf", "bm25"]), ENGINE, QUIET) == told


def test_lds_is_that_of_cosines_summed_in_every_subset(folder: Path, store: FeatureStore) -> None:
    told = evaluate_lds(spec_of(folder), ENGINE, QUIET)

    scores = cosines(store)
    masks = np.stack([subset_mask(subset, scores.shape[1], share=0.5, seed=SEED) for subset in range(SUBSETS)])
    found = values(store, "lds.half.3x1")
    assert np.array(found["predicted"]) == pytest.approx(scores @ masks.T, abs=1e-4)
    tables = [RetrainedArtifact.open(store.storage, "half", f"{subset:06d}.0").read() for subset in range(SUBSETS)]
    actual = [[-row["output"] for row in table.to_pylist() if row["set"] == "eval"] for table in tables]
    correlations = [
        spearmanr(predicted, outputs).statistic
        for predicted, outputs in zip(scores @ masks.T, np.array(actual).T, strict=True)
    ]
    assert found["correlation"] == pytest.approx(correlations)
    (row,) = (row for row in told["methods"] if row["method"] == "tfidf")
    assert row["measures"]["lds"]["mean"] == pytest.approx(np.mean(correlations))


def test_the_ranking_of_tail_patch_has_the_largest_cosines(folder: Path, store: FeatureStore) -> None:
    (compared,) = contenders(spec_of(folder), store, ENGINE, QUIET)

    ranked = compared.rank([TFIDF], K)[TFIDF].proponents

    scores = cosines(store)
    assert ranked.rows.tolist() == np.argsort(-scores, axis=1, kind="stable")[:, :K].tolist()
    assert ranked.scores == pytest.approx(-np.sort(-scores, axis=1)[:, :K], abs=1e-5)


def test_it_is_none_of_the_baselines_unless_it_is_named() -> None:
    assert EvaluateSection().baselines == ["bm25", "embedding", "cosine", "random"]


def test_without_scikit_learn_it_is_refused_before_anything_is_measured(
    folder: Path, store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    before = {info.path for info in store.storage.list_objects("")}

    for measure in (evaluate_recall, evaluate_lds, evaluate_tail_patch):
        with pytest.raises(
            SpecError,
            match=r"""evaluate\.baselines: found "tfidf", and scikit-learn is not installed here: pip install 'gradstore\[baselines\]'""",
        ):
            measure(spec_of(folder), ENGINE, QUIET)

    assert {info.path for info in store.storage.list_objects("")} == before
    told = evaluate_recall(spec_of(folder, ["bm25", "random"]), ENGINE, QUIET)
    assert [row["method"] for row in told["methods"] if row["kernel"] is None] == ["bm25", "random"]
