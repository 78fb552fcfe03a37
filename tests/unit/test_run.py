"""run: what the store has of the names that it uses last is looked at before work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from gradstore.cluster import Engine
from gradstore.errors import ContractError, NotReadyError, SpecError
from gradstore.stages.contribute import contribute
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.run import STAGES, stages_of
from gradstore.stages.score import score
from gradstore.stages.transfer import transfer
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureStore
from tests import contributing
from tests.contributing import KERNEL, give_weights, make_spec, make_store
from tests.runs import InThisProcess, gradstore, make_run
from tests.stores import all_objects

SWEEP = {**KERNEL, "damping": [0.3, 3.0]}


@pytest.fixture(scope="module")
def learned() -> FeatureStore:
    """A store with the weights of a kernel, and of two dampings of another."""
    store = make_store()
    swept: dict[str, dict[str, Any]] = {"kernel": {**SWEEP, "name": "swept"}, "learn": {"name": "of-sweep"}}
    for spec in (make_spec(store), make_spec(store, **swept)):
        contributing.run(spec)
        learn(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    return store


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn": {"k": 3}}, r"learner\.k: store has 2, the run asks for 3"),
        ({"learn": {"learning_rate": 0.02}}, r"learner\.learning_rate: store has 0\.01, the run asks for 0\.02"),
        ({"run": {"seed": 7}}, r"learner\.seed: store has 0, the run asks for 7"),
        ({"kernel": {**KERNEL, "name": "other"}}, r"kernel: store has 'block', the run asks for 'other'"),
        (
            {"kernel": {**SWEEP, "name": "swept"}, "learn": {"name": "of-sweep", "epochs": 3}},
            r"weights/of-sweep_0p3 was made with other settings:\n  learner\.epochs: store has 2, the run asks for 3",
        ),
    ],
    ids=["k", "rate", "seed", "kernel", "sweep"],
)
def test_a_name_of_weights_that_were_learned_otherwise_is_refused_before_work_starts(
    learned: FeatureStore, changes: dict[str, dict[str, Any]], message: str
) -> None:
    before = all_objects(learned.storage)

    with pytest.raises(ContractError, match=message) as refused:
        stages_of(make_spec(learned, **changes))

    assert "Restore these settings, choose another learn.name, or run `gradstore prune memory://" in str(refused.value)
    assert all_objects(learned.storage) == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kernel": {**SWEEP, "name": "swept"}, "learn": {"name": "of-sweep"}},
        {"learn": {"name": "other", "k": 3}},
        {"contribute": {"mode": "streamed"}},
        # It learns nothing.
        {"learn": {"k": 3}, "contribute": {"mode": "scores", "weights": "learned"}},
    ],
    ids=["the same settings", "the same sweep", "another name", "streamed", "scores"],
)
def test_weights_that_a_run_can_go_on_with_or_does_not_learn_are_no_obstacle(
    learned: FeatureStore, changes: dict[str, dict[str, Any]]
) -> None:
    assert stages_of(make_spec(learned, **changes))[0] is featurize


def test_every_mode_has_its_stages(tmp_path: Path) -> None:
    store = {"run": {"store": str(tmp_path / "store")}}
    by_mode = {
        mode: stages_of(make_spec(make_store(), **store, contribute={"mode": mode}))
        for mode in ("tensor", "scores", "streamed")
    }

    assert by_mode["tensor"] == STAGES
    assert by_mode["scores"] == (featurize, build_kernel, contribute, score)
    assert by_mode["streamed"] == STAGES
    assert not (tmp_path / "store").exists()


def test_weights_that_scores_are_to_be_made_under_are_there_before_work_starts(tmp_path: Path) -> None:
    store, asked = make_store(), {"mode": "scores", "weights": "given"}
    nowhere = {"run": {"store": str(tmp_path / "store")}, "contribute": asked}

    with pytest.raises(NotReadyError, match=r"store/weights/given: there is no such artifact"):
        stages_of(make_spec(store, **nowhere))
    assert not (tmp_path / "store").exists()

    give_weights(store, {"a": 0.5, "b": 0.5})
    with pytest.raises(ContractError, match=r"weights/given: its groups are not those of features/train"):
        stages_of(make_spec(store, contribute=asked))


def test_the_command_refuses_before_it_reads_data_or_a_model(tmp_path: Path) -> None:
    missing = {"model": {"source": str(tmp_path / "nowhere")}, "data": {"source": str(tmp_path / "nowhere.jsonl")}}
    run = make_run(tmp_path, str(tmp_path / "store"), missing)
    learner = {"k": 4, "epochs": 3, "learning_rate": 0.01, "weight_decay": 0.1, "seed": 3, "tile": 1}
    settings = {"learner": learner, "kernel": "block", "queries": "learn"}
    WeightsArtifact.create(open_storage(str(tmp_path / "store")), "learned", settings=settings)

    refused = gradstore("run", run)

    assert refused.returncode == 4, refused.stderr
    assert (
        "weights/learned was made with other settings:\n  learner.k: store has 4, the run asks for 3" in refused.stderr
    )
    assert "reading" not in refused.stderr


def test_weights_of_another_store_are_no_name_to_learn_under(learned: FeatureStore) -> None:
    store = make_store()
    transfer(learned.storage.url, "learned", store.storage.url, "learned")

    with pytest.raises(ContractError, match=r"weights/learned was taken from memory://.*Choose another learn\.name"):
        stages_of(make_spec(store))
    # Ranked by, it needs not be learned.
    assert stages_of(make_spec(store, learn={"name": "own"}, score={"weights": ["learned"]})) == STAGES


def test_scores_alone_are_not_ranked_by_further_weights() -> None:
    with pytest.raises(SpecError, match=r'score\.weights: found other with contribute\.mode = "scores"'):
        make_spec(make_store(), contribute={"mode": "scores"}, score={"weights": ["other"]})
    with pytest.raises(SpecError, match="by which rows are ranked anyway"):
        make_spec(make_store(), score={"weights": ["unweighted"]})
