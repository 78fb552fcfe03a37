"""score.matrices: all scores of every weighting, written beside the rankings from one read of C."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

import gradstore
from gradstore.cluster import Engine
from gradstore.errors import ContractError, NotReadyError, SpecError
from gradstore.plan import make_plan
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.influence import Asked, find_influence
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.score import score
from gradstore.store.artifacts import ContributionArtifact, ScoreMatrixArtifact, WeightsArtifact, remove_artifact
from gradstore.store.features import FeatureStore
from tests import oracle, stores
from tests.contributing import give_weights, stored_c
from tests.gradients import RandomStore, random_store
from tests.runs import InThisProcess
from tests.stores import all_objects
from tests.synthetic import synthesized

ENGINE, QUIET = cast(Engine, InThisProcess()), Progress(quiet=True)
INVALID = (2, 7)
GIVEN = {group: (1.0 + place) / 10 for place, group in enumerate(stores.GROUPS)}
WITHOUT_MODEL = {"queries": 0}
ALONE = {"mode": "scores", "weights": "given"}


def scored(made: RandomStore, changes: dict[str, dict[str, Any]]) -> tuple[RunSpec, FeatureStore]:
    store = FeatureStore.open(made.url)
    give_weights(store, GIVEN)
    asked = {"k": 3, "matrices": True, "weights": ["given"], "tail_patch": WITHOUT_MODEL}
    spec = made.spec({**changes, "score": asked})
    for stage in (build_kernel, contribute, learn, score):
        stage(spec, ENGINE, QUIET)
    return spec, store


def matrix(store: FeatureStore, name: str) -> np.ndarray:
    """S as it is stored, [Q, N]."""
    artifact = ScoreMatrixArtifact.open(store.storage, name, "eval")
    return np.concatenate([artifact.read(block) for block in range(artifact.shape.num_blocks)], axis=1)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_scores_of_every_weighting_are_the_oracles_and_nan_where_a_row_is_not_valid(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the queries of a block are read in several parts.
    monkeypatch.setattr("gradstore.stages.contributions.verified_queries", lambda *_: 2)

    _, store = scored(random_store(invalid=INVALID), {"contribute": {"dtype": dtype}})

    c = stored_c(store, "eval")
    valid = [row for row in range(11) if row not in INVALID]
    weights = {"unweighted": np.full(len(GIVEN), 1 / len(GIVEN)), "given": np.array([*GIVEN.values()])}
    for name, vector in weights.items():
        found = matrix(store, f"block.{name}")
        np.testing.assert_allclose(found[:, valid], oracle.scores(c[:, valid], vector), rtol=1e-6, atol=1e-9)
        assert np.isnan(found[:, list(INVALID)]).all()
    assert matrix(store, "block.learned").shape == (3, 11)


def test_scores_are_stored_before_they_are_squared() -> None:
    _, store = scored(random_store(output="das"), {"kernel": {"kind": "full"}})

    c = stored_c(store, "eval", "full")
    found = matrix(store, "full.unweighted")
    np.testing.assert_allclose(found, oracle.scores(c, np.full(c.shape[2], 1 / c.shape[2])), rtol=1e-5, atol=1e-9)
    assert ScoreMatrixArtifact.open(store.storage, "full.unweighted", "eval").settings["transform"] == "square"


def test_what_is_there_is_not_read_or_made_again_and_what_was_pruned_alone_is(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, store = scored(random_store(), {})
    before = all_objects(store.storage)
    remove_artifact(store.storage, "score-matrices/block.given/eval")

    score(spec, ENGINE, QUIET)

    after = all_objects(store.storage)
    assert {path: after[path] for path in before if path.startswith("score-matrices/") and "/c." in path} == {
        path: value for path, value in before.items() if path.startswith("score-matrices/") and "/c." in path
    }
    monkeypatch.setattr(ContributionArtifact, "read", lambda *_: pytest.fail("C is read again"))
    score(spec, ENGINE, QUIET)


def test_they_are_those_of_the_mode_that_makes_scores_alone() -> None:
    spec, store = scored(random_store(), {})
    before = all_objects(store.storage)

    contribute(spec.model_copy(update={"contribute": spec.contribute.model_copy(update=ALONE)}), ENGINE, QUIET)

    assert all_objects(store.storage) == before
    of_c = find_influence(store.storage.url, Asked(weights="given")).totals
    remove_artifact(store.storage, "contributions/block/eval")
    np.testing.assert_allclose(find_influence(store.storage.url, Asked(weights="given")).totals, of_c, rtol=1e-5)


def test_they_open_as_a_lazy_dataset_with_the_examples_beside() -> None:
    _, store = scored(random_store(invalid=INVALID), {})

    opened = gradstore.open_scores(store.storage.url, "block.given")

    np.testing.assert_array_equal(opened["scores"].values, matrix(store, "block.given"))
    np.testing.assert_array_equal(opened["scores"][1, 3:7].values, matrix(store, "block.given")[1, 3:7])
    assert opened["scores"].dims == ("query", "example")
    assert opened["example_id"].values.tolist() == [f"train-{row}" for row in range(11)]
    assert opened["query_example_id"].values.tolist() == [f"eval-{row}" for row in range(3)]
    assert opened.attrs["settings"]["weights"]["name"] == "given"
    ScoreMatrixArtifact.open(store.storage, "block.given", "eval").log.take_back(1, "repair")
    later = gradstore.open_scores(store.storage.url, "block.given")["scores"]
    assert np.isnan(later[:, 4:8].values).all()
    with pytest.raises(NotReadyError, match=r"score-matrices/block\.none/eval: there is no such artifact"):
        gradstore.open_scores(store.storage.url, "block.none")


def test_weights_that_were_learned_otherwise_under_the_same_name_are_refused() -> None:
    spec, store = scored(random_store(), {})
    for path in ("weights/given", "scores/block.given"):
        remove_artifact(store.storage, path)
    settings = {"kernel": "block", "queries": "learn", "learner": {"k": 2}}
    table = pa.table({"group": [*GIVEN], "weight": [*GIVEN.values()]})
    WeightsArtifact.create(store.storage, "given", settings=settings).write(table, pa.table({}), facts={})

    with pytest.raises(ContractError, match=r"score-matrices/block\.given/eval"):
        score(spec, ENGINE, QUIET)


def test_without_c_they_are_refused_before_work_starts() -> None:
    with pytest.raises(SpecError, match=r'score\.matrices: found true with contribute\.mode = "streamed"'):
        random_store().spec({"score": {"matrices": True}, "contribute": {"mode": "streamed"}})


def test_their_objects_and_bytes_are_planned(tmp_path: Path) -> None:
    synthesized(tmp_path)
    spec = read_spec(tmp_path / "run.toml")
    asked = spec.model_copy(update={"score": spec.score.model_copy(update={"matrices": True})})
    for stage in (build_kernel, contribute, learn, score):
        stage(asked, ENGINE, QUIET)

    with_them, without = (
        next(stage for stage in make_plan(run).stages if stage.name == "score") for run in (asked, spec)
    )

    files = [path for path in (Path(spec.run.store) / "score-matrices").rglob("*") if path.is_file()]
    assert with_them.objects - without.objects == len(files)
    chunks = sum(path.stat().st_size for path in files if path.name.startswith("c."))
    assert with_them.written_bytes - without.written_bytes == chunks
