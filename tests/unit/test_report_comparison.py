"""What a report says for and against weights: paired over the queries that both rankings were measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from gradstore.cluster import Engine
from gradstore.spec import read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.report import Comparison
from gradstore.stages.report.comparison import compare
from gradstore.stages.report.formatting import sentence
from gradstore.stages.score import score
from gradstore.store.artifacts import ScoresArtifact
from tests.contributing import give_weights
from tests.runs import InThisProcess, gradstore
from tests.synthetic import synthesized

ENGINE, QUIET = cast(Engine, InThisProcess()), Progress(quiet=True)
STEP = {"k": 10, "optimizer": "adamw", "learning_rate": 1e-5}


def summary(weights: str | None, percent: dict[int, float], **changes: Any) -> dict[str, Any]:
    patch = {**STEP, "rows": [*percent], "percent": [*percent.values()], **changes}
    return {"weights": weights, "tail_patch": patch, "precisions": None}


@pytest.mark.parametrize(("shift", "verdict"), [(1.0, "better"), (-1.0, "worse"), (0.0, "unknown")])
def test_the_difference_is_paired_and_its_interval_tells(shift: float, verdict: str) -> None:
    # What a query is worth differs a hundred times as much as what weights do to it.
    without = {query: 100.0 * query for query in range(8)}
    wiggle = [0.3, -0.3, 0.1, -0.1, 0.2, -0.2, 0.05, -0.05]

    (found,) = compare(
        [
            summary(None, without),
            summary("learned", {query: without[query] + shift + wiggle[query] for query in reversed(range(8))}),
        ],
        seed=0,
    )

    assert (found.measure, found.weights, found.queries, found.verdict) == ("tail-patch", "learned", 8, verdict)
    assert found.difference == pytest.approx(shift, abs=1e-9)
    assert shift - 0.3 < found.ci_low < shift < found.ci_high < shift + 0.3


def test_only_queries_that_both_were_measured_on_count() -> None:
    (found,) = compare([summary(None, {0: 1.0, 1: 2.0, 2: 3.0}), summary("learned", {2: 5.0, 1: 5.0, 7: 9.0})], seed=0)

    assert found.queries == 2
    assert found.difference == pytest.approx((5.0 - 3.0 + 5.0 - 2.0) / 2)


def test_rankings_that_were_measured_otherwise_or_not_by_query_are_not_compared() -> None:
    values = dict.fromkeys(range(8), 1.0)
    of_before = {"weights": "learned", "tail_patch": {**STEP, "percent": [1.0], "queries": 1}, "precision_at_10": 0.5}

    assert compare([summary(None, values), summary("learned", values, k=5)], seed=0) == []
    assert compare([summary("learned", values)], seed=0) == []
    assert compare([summary(None, values), of_before], seed=0) == []
    assert compare([summary(None, values), summary("learned", {9: 1.0})], seed=0) == []


@pytest.mark.parametrize(("queries", "verdict"), [(1, "unknown"), (5, "unknown"), (6, "better")])
def test_few_queries_tell_nothing_even_if_all_agree(queries: int, verdict: str) -> None:
    values = [dict.fromkeys(range(queries), value) for value in (1.0, 2.0)]

    (found,) = compare([summary(None, values[0]), summary("learned", values[1])], seed=0)

    assert found.verdict == verdict
    assert ("too few to tell: it takes 6" in sentence(found)) == (verdict == "unknown")


def test_a_sentence_names_the_weights_on_one_line_and_shows_small_differences() -> None:
    found = Comparison(measure="tail-patch", weights="a\nb", difference=-2e-5, ci_low=-3e-5, ci_high=-1e-5, queries=9)

    assert sentence(found) == (
        "Tail-patch: weights “a b” do worse than none (difference \u22120.000020, 95 % interval \u22120.000030 to "
        "\u22120.000010, 9 queries)."
    )


def test_the_report_of_a_store_draws_and_judges_every_weighting(tmp_path: Path) -> None:
    store = synthesized(tmp_path, queries=4)
    groups = [array.name for array in store.open_set("train").info.arrays]
    give_weights(store, {group: 1.0 + place for place, group in enumerate(groups)})
    spec = read_spec(tmp_path / "run.toml")
    spec = spec.model_copy(update={"score": spec.score.model_copy(update={"weights": ["given"]})})
    for stage in (build_kernel, contribute, learn, score):
        stage(spec, ENGINE, QUIET)

    done = gradstore("report", spec.run.store, "--json", "-o", tmp_path / "report.html")
    table = gradstore("report", spec.run.store, "-o", tmp_path / "report.html")

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["report"] == str(tmp_path / "report.html")
    assert [*found["weights"]] == ["given", "learned"]
    assert [*found["weights"]["given"]] == groups
    means = {}
    for name in ("unweighted", "given", "learned"):
        precisions = ScoresArtifact.open(store.storage, f"identity.{name}").read_summary()["precisions"]
        assert precisions["rows"] == [0, 1, 2, 3]
        means[name] = sum(precisions["values"]) / 4
    assert {row["weights"]: row["difference"] for row in found["comparisons"]} == pytest.approx(
        {name: means[name] - means["unweighted"] for name in ("given", "learned")}
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count('class="weight-plot"') == 2
    shown = " ".join(table.stdout.split())
    for row in found["comparisons"]:
        assert row["says"] in page
        assert row["says"] in shown
