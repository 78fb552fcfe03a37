"""What a plan says of learning: objects, passes over features where C is not kept, and memory of what may be held."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from gradstore.cluster import Engine
from gradstore.plan import make_plan
from gradstore.plan.sizes import StagePlan
from gradstore.spec import RunSpec
from gradstore.spec.learning import LearnSection
from gradstore.spec.sections import ContributeSection
from gradstore.stages.progress import Progress
from gradstore.stages.run import STAGES
from gradstore.store.features import FeatureStore
from tests.runs import InThisProcess
from tests.synthetic import make


def run_of(folder: Path, mode: str = "tensor", **learn: Any) -> RunSpec:
    """A synthetic run of 80 rows and 5 learn queries."""
    contribute = ContributeSection.model_validate({"mode": mode})
    return make(folder).model_copy(
        update={"contribute": contribute, "learn": LearnSection(**{"k": 3, "epochs": 2, **learn})}
    )


def planned(spec: RunSpec) -> dict[str, StagePlan]:
    return {stage.name: stage for stage in make_plan(spec).stages}


@pytest.mark.parametrize(
    ("mode", "learn"),
    [("tensor", {"k": [2, 3]}), ("tensor", {"solver": "full_batch"}), ("streamed", {})],
    ids=["a grid", "full batch", "streamed"],
)
def test_what_learning_writes_is_planned(tmp_path: Path, mode: str, learn: dict[str, Any]) -> None:
    spec = run_of(tmp_path, mode, **learn)
    plan = planned(spec)

    for stage in STAGES:
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))

    storage = FeatureStore.open(spec.run.store).storage
    folders = {"learn": ["weights"], "contribute": ["queries", "contributions", "moments"], "score": ["scores"]}
    for name, of in folders.items():
        written = [item for folder in of for item in storage.list_objects(folder)]
        assert len(written) == plan[name].objects, name


def test_passes_over_the_features_are_told_where_c_is_not_kept(tmp_path: Path) -> None:
    notes = make_plan(run_of(tmp_path, "streamed")).notes

    (told,) = [note for note in notes if "build C" in note]
    assert told.endswith("passes over them in place of each read of C: 1 for learn, 1 for eval")
    assert not [note for note in make_plan(run_of(tmp_path)).notes if "build C" in note]


def test_building_takes_memory_of_the_process_that_runs_the_command(tmp_path: Path) -> None:
    kept, built = planned(run_of(tmp_path)), planned(run_of(tmp_path, "streamed"))

    for name in ("learn", "score"):
        assert built[name].client_memory_bytes > kept[name].client_memory_bytes
        assert built[name].task_memory_bytes == kept[name].task_memory_bytes


def test_candidates_and_the_streaming_that_certifying_falls_back_to_count(tmp_path: Path) -> None:
    def memory(**learn: Any) -> int:
        return planned(run_of(tmp_path, **learn))["learn"].client_memory_bytes

    assert memory(k=[2, 3], epochs=100) > memory(k=3, epochs=100)
    # Where nothing is kept, a tile of C is held still: 5 queries of 80 rows and 8 groups.
    assert memory(memory="1B", epochs=1) >= memory(method="streamed", epochs=1) >= 4 * 5 * 80 * 8
    assert memory(k=2000, held_out=0.5, objective="pairs", pairs="pairs.csv") > memory(
        objective="pairs", pairs="pairs.csv"
    )
