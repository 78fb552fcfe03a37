"""What rows and queries of C count: normalised by global norms, or left out as DAS does it; against the dense pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine
from gradstore.errors import DataError, SpecError
from gradstore.numerics.learner import LearnerSettings, initial_raw_weights, visit_order
from gradstore.numerics.normalization import left_out_factors, query_factors, row_factors
from gradstore.spec import RunSpec
from gradstore.stages.contribute import contribute
from gradstore.stages.contribute.rows import prepare_rows, row_factor
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.score import score
from gradstore.store.artifacts import (
    ContributionArtifact,
    ScoresArtifact,
    SelfInfluenceArtifact,
    WeightsArtifact,
    list_artifacts,
)
from gradstore.store.features import FeatureStore
from tests import oracle, stores
from tests.gradients import RandomStore, random_store
from tests.runs import InThisProcess

ENGINE, QUIET = cast(Engine, InThisProcess()), Progress(quiet=True)
GROUPS = list(stores.GROUPS)


def contributed(made: RandomStore, changes: Mapping[str, Mapping[str, Any]], *, kernel: str = "") -> np.ndarray:
    """C of the eval queries that a run stores."""
    spec = made.spec(changes)
    build_kernel(spec, ENGINE, QUIET)
    contribute(spec, ENGINE, QUIET)
    return stored(spec, kernel or spec.kernel.name)


def stored(spec: RunSpec, kernel: str, name: str = "eval") -> np.ndarray:
    artifact = ContributionArtifact.open(FeatureStore.open(spec.run.store).storage, kernel, name)
    return np.concatenate([*artifact.read_blocks(0, artifact.shape.queries)], 1)


class Dense:
    """The pipeline in float64: C, and self-influence of rows and queries over all groups, of one member."""

    def __init__(self, made: RandomStore, name: str, member: str, kernel: Mapping[str, Any]) -> None:
        train, queries = made.features("train", member), made.features(name, member)
        valid = np.isfinite(train[GROUPS[0]]).all(1)
        kept = {group: rows[valid].astype(np.float64) for group, rows in train.items()}

        def preconditioned(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            if kernel["kind"] != "full":
                return {group: oracle.precondition(kept[group], rows[group], **kernel) for group in GROUPS}
            whole, side_by_side = (np.concatenate([each[group] for group in GROUPS], 1) for each in (kept, rows))
            answers = oracle.precondition(whole, side_by_side, **{**kernel, "kind": "block"})
            edges = np.cumsum([0, *stores.GROUPS.values()])
            return {group: answers[:, edges[j] : edges[j + 1]] for j, group in enumerate(GROUPS)}

        self.c = np.full((len(queries[GROUPS[0]]), len(valid), len(GROUPS)), np.nan)
        if kernel["kind"] == "full":
            # Groups mix in K, so C is split by the group of the query: K psi_j of each group's psi alone.
            for j, group in enumerate(GROUPS):
                alone = {each: rows * (each == group) for each, rows in queries.items()}
                self.c[:, valid, j] = oracle.contributions(preconditioned(alone), kept, GROUPS).sum(2)
        else:
            self.c[:, valid] = oracle.contributions(preconditioned(queries), kept, GROUPS)
        self.rows = np.full(len(valid), np.nan)
        self.rows[valid] = oracle.self_influence(preconditioned(kept), kept, GROUPS).sum(1)
        self.queries = oracle.self_influence(preconditioned(queries), queries, GROUPS).sum(1)


IDENTITY: dict[str, Any] = {"kind": "identity", "damping": 0.0, "mode": "absolute"}
BLOCK: dict[str, Any] = {"kind": "block", "damping": 0.1, "mode": "relative"}
FULL: dict[str, Any] = {"kind": "full", "damping": 0.1, "mode": "relative"}


def options(kernel: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "identity"} if kernel["kind"] == "identity" else dict(kernel)


@pytest.mark.parametrize("normalize", ["cosine", "relatif"])
@pytest.mark.parametrize("kernel", [IDENTITY, BLOCK, FULL], ids=lambda kernel: str(kernel["kind"]))
def test_contributions_are_divided_by_the_global_norms_of_the_oracle(kernel: dict[str, Any], normalize: str) -> None:
    made = random_store(invalid=[2], zero=[4])

    found = contributed(made, {"kernel": options(kernel), "contribute": {"normalize": normalize}})

    dense = Dense(made, "eval", "m0", kernel)
    np.testing.assert_allclose(
        found, oracle.normalized(dense.c, dense.rows, dense.queries, normalize), rtol=1e-4, atol=1e-6
    )
    assert np.isnan(found[:, 2]).all()
    assert (found[:, 4] == 0).all()
    computed = [artifact.path for artifact in list_artifacts(FeatureStore.open(made.url).storage)]
    assert any(path.startswith("self-influence/") for path in computed) == (kernel["kind"] != "identity")


def test_norms_are_sums_over_members_with_their_eta_and_the_margins_factor() -> None:
    etas = {"a": 0.5, "b": 2.0}
    made = random_store(etas=etas, output="margin", invalid=[7])

    found = contributed(made, {"kernel": BLOCK, "contribute": {"normalize": "cosine"}})

    each = {member: Dense(made, "eval", member, BLOCK) for member in etas}
    c, rows, queries = np.zeros(found.shape), np.zeros(found.shape[1]), np.zeros(found.shape[0])
    for member, eta in etas.items():
        margins = made.column("margin", "train", member)
        left = np.array([1 - 1 / (1 + np.exp(-margin)) for margin in margins])
        c += eta * left[None, :, None] * each[member].c
        rows += eta * left**2 * each[member].rows
        queries += eta * each[member].queries
    np.testing.assert_allclose(found, oracle.normalized(c, rows, queries, "cosine"), rtol=1e-4, atol=1e-6)


def test_with_the_identity_every_example_has_cosine_1_to_itself() -> None:
    made = random_store()
    spec = made.spec({"kernel": {"kind": "identity"}, "contribute": {"normalize": "cosine"}})
    train = made.features("train")
    store = FeatureStore.open(made.url)

    factors = np.concatenate([row_factor(store, spec, store.open_set("train"), block) for block in range(3)])

    whole = np.concatenate([train[group] for group in GROUPS], 1).astype(np.float64)
    np.testing.assert_allclose((whole**2).sum(1) * factors.astype(np.float64) ** 2, 1, rtol=1e-6)


@pytest.mark.parametrize("normalize", ["cosine", "relatif"])
def test_the_length_of_one_gradient_changes_no_normalised_contribution(normalize: str) -> None:
    changes = {"kernel": {"kind": "identity"}, "contribute": {"normalize": normalize}}

    plain = contributed(random_store(), changes)
    scaled = contributed(random_store(scale={3: 1000.0, 8: 1e-3}), changes)

    np.testing.assert_allclose(scaled, plain, rtol=1e-5, atol=1e-7)


def test_a_cosine_is_at_most_1_under_every_kernel() -> None:
    made = random_store()
    for kind in ("identity", "diagonal", "block", "ekfac", "full"):
        found = contributed(made, {"kernel": {"kind": kind}, "contribute": {"normalize": "cosine"}})
        assert np.abs(found.astype(np.float64).sum(2)).max() <= 1 + 1e-5


@pytest.mark.parametrize("kernel", [{**BLOCK, "damping": 10.0}, FULL], ids=["block", "full"])
def test_das_is_the_oracles_and_what_it_is_transformed_by_is_recorded(kernel: dict[str, Any]) -> None:
    made = random_store(output="das", invalid=[2], zero=[4])

    found = contributed(made, {"kernel": kernel})

    dense = Dense(made, "eval", "m0", kernel)
    np.testing.assert_allclose(
        found, oracle.das(dense.c, made.column("residual", "train"), dense.rows), rtol=1e-4, atol=1e-6
    )
    artifact = ContributionArtifact.open(FeatureStore.open(made.url).storage, str(kernel["kind"]), "eval")
    assert artifact.settings["transform"] == "square"
    plain = random_store()
    contributed(plain, {"kernel": kernel})
    artifact = ContributionArtifact.open(FeatureStore.open(plain.url).storage, str(kernel["kind"]), "eval")
    assert artifact.settings["transform"] == "none"


def test_members_of_das_have_leverages_and_residuals_of_their_own() -> None:
    etas = {"a": 0.25, "b": 0.75}
    made = random_store(output="das", etas=etas)

    found = contributed(made, {"kernel": FULL})

    expected = np.zeros(found.shape)
    for member, eta in etas.items():
        dense = Dense(made, "eval", member, FULL)
        expected += eta * oracle.das(dense.c, made.column("residual", "train", member), dense.rows)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_das_is_learned_by_magnitude_and_scored_by_squares() -> None:
    made = random_store(output="das", invalid=[2])
    spec = made.spec({"kernel": FULL, "score": {"k": 10, "tail_patch": {"queries": 0}}})
    for stage in (build_kernel, contribute, learn, score):
        stage(spec, ENGINE, QUIET)

    valid = np.delete(np.arange(11), 2)
    c = stored(spec, "full", "learn")[:, valid]
    settings = LearnerSettings(k=3, epochs=2, tile=len(c))
    weights, _ = oracle.learn(
        c,
        initial_raw_weights(len(GROUPS), seed=0),
        visit_order(len(c), settings),
        k=3,
        learning_rate=0.01,
        weight_decay=0.1,
        square=True,
    )
    storage = FeatureStore.open(made.url).storage
    learned = WeightsArtifact.open(storage, "learned")
    np.testing.assert_allclose(learned.read()["weight"].to_numpy(), weights, rtol=1e-6)
    assert learned.settings["learner"]["transform"] == "square"
    linear = oracle.scores(stored(spec, "full")[:, valid], weights)
    table = ScoresArtifact.open(storage, "full.learned").read().to_pylist()
    for query in range(3):
        rows = {
            side: [row for row in table if row["query"] == query and row["side"] == side]
            for side in ("proponent", "opponent")
        }
        best = oracle.top(linear[query] ** 2, 10)
        assert [row["example"] for row in rows["proponent"]] == valid[best].tolist()
        assert [row["example"] for row in rows["opponent"]] == valid[best[::-1]].tolist()
        for row in rows["proponent"]:
            assert row["score"] == pytest.approx(sum(row["parts"]) ** 2, rel=1e-4)


def test_a_leverage_of_1_or_more_is_refused_before_any_contribution_with_its_rows_and_the_way_out() -> None:
    made = random_store(output="das")
    spec = made.spec({"kernel": {"kind": "block", "damping": [5.0, 0.01]}})
    build_kernel(spec, ENGINE, QUIET)

    with pytest.raises(
        DataError,
        match=r"self-influence/block_0p01/m0: train rows 1, .* have a leverage h_n of 1 or more \(the largest \d.*\), and DAS "
        r'divides by 1 - h_n\. .*set kernel\.kind = "full", or raise kernel\.damping',
    ):
        contribute(spec, ENGINE, QUIET)

    kinds = {artifact.kind for artifact in list_artifacts(FeatureStore.open(made.url).storage)}
    assert kinds == {"kernel", "self_influence"}


def test_a_leverage_of_1_or_more_under_a_truncated_kernel_is_refused_with_the_routes_that_bound_it() -> None:
    made = random_store(output="das")
    spec = made.spec({"kernel": {"kind": "full", "damping": 0.01, "route": "low_rank", "rank": 1, "oversample": 0}})
    build_kernel(spec, ENGINE, QUIET)

    with pytest.raises(
        DataError,
        match=r'A kernel of low rank bounds no leverage: set kernel\.route = "primal" or "dual", or raise kernel\.rank or '
        r"kernel\.damping",
    ):
        contribute(spec, ENGINE, QUIET)


@pytest.mark.parametrize(
    ("output", "changes", "message"),
    [
        (
            "das",
            {"kernel": {"kind": "identity"}},
            r'kernel\.kind: found "identity" with model\.output = "das".*Set kernel\.kind = "full" or "block"',
        ),
        ("das", {"kernel": {"kind": "ekfac"}}, r'kernel\.kind: found "ekfac" with model\.output = "das"'),
        ("das", {"kernel": {"kind": "diagonal"}}, r'kernel\.kind: found "diagonal" with model\.output = "das"'),
        (
            "das",
            {"contribute": {"normalize": "cosine"}},
            r'contribute\.normalize: found "cosine" with model\.output = "das".*Leave contribute\.normalize out',
        ),
        ("das", {"learn": {"objective": "gap"}}, r'learn\.objective: found "gap" with model\.output = "das"'),
    ],
)
def test_das_with_another_kernel_normalisation_or_objective_is_refused_before_work(
    output: str, changes: dict[str, Any], message: str
) -> None:
    made = random_store(output=output)

    with pytest.raises(SpecError, match=message):
        prepare_rows(made.spec(changes), ENGINE, QUIET)

    assert list_artifacts(FeatureStore.open(made.url).storage) == []


def test_norms_over_members_of_negative_eta_are_refused() -> None:
    made = random_store(etas={"a": 1.0, "b": -0.5})

    with pytest.raises(SpecError, match=r'normalize: found "relatif" with members of negative eta: b \(-0\.5\)'):
        prepare_rows(made.spec({"contribute": {"normalize": "relatif"}}), ENGINE, QUIET)


def test_a_sweep_is_normalised_by_the_norms_of_each_damping() -> None:
    made = random_store()
    changes: dict[str, Any] = {
        "kernel": {"kind": "block", "damping": [0.1, 3.0]},
        "contribute": {"normalize": "relatif"},
    }

    contributed(made, changes, kernel="block_0p1")

    for name, damping in {"block_0p1": 0.1, "block_3": 3.0}.items():
        dense = Dense(made, "eval", "m0", {**BLOCK, "damping": damping})
        expected = oracle.normalized(dense.c, dense.rows, dense.queries, "relatif")
        np.testing.assert_allclose(stored(made.spec(changes), name), expected, rtol=1e-4, atol=1e-6)
    SelfInfluenceArtifact.open(FeatureStore.open(made.url).storage, "block_3", "m0")


def test_factors_are_0_of_nothing_nan_of_what_is_not_valid_and_1_where_nothing_is_normalised() -> None:
    tau = np.array([4.0, 0.0, np.nan, -1e-30])

    np.testing.assert_array_equal(row_factors("cosine", tau), [0.5, 0, np.nan, 0])
    np.testing.assert_array_equal(row_factors("relatif", tau), [0.5, 0, np.nan, 0])
    np.testing.assert_array_equal(row_factors("none", tau), [1, 1, 1, 1])
    np.testing.assert_array_equal(query_factors("cosine", tau), [0.5, 0, np.nan, 0])
    np.testing.assert_array_equal(query_factors("relatif", tau), [1, 1, 1, 1])
    np.testing.assert_allclose(left_out_factors(np.array([3.0, np.nan]), np.array([0.5, np.nan])), [6, np.nan])


def test_every_damping_of_a_sweep_has_weights_of_its_own() -> None:
    made = random_store()
    spec = made.spec({"kernel": {"kind": "block", "damping": [0.1, 3.0]}})
    for stage in (build_kernel, contribute, learn):
        stage(spec, ENGINE, QUIET)

    storage = FeatureStore.open(made.url).storage
    for swept in spec.sweep():
        weights, _ = oracle.learn(
            stored(spec, swept.kernel.name, "learn"),
            initial_raw_weights(len(GROUPS), seed=0),
            visit_order(5, LearnerSettings(k=3, epochs=2, tile=5)),
            k=3,
            learning_rate=0.01,
            weight_decay=0.1,
        )
        learned = WeightsArtifact.open(storage, swept.learn.name)
        assert learned.settings["kernel"] == swept.kernel.name
        np.testing.assert_allclose(learned.read()["weight"].to_numpy(), weights, rtol=1e-6)
