"""C that is not kept: built from features in place of every read, to the weights and rankings of C that is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine
from gradstore.errors import ContractError, NotReadyError
from gradstore.plan import contribute as contribute_plan
from gradstore.spec.learning import LearnSection
from gradstore.spec.sections import ContributeSection
from gradstore.stages.building import BuiltContributions, open_contributions
from gradstore.stages.contributions import Contributions, StoredContributions
from gradstore.stages.influence import Asked, find_influence
from gradstore.stages.progress import Progress
from gradstore.stages.report import report
from gradstore.stages.run import stages_of
from gradstore.stages.score.sources import Ranks, open_source, weighted_methods
from gradstore.store.artifacts import ContributionArtifact, MomentsArtifact, list_artifacts
from gradstore.store.features import FeatureStore
from tests import contributing
from tests.contributing import make_spec, make_store
from tests.learning import learned, weights_of
from tests.runs import InThisProcess
from tests.synthetic import make

Tables = Mapping[str, Mapping[str, Any]]
INVALID = (2, 9)


def made(mode: str, tables: Tables | None = None, **store: Any) -> tuple[FeatureStore, dict[str, dict[str, Any]]]:
    """A store with what contribute makes in a mode, and the tables of its run."""
    found = make_store(**{"invalid": INVALID, **store})
    given = {name: dict(values) for name, values in (tables or {}).items()}
    given["contribute"] = {**given.get("contribute", {}), "mode": mode}
    contributing.run(make_spec(found, **given))
    return found, given


def whole(contributions: Contributions, first: int, last: int) -> np.ndarray:
    """C of some queries, [q, n, M], of the valid rows; every one is read once."""
    rows = contributions.valid_rows()
    found = np.full((last - first, contributions.shape.rows, len(contributions.shape.groups)), np.nan, np.float32)
    for start, rows_N, c_QNM in contributions.read(first, last):
        place = found[start - first : start - first + len(c_QNM)]
        assert np.isnan(place[:, rows_N]).all()
        place[:, rows_N] = c_QNM
    return found[:, rows]


def rankings(store: FeatureStore, tables: Tables) -> dict[str, Ranks]:
    """Every ranking by weights."""
    spec = make_spec(store, **tables)
    found = open_source(spec, store).rank(weighted_methods(spec), 6, Progress(quiet=True))
    return {method.name: ranks for method, ranks in found.items()}


CASES: dict[str, tuple[Tables, dict[str, Any]]] = {
    "float32": ({}, {}),
    "blocks of 4 rows": ({}, {"block_rows": 4}),
    "members": (
        {"model": {"members": [{"name": "a", "eta": 0.5}, {"name": "b", "eta": 2.0}]}},
        {"members": ("a", "b")},
    ),
    "cosine": ({"contribute": {"normalize": "cosine"}}, {}),
    "identity": ({"kernel": {"kind": "identity"}}, {}),
    "full": ({"kernel": {"kind": "full", "damping": 0.3, "mode": "relative"}}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_c_that_is_built_is_c_that_is_stored(case: str) -> None:
    tables, shape = CASES[case]
    (kept, of_kept), (bare, of_bare) = made("tensor", tables, **shape), made("streamed", tables, **shape)

    for set_name, queries in (("learn", 5), ("eval", 4)):
        stored = open_contributions(make_spec(kept, **of_kept), kept, set_name)
        built = open_contributions(make_spec(bare, **of_bare), bare, set_name)
        assert isinstance(stored, StoredContributions)
        assert isinstance(built, BuiltContributions)
        assert {**built.settings, "kernel": None, "built": None} == {**stored.settings, "kernel": None, "built": None}
        np.testing.assert_array_equal(built.valid_rows(), stored.valid_rows())
        for first, last in ((0, queries), (1, 3)):
            found, expected = whole(built, first, last), whole(stored, first, last)
            assert np.isfinite(found).all()
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    assert ContributionArtifact.find_named(bare.storage, of_kept.get("kernel", {}).get("kind", "block"), "eval") is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_built_is_what_was_summed_to_the_last_bit(dtype: str) -> None:
    store, tables = made("streamed", {"contribute": {"dtype": dtype}})

    c = whole(open_contributions(make_spec(store, **tables), store, "learn"), 0, 5)

    moments = MomentsArtifact.open(store.storage, ("block", "learn"))
    valid = np.delete(np.arange(23), INVALID)
    for span in range(moments.shape.num_spans):
        found = moments.read_span(span)
        for query, (rows, kept) in enumerate(zip(found.rows, found.candidates, strict=True)):
            places = np.searchsorted(valid, rows[rows >= 0])
            np.testing.assert_array_equal(c[query, places], kept[rows >= 0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_without_sums_nothing_is_kept_and_nothing_rounded(dtype: str) -> None:
    store, tables = made("streamed", {"contribute": {"dtype": dtype, "second_moments": False}})
    other, of_other = made("tensor")

    weights, facts = weights_of(store, "learned", tables)

    np.testing.assert_allclose(weights, weights_of(other, "learned", of_other)[0], rtol=1e-5)
    assert facts["method"] == "certified"
    assert {item.kind for item in list_artifacts(store.storage)} == {"kernel", "queries", "weights"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "streamed"},
        {"solver": "full_batch", "k": [2, 3]},
        {"solver": "closed_form"},
        {"noise": 0.5},
        {"objective": "gap"},
    ],
    ids=str,
)
def test_weights_and_rankings_are_those_of_c_that_is_kept(settings: dict[str, Any]) -> None:
    (kept, of_kept), (bare, of_bare) = made("tensor"), made("streamed")

    expected, facts = weights_of(kept, "learned", of_kept, **settings)
    found, others = weights_of(bare, "learned", of_bare, **settings)

    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert others["method"] == facts["method"]
    assert others["reads_in_all"] == facts["reads_in_all"]
    ours, theirs = rankings(bare, of_bare), rankings(kept, of_kept)
    assert {*ours} == {*theirs} == {"unweighted", "learned"}
    for name, ranks in theirs.items():
        for side in ("proponents", "opponents"):
            of_built, of_stored = getattr(ours[name], side), getattr(ranks, side)
            np.testing.assert_array_equal(of_built.rows, of_stored.rows)
            np.testing.assert_allclose(of_built.scores, of_stored.scores, rtol=1e-4)
            np.testing.assert_allclose(of_built.parts, of_stored.parts, rtol=1e-4, atol=1e-5)


def test_further_weights_rank_in_the_same_pass() -> None:
    store, tables = made("streamed", {"score": {"weights": ["given"]}})
    contributing.give_weights(store, {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4})
    weights_of(store, "learned", tables)

    assert {*rankings(store, tables)} == {"unweighted", "learned", "given"}


def test_queries_in_parts_take_passes_of_their_own_and_have_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    store, tables = made("streamed")
    once, facts = weights_of(store, "once", tables)
    small, of_small = make_store(invalid=INVALID), {**tables, "cluster": {"memory_per_worker": "4GiB"}}
    monkeypatch.setattr(contribute_plan, "_SHARE", 4 * 2**30 / 1000)
    monkeypatch.setattr("gradstore.stages.contribute.artifacts.query_tile", lambda *_: 2)
    monkeypatch.setattr("gradstore.stages.contribute.artifacts.refuse_moments", lambda *_: None)
    contributing.run(make_spec(small, **of_small))
    built = open_contributions(make_spec(small, **of_small), small, "learn")
    assert isinstance(built, BuiltContributions)

    in_parts, others = weights_of(small, "parts", of_small)

    assert [(slab.first, slab.last) for slab in built.slabs] == [(0, 2), (2, 5)]
    assert built.slices(1, 5) == [(1, 2), (2, 5)]
    np.testing.assert_allclose(in_parts, once, rtol=1e-5)
    assert others["reads"] == facts["reads"]
    streamed, _ = weights_of(small, "streamed", of_small, method="streamed")
    np.testing.assert_allclose(streamed, once, rtol=1e-5)


def test_weights_are_those_of_c_that_is_kept_so_that_either_goes_on() -> None:
    store, tables = made("tensor")
    artifact = learned(store, "learned", tables)
    written = artifact.log.require(0, "not written").attempt

    other = {"contribute": {"mode": "streamed"}}
    contributing.run(make_spec(store, **other))

    assert learned(store, "learned", other).log.require(0, "not written").attempt == written


def test_without_queries_or_with_others_there_is_nothing_to_build_from() -> None:
    store = make_store()
    spec = make_spec(store, contribute={"mode": "streamed"})
    with pytest.raises(NotReadyError):
        open_contributions(spec, store, "learn")
    contributing.run(spec)

    other = make_spec(store, contribute={"mode": "streamed"}, kernel={"kind": "block", "damping": 0.7})
    with pytest.raises(ContractError, match="queries/block/learn/m0 was made with other settings"):
        open_contributions(other, store, "learn")


def test_a_run_without_c_goes_the_whole_path_to_the_report(tmp_path: Path) -> None:
    kept, bare = (make(tmp_path / mode).model_copy(update=changes(mode)) for mode in ("tensor", "streamed"))

    for spec in (kept, bare):
        for stage in stages_of(spec):
            stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))

    store = FeatureStore.open(bare.run.store)
    kinds = {item.kind for item in list_artifacts(store.storage)}
    assert {"weights", "scores", "moments", "queries"} <= kinds
    assert "contributions" not in kinds
    theirs, ours = (report(spec.run.store, None, "identity")[0] for spec in (kept, bare))
    (expected,), (found,) = theirs.weights, ours.weights
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-4)
    assert len(ours.queries) > 0
    for of_bare, of_kept in zip(ours.queries, theirs.queries, strict=True):
        assert {*of_bare.rankings} == {*of_kept.rankings}
    for weights in (None, "learned"):
        summed, of_c = (find_influence(spec.run.store, Asked(weights=weights)) for spec in (bare, kept))
        np.testing.assert_array_equal(summed.rows, of_c.rows)
        np.testing.assert_allclose(summed.totals, of_c.totals, rtol=1e-4, atol=1e-5 * np.abs(of_c.totals).max())


def changes(mode: str) -> dict[str, Any]:
    """What a run of a mode has otherwise than a synthetic one."""
    return {"contribute": ContributeSection.model_validate({"mode": mode}), "learn": LearnSection(k=3, epochs=2)}
