"""The studies of pipelines/: every run.toml is one, and those of full size are planned without weights and data."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from scipy.stats import rankdata

from gradstore.plan import make_plan
from gradstore.spec import read_spec

PIPELINES = Path(__file__).parents[2] / "pipelines"
# By folder: groups, and parameters in millions.
FULL_SIZE = {
    "artbench2-ddpm": (134, 71.4),
    "cifar2-ddpm": (113, 35.7),
    "imagenet-resnet18": (41, 11.7),
    "imagenet-vit-b16": (99, 86.6),
    "openwebtext-llama3-8b": (224, 8030.0),
    "wikitext103-gpt2": (48, 124.4),
}


def runs_of(path: Path) -> set[Path]:
    """The runs that a study names."""
    study = tomllib.loads(path.read_text(encoding="utf-8"))
    rows = [row for table in study["tables"] for row in table["rows"]]
    transfers = study.get("transfers", [])
    names = [row["run"] for row in (*rows, *transfers)] + [transfer["into"] for transfer in transfers]
    names += [run for _, run in study.get("before", [])]
    return {path.with_name(name) for name in names}


RUNS = sorted({*PIPELINES.glob("*/run.toml")}.union(*map(runs_of, PIPELINES.glob("*/study.toml"))))


@pytest.mark.parametrize("path", RUNS, ids=[f"{path.parent.name}/{path.name}" for path in RUNS])
def test_what_a_study_names_is_a_run(path: Path) -> None:
    read_spec(path)


def test_every_file_of_a_study_is_a_run_or_included_by_one() -> None:
    included = {
        (path.parent / name).resolve()
        for path in PIPELINES.glob("*/*.toml")
        for name in tomllib.loads(path.read_text(encoding="utf-8")).get("include", [])
    }
    studies = {*PIPELINES.glob("*/study.toml")}
    assert {*PIPELINES.glob("*/*.toml")} - studies <= {*RUNS} | included


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_run_of_full_size_is_planned_from_its_shape_alone(name: str) -> None:
    groups, millions = FULL_SIZE[name]

    plan = make_plan(read_spec(PIPELINES / name / "run.toml"))

    told = plan.to_json()
    assert len(plan.partition.groups) == groups
    assert plan.partition.total_parameters / 1e6 == pytest.approx(millions, rel=0.01)
    assert {stage["name"] for stage in told["stages"]} >= {"featurize", "contribute", "learn", "score"}
    json.dumps(told)


def test_a_study_that_was_run_has_its_results_in_the_docs() -> None:
    page = (PIPELINES.parent / "docs" / "results.md").read_text(encoding="utf-8")
    for results in PIPELINES.glob("*/results.md"):
        assert results.read_text(encoding="utf-8").strip() in page
        assert json.loads(results.with_name("results.json").read_text(encoding="utf-8"))["runs"]


@pytest.mark.parametrize("study", sorted({path.parent.name for path in PIPELINES.glob("*/outputs.parquet")}))
def test_reported_lds_is_computed_again_from_ranks_and_what_retrained_models_output(study: str) -> None:
    folder = PIPELINES / study
    values = parquet.read_table(folder / "values.parquet").to_pandas()
    outputs = parquet.read_table(folder / "outputs.parquet").to_pandas()
    runs = json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]
    checked = 0
    for run, measures in runs.items():
        if "lds" not in measures:
            continue
        spec, told = read_spec(folder / run), measures["lds"]
        assert spec.evaluate.lds is not None
        url, keeper = spec.run.store, spec.evaluate.lds.store or spec.run.store
        of_store = values[values.store == Path(url).name]
        kept = outputs[(outputs.store == Path(keeper).name) & (outputs.set == "eval") & (outputs["name"] == "half")]
        actual = -kept.groupby(["subset", "query"]).output.mean().unstack()
        for row in told["methods"]:
            name = f"lds.{spec.evaluate.lds.title}/{row['kernel'] or 'baseline'}.{row['method']}"
            found = of_store[(of_store.evaluation == name) & of_store.group.isna()]
            ranks = np.array(found.ranks.tolist()) - (told["subsets"] + 1) / 2
            of_queries = rankdata(actual[found.row].to_numpy().T, axis=1) - (told["subsets"] + 1) / 2
            # Spearman's correlation is that of ranks.
            with np.errstate(invalid="ignore"):
                again = (ranks * of_queries).sum(1) / np.sqrt((ranks**2).sum(1) * (of_queries**2).sum(1))
            # A query of which a method says nothing counts as 0.
            assert np.nan_to_num(again).mean() == pytest.approx(row["measures"]["lds"]["mean"], abs=1e-6)
            checked += 1
    assert checked > 5
