"""evaluate lds with the shipped trainer: LDS of methods and groups against scipy, ranking accuracy, the choice by learn queries, refusals."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from scipy.stats import spearmanr

from gradstore.cluster import Task
from gradstore.errors import ContractError, NotReadyError, SpecError
from gradstore.numerics.metrics import subset_mask
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.evaluate import evaluate_lds, render_evaluation
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.plots import plots
from gradstore.stages.progress import Progress
from gradstore.stages.report import report
from gradstore.stages.report.data import MeasuredTable
from gradstore.stages.report.evaluations import measured_tables
from gradstore.stages.score import score
from gradstore.stages.status import render_status, status
from gradstore.stages.train import train_model
from gradstore.store.artifacts import (
    ContributionArtifact,
    EvaluationArtifact,
    RetrainedArtifact,
    WeightsArtifact,
)
from gradstore.store.features import FeatureStore
from tests.digits import write_digits
from tests.runs import InThisProcess, make_run

QUIET = Progress(quiet=True)
ENGINE: Any = InThisProcess()
TRAIN, QUERIES, SUBSETS, SEED = 60, 8, 6, 4
DAMPINGS = {"block_0p1": 0.1, "block_10": 10.0}


def spec_of(folder: Path, features: dict[str, Any] | None = None, place: str = "store", **lds: Any) -> RunSpec:
    tables: dict[str, dict[str, Any]] = {
        "run": {"store": str(folder / place)},
        "features": features or {},
        "data.train": {"rows": TRAIN},
        "data.learn": {"rows": QUERIES},
        "data.eval": {"rows": QUERIES},
        "kernel": {"damping": [*DAMPINGS.values()]},
        "learn": {"k": [1, 5], "epochs": 2, "learning_rate": 0.3},
        "score.tail_patch": {"queries": 0},
        "training": {"options": {"epochs": 20, "learning_rate": 0.02, "batch": 20}},
        "evaluate.lds": {"subsets": SUBSETS, "seeds": 2, "choose": "learn", **lds},
    }
    return read_spec(write_digits(folder, tables))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = tmp_path_factory.mktemp("lds")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(made))
        train_model(spec_of(made), QUIET)
        spec = spec_of(made)
        for stage in (featurize, build_kernel, contribute, learn):
            stage(spec, ENGINE, QUIET)
        yield made


def outputs(store: FeatureStore, name: str) -> np.ndarray:
    """[S, Q]: minus the loss, the mean of two models of each subset."""
    found = np.zeros((SUBSETS, QUERIES))
    for subset in range(SUBSETS):
        for seed in range(2):
            table = RetrainedArtifact.open(store.storage, "half", f"{subset:06d}.{seed}").read().to_pylist()
            found[subset] -= [row["output"] / 2 for row in table if row["set"] == name]
    return found


def c_of(store: FeatureStore, kernel: str, name: str) -> np.ndarray:
    artifact = ContributionArtifact.open(store.storage, kernel, name)
    return np.concatenate([*artifact.read_blocks(0, QUERIES)], 1).astype(np.float64)


def correlations(scores: np.ndarray, actual: np.ndarray) -> np.ndarray:
    masks = np.stack([subset_mask(subset, TRAIN, share=0.5, seed=SEED) for subset in range(SUBSETS)])
    predicted = scores @ masks.T
    return np.array([spearmanr(predicted[query], actual[:, query]).statistic for query in range(QUERIES)])


def accuracies(scores: np.ndarray, actual: np.ndarray) -> list[float]:
    """Of each query the share of two subsets that sums of scores order as the outputs do, none of which are equal."""
    masks = np.stack([subset_mask(subset, TRAIN, share=0.5, seed=SEED) for subset in range(SUBSETS)])
    found = []
    for summed, outputs_of_query in zip(scores @ masks.T, actual.T, strict=True):
        pairs = [(one, other) for one in range(SUBSETS) for other in range(one)]
        alike = [
            (summed[one] > summed[other]) == (outputs_of_query[one] > outputs_of_query[other]) for one, other in pairs
        ]
        found.append(float(np.mean(alike)))
    return found


def test_methods_and_groups_are_measured_and_what_is_chosen_is_chosen_by_other_queries(folder: Path) -> None:
    told = evaluate_lds(spec_of(folder), ENGINE, QUIET)

    store = FeatureStore.open(str(folder / "store"))
    groups = [array.name for array in store.open_set("train").info.arrays]
    weights: dict[tuple[str, str], Any] = {}
    for kernel in DAMPINGS:
        name = kernel.replace("block", "learned")
        artifact = WeightsArtifact.open(store.storage, name)
        weights[kernel, "unweighted"] = np.full(len(groups), 1 / len(groups))
        weights[kernel, name] = np.array(artifact.read()["weight"])
        candidates = artifact.read_candidates()
        assert candidates is not None
        for place, values in enumerate(candidates["weights"].to_pylist()):
            weights[kernel, f"{name}.{place}"] = np.array(values)
    lds = {
        (name, *key): correlations(c_of(store, key[0], name) @ of, outputs(store, name))
        for key, of in weights.items()
        for name in ("learn", "eval")
    }

    measured = {(row["kernel"], row["method"]): row["measures"]["lds"] for row in told["methods"]}
    for key in [key for key in measured if key[0] is not None]:
        assert measured[key]["mean"] == pytest.approx(lds["eval", *key].mean())
    accuracy = {(row["kernel"], row["method"]): row["measures"]["ranking_accuracy"] for row in told["methods"]}
    wanted = {
        key: np.mean(accuracies(c_of(store, key[0], "eval") @ of, outputs(store, "eval")))
        for key, of in weights.items()
    }
    for key in [key for key in accuracy if key[0] is not None]:
        assert accuracy[key]["mean"] == pytest.approx(wanted[key])
        if key[1] != "unweighted":
            difference = wanted[key] - wanted[key[0], "unweighted"]
            assert accuracy[key]["difference"]["mean"] == pytest.approx(difference)
    for kernel in DAMPINGS:
        c = c_of(store, kernel, "eval")
        values = EvaluationArtifact.open(store.storage, f"lds.half.{SUBSETS}x2", f"{kernel}.groups").read()
        for place, group in enumerate(groups):
            alone = correlations(c[:, :, place], outputs(store, "eval"))
            (mean,) = (row["mean"] for row in told["groups"] if (row["kernel"], row["group"]) == (kernel, group))
            assert mean == pytest.approx(alone.mean())
            rows = [row["correlation"] for row in values.to_pylist() if row["group"] == group]
            assert rows == pytest.approx(alone)

    on_learn = {(row["kernel"], row["method"]): row["lds"] for row in told["chosen"]["candidates"]}
    assert on_learn == {key: pytest.approx(lds["learn", *key].mean()) for key in weights}
    without, with_weights = told["chosen"]["methods"]
    assert without["lds of learn"] == max(value for key, value in on_learn.items() if key[1] == "unweighted")
    assert with_weights["lds of learn"] == max(value for key, value in on_learn.items() if key[1] != "unweighted")
    keys = [(row["kernel"], row["method"]) for row in (without, with_weights)]
    assert with_weights["mean"] == pytest.approx(lds["eval", *keys[1]].mean())
    assert with_weights["difference"]["mean"] == pytest.approx(
        lds["eval", *keys[1]].mean() - lds["eval", *keys[0]].mean()
    )
    assert evaluate_lds(spec_of(folder), ENGINE, QUIET) == told


def test_lds_comes_before_ranking_accuracy_in_what_is_told_and_shown(folder: Path) -> None:
    told = evaluate_lds(spec_of(folder), ENGINE, QUIET)

    console = Console(width=120, record=True, file=StringIO())
    console.print(render_evaluation(told))

    assert {tuple(row["measures"]) for row in told["methods"]} == {("lds", "ranking_accuracy")}
    assert all("difference" not in row["measures"]["ranking_accuracy"] for row in told["methods"] if not row["weights"])
    shown = [line.split("│")[1:4] for line in console.export_text().splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line] for line in shown]
    assert [row[0] for row in rows] == [name for name in ("lds", "ranking_accuracy") for _ in told["methods"]]
    for name, method, value in rows:
        (row,) = (row for row in told["methods"] if ".".join(filter(None, (row["kernel"], row["method"]))) == method)
        mean, low, high = (row["measures"][name][key] for key in ("mean", "low", "high"))
        assert value == f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def assert_reported_as_told(store: Path, told: dict[str, Any]) -> None:
    """The report has the means, intervals and differences that the command told, of a kernel and the baselines."""
    tables = lds_tables(store)
    assert len(tables) == 2
    for table, measure in zip(tables, ("lds", "ranking_accuracy"), strict=True):
        expected = {}
        for row in told["methods"]:
            if row["kernel"] in ("block_0p1", None):
                found = row["measures"][measure]
                of_both = [of for of in (found, found.get("difference")) if of is not None]
                values = [100 * of[key] for of in of_both for key in ("mean", "low", "high")]
                expected[row["method"]] = pytest.approx(values)
        shown = {row.method: [row.mean, row.ci_low, row.ci_high, *(row.difference or ())] for row in table.rows}
        assert shown == expected
        assert any(row.difference for row in table.rows)
        assert "(intervals: of the queries and of the subsets)" in table.about


def test_the_report_has_the_intervals_that_were_told_or_says_that_they_are_others(folder: Path, tmp_path: Path) -> None:
    told = evaluate_lds(spec_of(folder), ENGINE, QUIET)
    assert_reported_as_told(folder / "store", told)

    whole, _ = lds_tables(folder / "store")
    for change in (lose, swap):
        copied = shutil.copytree(folder / "store", tmp_path / change.__name__)
        change(copied / "retrained" / "half")
        (other,) = lds_tables(copied)
        assert "(intervals: of the queries alone" in other.about
        assert [row.mean for row in other.rows] == pytest.approx([row.mean for row in whole.rows])
        assert [row.ci_low for row in other.rows] != pytest.approx([row.ci_low for row in whole.rows])


def lds_tables(store: Path) -> list[MeasuredTable]:
    """What is reported of a kernel's LDS, and of its ranking accuracy where what models output is at hand."""
    found = measured_tables(FeatureStore.open(str(store)), "block_0p1")
    titles = [f"{name} (half.{SUBSETS}x2)" for name in ("LDS", "Subsets in the right order")]
    return [table for table in found if table.title in titles]


def lose(retrained: Path) -> None:
    """Remove what a model outputs."""
    shutil.rmtree(retrained / "000003.1")


def swap(retrained: Path) -> None:
    """Have the models of two subsets change places."""
    here, there, aside = (retrained / name for name in ("000000.0", "000001.0", "aside"))
    here.rename(aside)
    there.rename(here)
    aside.rename(there)


def test_status_tells_how_many_models_and_methods_are_done(folder: Path) -> None:
    evaluate_lds(spec_of(folder), ENGINE, QUIET)

    found = status(str(folder / "store"))

    assert {"path": "retrained/half", "committed": 2 * SUBSETS, "total": 2 * SUBSETS} in found["retrained"]
    lds = {row["path"]: (row["committed"], row["total"]) for row in found["evaluations"]}
    # Of two kernels no weights, weights and groups, and the baselines; a candidate may have been chosen.
    done, total = lds[f"evaluations/lds.half.{SUBSETS}x2"]
    assert 9 <= done == total <= 10
    blocks = FeatureStore.open(str(folder / "store")).open_set("train").info.num_blocks
    embedded = {row["path"]: (row["committed"], row["total"]) for row in found["embeddings"]}
    assert embedded == {"embeddings/model/eval": (1, 1), "embeddings/model/train": (blocks, blocks)}
    console = Console(width=200, record=True, file=StringIO())
    console.print(render_status(found))
    assert re.search(rf"retrained/half +│ +{2 * SUBSETS} │ +{2 * SUBSETS} │ models", console.export_text())


def test_nothing_is_chosen_by_the_queries_that_are_reported(folder: Path) -> None:
    with pytest.raises(
        SpecError, match=r"evaluate\.lds\.choose: found 'eval', the queries that are reported: .*accepted"
    ):
        spec_of(folder, choose="eval")
    spec_of(folder)


def test_groups_are_refused_where_there_are_scores_alone_and_another_share_needs_another_name(folder: Path) -> None:
    spec = spec_of(folder)
    alone = spec.model_copy(update={"contribute": spec.contribute.model_copy(update={"mode": "scores"})})
    with pytest.raises(SpecError, match=r'evaluate\.lds\.groups: found True with contribute\.mode = "scores"'):
        evaluate_lds(alone, ENGINE, QUIET)
    evaluate_lds(spec, ENGINE, QUIET)
    with pytest.raises(
        ContractError, match=r"share: store has 0\.5, the run asks for 0\.25\n(.*\n)*.*evaluate\.lds\.name"
    ):
        evaluate_lds(spec_of(folder, share=0.25), ENGINE, QUIET)


def test_runs_on_the_same_examples_share_retrained_models(folder: Path) -> None:
    evaluate_lds(spec_of(folder), ENGINE, QUIET)
    projection = {"projection": {"kind": "dense", "features": 8}}
    spec = spec_of(folder, projection, "projected", store=str(folder / "store"))
    for stage in (featurize, build_kernel, contribute, learn):
        stage(spec, ENGINE, QUIET)

    class Counts(InThisProcess):
        ran: list[str]

        def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
            self.ran = [*getattr(self, "ran", []), *(task.name for task in tasks)]
            return super().run(tasks)

    engine: Any = Counts()
    told = evaluate_lds(spec, engine, QUIET)

    assert [name for name in engine.ran if name.startswith("retrain")] == []
    store, first = FeatureStore.open(str(folder / "projected")), FeatureStore.open(str(folder / "store"))
    scores = c_of(store, "block_0p1", "eval").mean(2)
    (found,) = (
        row["measures"]["lds"]["mean"]
        for row in told["methods"]
        if (row["kernel"], row["method"]) == ("block_0p1", "unweighted")
    )
    assert found == pytest.approx(correlations(scores, outputs(first, "eval")).mean())
    assert_reported_as_told(folder / "projected", told)


def test_models_of_other_examples_are_not_shared(folder: Path, tmp_path: Path) -> None:
    evaluate_lds(spec_of(folder), ENGINE, QUIET)
    spec = spec_of(folder, None, "fewer", store=str(folder / "store"))
    data = spec.data.model_copy(update={"train": spec.data.train.model_copy(update={"rows": TRAIN - 10})})
    fewer = spec.model_copy(update={"data": data})
    for stage in (featurize, build_kernel, contribute, learn):
        stage(fewer, ENGINE, QUIET)

    with pytest.raises(ContractError, match=r"evaluate\.lds\.store: .*was made with other settings:\n(.*\n)+Leave"):
        evaluate_lds(fewer, ENGINE, QUIET)


def test_retrained_models_may_be_asked_for_another_output_than_features_are_of(folder: Path) -> None:
    spec = spec_of(folder, name="margins", output="margin", subsets=2, seeds=1, choose="learn")
    evaluate_lds(spec, ENGINE, QUIET)

    store = FeatureStore.open(spec.run.store)
    losses = RetrainedArtifact.open(store.storage, "half", "000001.0").read()
    margins = RetrainedArtifact.open(store.storage, "margins", "000001.0").read()
    # The same model, whose loss is log(1 + e^-m).
    expected = np.log1p(np.exp(-np.array(margins["output"])))
    assert np.array(losses["output"]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_what_was_measured_is_drawn_and_stands_on_the_report_page(folder: Path, tmp_path: Path) -> None:
    evaluate_lds(spec_of(folder), ENGINE, QUIET)
    score(spec_of(folder), ENGINE, QUIET)
    lds, store = f"lds-half-{SUBSETS}x2", str(folder / "store")

    files = plots(store, tmp_path / "plots")

    # Beside them may stand those of margins, of another test.
    assert {file.name for file in files if "margins" not in file.name} == {
        "weights.png",
        *(f"lds-by-group-{lds}-{kernel}.png" for kernel in DAMPINGS),
        *(f"lds-by-k-{lds}-learn-{kernel.replace('block', 'learned')}.png" for kernel in DAMPINGS),
    }
    for file in files:
        with Image.open(file) as image:
            # Axes, two colours of lines or bars, and their blends: an empty figure has but black and white.
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
        assert len(np.unique(pixels[np.ptp(pixels, axis=1) > 60], axis=0)) > 5
    _, page = report(store, tmp_path / "report.html", "block_0p1")
    text = page.read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,') == len(files) - 1
    assert "img-src data:;" in text


def test_a_store_of_nothing_to_draw_and_a_place_that_is_no_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match=r"--output: .*file is no folder"):
        plots(str(folder / "store"), tmp_path / "file")
    empty = read_spec(make_run(tmp_path, str(tmp_path / "store")))
    featurize(empty, ENGINE, QUIET)
    with pytest.raises(NotReadyError, match=r"holds neither weights nor LDS to draw\. Run `gradstore learn`"):
        plots(empty.run.store, tmp_path / "plots")
    assert not (tmp_path / "plots").exists()
