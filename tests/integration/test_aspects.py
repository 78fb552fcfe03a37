"""Aspects: further sets of queries to learn from, each with its own weights, of a new run and of one that is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from gradstore.cluster import Engine
from gradstore.spec import read_spec
from gradstore.stages.progress import Progress
from gradstore.stages.run import stages_of
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.features import FeatureStore
from tests.runs import InThisProcess, make_run
from tests.stores import all_objects

ASPECTS = {"data.aspects.style": {"rows": 8}, "data.aspects.subject": {"rows": 5}}


def run(folder: Path, changes: Mapping[str, Mapping[str, Any]] | None = None) -> FeatureStore:
    """Go the whole path of a small run, in this process."""
    store = str(folder / "store")
    spec = read_spec(make_run(folder, store, {"score.tail_patch": {"queries": 0}, **(changes or {})}))
    for stage in stages_of(spec):
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    return FeatureStore.open(store)


def weights(store: FeatureStore, name: str) -> list[float]:
    found: list[float] = WeightsArtifact.open(store.storage, name).read()["weight"].to_pylist()
    return found


def test_an_aspect_that_is_added_to_a_finished_run_leaves_all_that_is_there_as_it_is(tmp_path: Path) -> None:
    before = all_objects(run(tmp_path).storage)
    store = run(tmp_path, ASPECTS)
    after = all_objects(store.storage)
    assert {path for path, content in before.items() if after.get(path) != content} == set()
    added = sorted({"/".join(path.split("/")[:3]) for path in after.keys() - before.keys()})
    print(added)
    assert len(weights(store, "learned-style")) == len(weights(store, "learned"))
