"""Evaluations on the report: the tables say what the commands told, of one kernel and of baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gradstore.numerics.metrics import area_under_curve
from gradstore.stages.evaluate import evaluate_recall
from gradstore.stages.report.evaluations import measured_tables
from gradstore.store.artifacts import EvaluationArtifact
from gradstore.store.features import FeatureStore
from tests import contributing
from tests.contributing import GROUPS, ROWS, give_weights, make_spec, make_store
from tests.unit.test_evaluate_recall import ENGINE, QUIET

WEIGHTS = dict(zip(GROUPS, (0.7, 0.1, 0.0, 0.2), strict=True))


@pytest.fixture(scope="module")
def store() -> FeatureStore:
    made = make_store()
    contributing.run(make_spec(made))
    give_weights(made, WEIGHTS)
    return made


def write(store: FeatureStore, measure: str, method: str, **columns: Any) -> None:
    artifact = EvaluationArtifact.create(store.storage, measure, method, settings={"measure": measure})
    artifact.write(pa.table(columns), facts={})


def test_recall_is_shown_as_it_was_told(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "shapes.csv").write_text(
        "id,value\n" + "".join(f"example {row},{row % 3}\n" for row in range(ROWS["train"]))
    )
    recall = {"by": str(tmp_path / "shapes.csv"), "name": "shape", "k": [3]}
    spec = make_spec(
        store,
        learn={"name": "given"},
        evaluate={"baselines": ["random"], "recall": recall},
    )
    told = evaluate_recall(spec, ENGINE, QUIET)

    tables = {table.title: table for table in measured_tables(store, "block")}

    assert [*tables] == [
        "Known contributors, recall@3 (shape)",
        "Known contributors, precision@3 (shape)",
        "Known contributors, reciprocal rank (shape)",
    ]
    rows = tables["Known contributors, precision@3 (shape)"].rows
    assert [row.method for row in rows] == ["unweighted", "given", "random"]
    for row, of in zip(rows, told["methods"], strict=True):
        found = of["measures"]["precision@3"]
        assert (row.mean, row.ci_low, row.ci_high) == tuple(100 * found[key] for key in ("mean", "low", "high"))
        difference = found.get("difference")
        assert row.difference == (difference and tuple(100 * difference[key] for key in ("mean", "low", "high")))
    assert rows[1].difference is not None
    # Of another kernel the baselines alone are shown.
    assert {row.method for table in measured_tables(store, "other") for row in table.rows} == {"random"}


def test_lds_counts_queries_of_which_nothing_is_said_and_leaves_out_what_was_chosen_by() -> None:
    store = make_store()
    for method, values in (("block.unweighted", [0.5, float("nan"), 0.1]), ("block.given", [0.5, 0.3, 0.4])):
        for measure in ("lds.half.4x1", "lds.half.4x1.learn"):
            write(store, measure, method, query=[0, 1, 2], correlation=values, predicted=[[0.0]] * 3)
    write(store, "lds.half.4x1", "block.groups", query=[0], correlation=[0.1], group=["a"])

    (table,) = measured_tables(store, "block")

    assert table.title == "LDS (half.4x1)"
    assert [row.method for row in table.rows] == ["unweighted", "given"]
    assert [row.mean for row in table.rows] == pytest.approx([20, 40])
    assert table.rows[1].difference is not None
    assert table.rows[1].difference[0] == pytest.approx(20)


def test_wrong_labels_are_told_by_their_area() -> None:
    store = make_store()
    wrong = np.array([True, False, False, True, False])
    for method, values in (
        ("block.unweighted", [0.9, 0.1, 0.5, 0.3, 0.2]),
        ("baseline.loss", [5.0, 1.0, 2.0, 4.0, 3.0]),
    ):
        table = {"example": [*range(5)], "wrong": wrong.tolist(), "auc": values}
        write(store, "mislabel", method, **table)

    (found,) = measured_tables(store, "block")

    assert found.title == "Wrong labels, auc"
    assert [row.mean for row in found.rows] == [
        pytest.approx(100 * area_under_curve(np.array([0.9, 0.1, 0.5, 0.3, 0.2]), wrong)),
        pytest.approx(100),
    ]
