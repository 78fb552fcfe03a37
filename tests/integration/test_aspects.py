"""Aspects: further sets of queries to learn from, each with its own weights, of a new run and of one that is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from gradstore.adapters.synthetic import Synthetic
from gradstore.cluster import Engine
from gradstore.plan import make_plan
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.progress import Progress
from gradstore.stages.run import stages_of
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.features import FeatureStore
from tests.runs import InThisProcess, make_run
from tests.stores import all_objects
from tests.synthetic import make

ASPECTS = {"data.aspects.style": {"rows": 8}, "data.aspects.subject": {"rows": 5}}


def run(spec: RunSpec) -> FeatureStore:
    """Go the whole path, in this process."""
    for stage in stages_of(spec):
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
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
    planned = make_plan(spec)
    assert sum(stage.objects for stage in planned.stages) == len(after)


def test_an_aspect_whose_signal_is_in_other_groups_is_given_other_weights(tmp_path: Path) -> None:
    make(tmp_path, rows=400, queries=8, learn_queries=16, groups=16, features=32, block_rows=128, contributors=4)
    toml = tmp_path / "run.toml"
    toml.write_text(toml.read_text(encoding="utf-8") + "\n[data.aspects.style]\nrows = 16\n", encoding="utf-8")
    spec = read_spec(toml)
    spec = spec.model_copy(update={"learn": spec.learn.model_copy(update={"k": 4, "epochs": 20})})

    store = run(spec)

    adapter = make_adapter(spec)
    assert isinstance(adapter, Synthetic)
    for set_name, name in spec.learn_targets():
        found, good = weights(store, name), adapter.planted.good_of[set_name]
        assert found[good].sum() > 0.6
        assert found[good].min() > found[~good].max()
