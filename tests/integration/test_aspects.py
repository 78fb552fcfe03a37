"""Aspects: further sets of queries to learn from, each with its own weights, of a new run and of one that is done."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest

from gradstore.adapters.synthetic import Synthetic
from gradstore.cluster import Engine
from gradstore.errors import ContractError
from gradstore.opening import open_contributions, open_features
from gradstore.plan import make_plan
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.delete import Query, delete
from gradstore.stages.export import Selection, export
from gradstore.stages.featurize import featurize
from gradstore.stages.progress import Progress
from gradstore.stages.prune import prune
from gradstore.stages.repair import repair
from gradstore.stages.report import report
from gradstore.stages.run import stages_of
from gradstore.stages.stat import stat
from gradstore.stages.status import status
from gradstore.stages.verify import verify
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.features import FeatureStore
from tests.runs import InThisProcess, make_run
from tests.stores import all_objects
from tests.synthetic import make

QUIET = Progress(quiet=True)
ASPECTS = {"data.aspects.style": {"rows": 8}, "data.aspects.subject": {"rows": 5}}


def run(spec: RunSpec) -> FeatureStore:
    """Go the whole path, in this process."""
    for stage in stages_of(spec):
        stage(spec, cast(Engine, InThisProcess()), QUIET)
    return FeatureStore.open(spec.run.store)


def spec_of(folder: Path, changes: Mapping[str, Mapping[str, Any]] | None = None) -> RunSpec:
    tables = {"score.tail_patch": {"queries": 0}, **(changes or {})}
    return read_spec(make_run(folder, str(folder / "store"), tables))


def weights(store: FeatureStore, name: str) -> np.ndarray:
    return np.array(WeightsArtifact.open(store.storage, name).read()["weight"])


def test_an_aspect_that_is_added_to_a_finished_run_leaves_all_that_is_there_as_it_is(tmp_path: Path) -> None:
    before = all_objects(run(spec_of(tmp_path)).storage)

    spec = spec_of(tmp_path, ASPECTS)
    store = run(spec)

    after = all_objects(store.storage)
    assert {path for path, content in before.items() if after[path] != content} == set()
    assert [name for _, name in spec.learn_targets()] == ["learned", "learned-style", "learned-subject"]
    for name in ("style", "subject"):
        of_aspect = weights(store, f"learned-{name}")
        assert abs(of_aspect.sum() - 1) < 1e-9
        assert not np.allclose(of_aspect, weights(store, "learned"))
        assert any(path.startswith(f"scores/block.learned-{name}/") for path in after)
    # And the plan knew what all of it would be.
    assert sum(stage.objects for stage in make_plan(spec).stages) == len(after)

    grown = spec_of(tmp_path, {**ASPECTS, "data.aspects.subject": {"rows": 6}})
    with pytest.raises(
        ContractError, match=r"has 5 examples, data.aspects.subject has 1 more after them. Add --append"
    ):
        featurize(grown, cast(Engine, InThisProcess()), QUIET)
    featurize(grown, cast(Engine, InThisProcess()), QUIET, append=True)

    assert store.open_set("learn-subject").info.num_examples == 6
    assert all(all_objects(store.storage)[path] == content for path, content in before.items())


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """A synthetic run with an aspect, to its scores."""
    folder = tmp_path_factory.mktemp("planted")
    make(folder, rows=400, queries=8, learn_queries=16, groups=16, features=32, block_rows=128, contributors=4)
    toml = folder / "run.toml"
    toml.write_text(toml.read_text(encoding="utf-8") + "\n[data.aspects.style]\nrows = 16\n", encoding="utf-8")
    spec = read_spec(toml)
    spec = spec.model_copy(update={"learn": spec.learn.model_copy(update={"k": 4, "epochs": 20})})
    run(spec)
    return spec


@pytest.fixture
def copied(planted: RunSpec, tmp_path: Path) -> RunSpec:
    """The same run with a store of its own."""
    shutil.copytree(planted.run.store, tmp_path / "store")
    return planted.model_copy(update={"run": planted.run.model_copy(update={"store": str(tmp_path / "store")})})


def test_an_aspect_whose_signal_is_in_other_groups_is_given_other_weights(planted: RunSpec) -> None:
    spec, store = planted, FeatureStore.open(planted.run.store)
    adapter = make_adapter(spec)
    assert isinstance(adapter, Synthetic)
    for set_name, name in spec.learn_targets():
        found, good = weights(store, name), adapter.planted.good_of[set_name]
        assert found[good].sum() > 0.6
        assert found[good].min() > found[~good].max()


def test_what_is_asked_of_a_store_knows_its_aspects(planted: RunSpec, tmp_path: Path) -> None:
    url = planted.run.store

    page = tmp_path / "report.html"
    report(url, page)
    export(url, tmp_path / "style.parquet", Selection(feature_set="learn-style"), force=False, progress=QUIET)

    assert {row["name"] for row in status(url)["feature_sets"]} == {"train", "learn", "eval", "learn-style"}
    assert {row["name"] for row in status(url)["scores"]} >= {"identity.learned", "identity.learned-style"}
    assert {row["name"]: row["rows"] for row in stat(url)["feature_sets"]}["learn-style"]["examples"] == 16
    assert verify(url, full=True, progress=QUIET)["problems"] == []
    assert "learned-style" in page.read_text(encoding="utf-8")
    assert pq.read_table(tmp_path / "style.parquet").num_rows == 16
    assert open_features(url, "learn-style").sizes["example"] == 16
    assert open_contributions(url, "identity", "learn-style").sizes["query"] == 16


def test_of_an_erased_query_of_an_aspect_alone_what_was_made_from_it_is_stale_and_made_anew(copied: RunSpec) -> None:
    url = copied.run.store

    found = delete(url, Query(ids=frozenset({"learn-style-3"})), (), QUIET, dry_run=False)

    assert found["erased"] == {"eval": [], "learn": [], "learn-style": [3], "train": []}
    made = {"queries/identity/learn-style/m0", "contributions/identity/learn-style", "moments/identity/learn-style"}
    assert made <= set(found["stale"]) <= made | {"weights/learned-style", "scores/identity.learned-style"}
    before = weights(FeatureStore.open(url), "learned-style")
    prune(url, (), stale=True, dry_run=False)
    for stage in stages_of(copied)[1:]:
        stage(copied, cast(Engine, InThisProcess()), QUIET)
    after = weights(FeatureStore.open(url), "learned-style")
    assert not np.array_equal(after, before)
    assert verify(url, full=True, progress=QUIET)["problems"] == []


def test_a_damaged_chunk_of_an_aspect_is_taken_back_and_computed_anew(copied: RunSpec) -> None:
    url = Path(copied.run.store)
    chunks = [
        next(path for path in sorted((url / part / "learn-style").rglob("c.*")) if path.stat().st_size > 100)
        for part in ("features", "contributions/identity")
    ]
    whole = [path.read_bytes() for path in chunks]
    for path, content in zip(chunks, whole, strict=True):
        path.write_bytes(content[:40] + b"damage" + content[46:])

    found = repair(str(url), full=True, dry_run=False, progress=QUIET)
    featurize(copied, cast(Engine, InThisProcess()), QUIET)
    prune(str(url), (), stale=True, dry_run=False)
    run(copied)

    assert {item["name"] for item in found["taken_back"]} == {
        "features/learn-style/m0",
        "contributions/identity/learn-style",
    }
    assert [path.read_bytes() for path in chunks] == whole
    assert verify(str(url), full=True, progress=QUIET)["problems"] == []
