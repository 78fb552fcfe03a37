"""The sketch of a store: what it estimates against the oracle, what its candidates hold, and what is verified and refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine, Task
from gradstore.errors import ContractError, IntegrityError, NotReadyError, ResourceError, SpecError
from gradstore.plan.sketch import ladder, sketch_rank
from gradstore.spec import RunSpec
from gradstore.stages.contribute.queries import Slab, Target
from gradstore.stages.progress import Progress
from gradstore.stages.query.screened import rank_candidates
from gradstore.stages.ranking import Ranker, rank
from gradstore.stages.sketch import sketch
from gradstore.stages.sketches import Sketch
from gradstore.store.artifacts import SketchArtifact, remove_artifact
from gradstore.store.features import BlockReader, FeatureStore
from gradstore.store.layout import chunk_path
from tests import oracle
from tests.contributing import Interrupted, Interrupting, give_weights, make_spec, make_store, run, stored_c
from tests.runs import InThisProcess

ROWS = {"train": 200, "learn": 6, "eval": 4}
INVALID = (3, 150)
QUIET = Progress(quiet=True)
GIVEN = {"a": 0.1, "b": 0.4, "c": 0.2, "d": 0.3}
WEIGHTINGS = {"unweighted": np.full(4, 0.25), "given": np.array([*GIVEN.values()])}


def make_sketch(spec: RunSpec, engine: object | None = None) -> None:
    sketch(spec, cast(Engine, engine or InThisProcess()), QUIET)


def made(settings: Mapping[str, Any] | None = None, **tables: Mapping[str, Any]) -> tuple[FeatureStore, RunSpec]:
    """A store of 200 rows with contributions and a sketch, and its run."""
    store = make_store(**{"rows": ROWS, "block_rows": 32, "invalid": INVALID, **(settings or {})})
    spec = make_spec(store, **tables)
    run(spec)
    give_weights(store, GIVEN)
    make_sketch(spec)
    return store, spec


def found(store: FeatureStore, spec: RunSpec) -> Sketch:
    opened = Sketch.find(store, spec)
    assert opened is not None
    return opened


def ranker(store: FeatureStore, spec: RunSpec) -> Ranker:
    return Ranker(
        store=store,
        spec=spec,
        weightings=WEIGHTINGS,
        transform="none",
        make_reader=BlockReader,
        progress=QUIET,
    )


def slab_of(spec: RunSpec, set_name: str, first: int = 0, last: int = 4) -> Slab:
    return Slab(target=Target(kernel=spec.kernel.name, set_name=set_name), first=first, last=last)


@cache
def made_once(case: str) -> tuple[FeatureStore, RunSpec]:
    """The store of a case, which is only read."""
    settings, tables = RUNS[case]
    return made(settings, **tables)


RUNS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "block": ({}, {}),
    "identity": ({}, {"kernel": {"kind": "identity"}}),
    "diagonal": ({}, {"kernel": {"kind": "diagonal", "damping": 0.2}}),
    "cosine": ({}, {"contribute": {"normalize": "cosine"}}),
    "relatif": ({}, {"contribute": {"normalize": "relatif"}}),
    "members": (
        {"members": ("x", "y")},
        {"model": {"members": [{"name": "x", "eta": 0.5}, {"name": "y", "eta": 2.0}]}},
    ),
    "float16": ({"dtype": "float16"}, {}),
    "int8": ({"dtype": "int8"}, {}),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_sketch_of_as_many_numbers_as_features_estimates_the_scores_that_contributions_give(case: str) -> None:
    store, spec = made_once(case)
    weights = np.array([[0.25] * 4, [*GIVEN.values()]])

    estimates = found(store, spec).estimates(slab_of(spec, "eval", 1, 3), weights)

    c = stored_c(store, "eval", spec.kernel.name)[1:3]
    valid = [row for row in range(200) if row not in INVALID]
    assert np.isnan(estimates[:, :, list(INVALID)]).all()
    for weight, estimate in zip(weights, estimates, strict=True):
        exact = oracle.scores(c[:, valid], weight)
        # Levels have 8 bits, directions too.
        np.testing.assert_allclose(estimate[:, valid], exact, atol=0.03 * np.abs(exact).max())


@pytest.mark.parametrize("case", RUNS)
def test_c_of_single_rows_is_what_contributions_are(case: str) -> None:
    store, spec = made_once(case)
    rows = np.array([0, 1, 31, 32, 77, 199])

    ((given, c),) = found(store, spec).contributions(slab_of(spec, "eval"), rows)

    np.testing.assert_array_equal(given, rows)
    exact = stored_c(store, "eval", spec.kernel.name)[:, rows]
    np.testing.assert_allclose(c, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


def test_what_candidates_hold_is_ranked_as_by_a_scan_of_all_rows() -> None:
    store, spec = made(sketch={"candidates": 10})
    slab = slab_of(spec, "eval", 1, 2)

    screened = rank_candidates(ranker(store, spec), found(store, spec), slab, 3)

    assert screened is not None
    winners, screening = screened
    exact = rank(ranker(store, spec), slab, 3)
    for name in exact:
        for side in ("proponents", "opponents"):
            np.testing.assert_array_equal(getattr(winners[name], side).rows, getattr(exact[name], side).rows)
            np.testing.assert_allclose(
                getattr(winners[name], side).parts, getattr(exact[name], side).parts, rtol=1e-4, atol=1e-6
            )
    assert screening.queries == 6
    assert {(each.proponents.rows, each.opponents.rows) for each in screening.candidates.values()} == {(10, 10)}
    # No less than 3 were measured 10 of.
    assert {each.k for each in screening.candidates.values()} == {10}
    assert screening.candidates["given"].proponents.recall is not None


def test_recall_is_the_share_of_the_best_rows_among_the_candidates() -> None:
    store, spec = made(sketch={"rank": 2})
    opened = found(store, spec)

    measured = opened.recall
    c = stored_c(store, "learn")
    valid = [row for row in range(200) if row not in INVALID]
    scores, estimates = (
        oracle.scores(c[:, valid], np.full(4, 0.25)),
        opened.estimates(slab_of(spec, "learn", 0, 6), np.full((1, 4), 0.25))[0][:, valid],
    )
    for place, count in enumerate(measured["candidates"]):
        shares = []
        for exact, estimate in zip(scores, estimates, strict=True):
            best = sorted(range(198), key=lambda row: -exact[row])[:10]
            likely = sorted(range(198), key=lambda row: -estimate[row])[:count]
            shares.append(len({*best} & {*likely}) / 10)
        assert measured["recall"]["unweighted"]["proponents"]["10"][place] == pytest.approx(sum(shares) / 6)
    assert measured["recall"]["unweighted"]["proponents"]["10"][0] < 0.9


def test_weights_learned_since_take_as_many_candidates_as_those_that_take_most() -> None:
    store, spec = made(sketch={"recall": 0.5})

    counts = found(store, spec).candidates_for(10, {**WEIGHTINGS, "later": WEIGHTINGS["given"]})

    assert counts is not None
    assert counts["later"].proponents.recall is None
    assert counts["later"].proponents.rows == max(counts["unweighted"].proponents.rows, counts["given"].proponents.rows)


def test_recall_is_measured_again_under_weights_that_were_learned_again() -> None:
    store, spec = made(sketch={"recall": 0.5})
    before, measured = SketchArtifact.open(store.storage, "block").read_recall(), found(store, spec)
    remove_artifact(store.storage, "weights/given")
    give_weights(store, {**GIVEN, "a": 0.0, "d": 0.4})
    counts = measured.candidates_for(1, {"given": np.array([0.0, 0.4, 0.2, 0.4])})
    assert counts is not None
    assert counts["given"].proponents.recall is None

    make_sketch(spec)

    again = found(store, spec)
    assert not again.is_same(measured)
    counts = again.candidates_for(1, {"given": np.array([0.0, 0.4, 0.2, 0.4])})
    assert counts is not None
    assert counts["given"].proponents.recall is not None
    assert again.recall["recall"]["unweighted"] == before["recall"]["unweighted"]
    make_sketch(spec)
    assert found(store, spec).is_same(again)


def test_how_many_candidates_are_wanted_counts_as_the_last_call_has_it() -> None:
    store, spec = made(sketch={"candidates": 10})
    before = found(store, spec)

    # An engine that runs no task.
    make_sketch(make_spec(store, sketch={"candidates": 30}), Interrupting(lambda _: True))

    counts = found(store, spec).candidates_for(1, WEIGHTINGS)
    assert counts is not None
    assert counts["given"].proponents.rows == 30
    assert found(store, spec).recall["recall"] == before.recall["recall"]


def test_a_chunk_that_is_cut_short_is_told_with_what_to_do() -> None:
    store, spec = made()
    info = store.open_set("train").info
    path = f"{info.folder}/{chunk_path(info.array_path('m0', 'b'), 2, 0)}"
    store.storage.replace(path, [store.storage.read(path)[:50]])
    with pytest.raises(IntegrityError, match=r"gradstore repair"):
        list(found(store, spec).contributions(slab_of(spec, "eval"), np.array([64, 95])))


def test_opponents_take_as_many_candidates_as_they_need_or_as_a_share_of_the_rows_allows() -> None:
    store, spec = made(sketch={"rank": 2, "recall": 0.3})
    opened = found(store, spec)
    counts = opened.candidates_for(1, {"unweighted": WEIGHTINGS["unweighted"]})
    measured = opened.recall["recall"]["unweighted"]["opponents"]["1"]
    tried = dict(zip(opened.recall["candidates"], measured, strict=True))
    affordable = [rows for rows in tried if rows <= 200 / 25] or [min(tried)]

    assert counts is not None
    opponents = counts["unweighted"].opponents
    assert opponents.recall == tried[opponents.rows]
    enough = [rows for rows, recall in tried.items() if recall >= 0.3]
    assert opponents.rows == (enough[0] if enough and enough[0] <= max(affordable) else max(affordable))


def test_weightings_that_are_not_asked_for_need_no_candidates() -> None:
    store, spec = made(sketch={"rank": 2})
    opened = found(store, spec)
    known = opened.recall["recall"]
    hopeless = {**known["given"], "proponents": {k: [0.0] * len(of) for k, of in known["given"]["proponents"].items()}}
    # A recall that no number of candidates reaches, in what this sketch has read.
    opened.__dict__["recall"] = {**opened.recall, "recall": {**known, "given": hopeless}}

    assert opened.candidates_for(1, {"unweighted": WEIGHTINGS["unweighted"]}) is not None
    assert opened.candidates_for(1, WEIGHTINGS) is None


def test_more_rows_than_recall_was_measured_of_and_too_many_candidates_are_left_to_a_scan() -> None:
    store, spec = made()
    slab = slab_of(spec, "eval")
    assert rank_candidates(ranker(store, spec), found(store, spec), slab, 101) is None
    remove_artifact(store.storage, "sketches/block")
    assert Sketch.find(store, spec) is None
    spec = make_spec(store, sketch={"candidates": 70})
    make_sketch(spec)
    assert rank_candidates(ranker(store, spec), found(store, spec), slab, 3) is None


def test_a_sketch_goes_on_from_the_blocks_that_are_there() -> None:
    whole, _ = made()
    store, spec = made()
    remove_artifact(store.storage, "sketches/block")
    last = "sketch-block-000003"
    with pytest.raises(Interrupted):
        make_sketch(spec, Interrupting(lambda task: task.name == last))
    assert Sketch.find(store, spec) is None
    artifact = SketchArtifact.open(store.storage, "block")
    before = artifact.missing_blocks()

    asked: list[Task] = []

    def note(task: Task) -> bool:
        asked.append(task)
        return False

    make_sketch(spec, Interrupting(note))

    assert [task.arguments[-1] for task in asked] == [[block] for block in before]
    assert 0 < len(before) < 7
    rows, expected = found(store, spec).rows, SketchArtifact.open(whole.storage, "block").read_rows()
    np.testing.assert_array_equal(rows.levels, expected.levels)
    np.testing.assert_array_equal(rows.checksums, expected.checksums)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_that_was_changed_in_the_store_is_not_scored(dtype: str) -> None:
    store, spec = made({"dtype": dtype})
    opened = found(store, spec)
    info = store.open_set("train").info
    path = f"{info.folder}/{chunk_path(info.array_path('m0', 'b'), 2, 0)}"
    data = bytearray(store.storage.read(path))
    data[5 * (len(data) - 4) // 32] ^= 1
    store.storage.replace(path, [bytes(data)])
    slab = slab_of(spec, "eval")

    (untouched,) = opened.contributions(slab, np.array([64, 68, 70]))
    assert np.isfinite(untouched[1]).all()
    with pytest.raises(IntegrityError, match=r"its bytes are not those that were committed"):
        list(opened.contributions(slab, np.array([64, 69])))


def test_features_that_are_sound_and_not_those_that_were_sketched_are_refused() -> None:
    store, spec = made()
    opened = found(store, spec)
    opened.rows.checksums[7] += np.uint32(1)
    slab = slab_of(spec, "eval")
    with pytest.raises(
        IntegrityError, match=r"features of block 0 are not those that were sketched. Run `gradstore prune"
    ):
        list(opened.contributions(slab, np.array([7])))


def test_a_kernel_across_groups_has_no_sketch() -> None:
    store = make_store(rows=ROWS)
    with pytest.raises(SpecError, match=r"found 'full', of which there is no sketch"):
        make_sketch(make_spec(store, kernel={"kind": "full", "damping": 0.1}))


def test_learn_queries_that_were_not_preconditioned_are_asked_for() -> None:
    store = make_store(rows=ROWS)
    with pytest.raises(NotReadyError, match=r"queries/block/learn/m0: is missing or not whole.*gradstore contribute"):
        make_sketch(make_spec(store))


def test_another_rank_is_another_sketch() -> None:
    _, spec = made()
    changed = spec.model_copy(update={"sketch": spec.sketch.model_copy(update={"rank": 3})})
    with pytest.raises(ContractError, match="rank"):
        make_sketch(changed)


def test_a_rank_that_no_worker_has_memory_for_is_refused_with_one_that_fits() -> None:
    store = make_store(rows=ROWS)
    spec = make_spec(store, cluster={"memory_per_worker": "500MB"})
    run(make_spec(store))
    with pytest.raises(ResourceError, match=r"sketch.rank: .* directions of 25 features take .*Set sketch.rank = "):
        make_sketch(spec)


def test_a_sketch_of_another_normalisation_is_not_asked() -> None:
    store, spec = made()
    other = spec.model_copy(update={"contribute": spec.contribute.model_copy(update={"normalize": "cosine"})})
    assert Sketch.find(store, other) is None


def test_the_rank_is_what_a_share_of_the_bytes_has_room_for() -> None:
    store = make_store(rows={**ROWS, "train": 4000}, groups={"train": {"a": (20, 20)}}, block_rows=1000)
    info = store.open_set("train").info
    # 10 % of 4,000 x 400 x 4 bytes for 4,000 + 2 x 400 bytes a direction.
    assert sketch_rank(make_spec(store, sketch={"share": 0.1}), info, 400) == 133
    assert sketch_rank(make_spec(store, sketch={"share": 0.0001}), info, 400) == 64
    assert sketch_rank(make_spec(store, sketch={"rank": 9}), info, 400) == 9


def test_numbers_of_candidates_are_fewer_than_the_rows() -> None:
    assert ladder(45) == [10, 20, 30]
    assert ladder(7) == [7]
