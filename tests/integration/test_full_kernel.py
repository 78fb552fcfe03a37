"""Contributions of the kernel across groups, from stored features, by the dense oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine, Task
from gradstore.errors import ContractError
from gradstore.numerics.kernel import Damping
from gradstore.stages.contribute import across, contribute
from gradstore.stages.contribute.queries import Slab, Target
from gradstore.stages.full_kernel import open_full
from gradstore.stages.full_self_influence import full_self_influences
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.stages.self_influence import self_influence
from gradstore.store.artifacts import (
    ContributionArtifact,
    FullKernelArtifact,
    PartialsArtifact,
    QueryArtifact,
    SelfInfluenceArtifact,
)
from gradstore.store.features import FeatureStore
from gradstore.store.health import check_store
from tests import contributing, oracle
from tests.full_kernels import (
    DAMPING,
    GROUPS,
    ROUTES,
    build,
    contributions,
    difference,
    expected,
    make_queries,
    make_spec,
    make_store,
    options,
    stored,
)
from tests.health import unwatched
from tests.runs import InThisProcess


@pytest.mark.parametrize(("spectra", "tolerance"), [("float64", 1e-5), ("float32", 1e-4)])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rows", [30, 10])
def test_contributions_of_every_route_at_full_rank_are_those_of_the_dense_kernel(
    rows: int, route: str, spectra: str, tolerance: float
) -> None:
    url = make_store(rows=rows)
    spec = make_spec(url, **options(route, spectra=spectra))

    build(spec)

    assert difference(contributions(spec), expected(url)) < tolerance
    selves = QueryArtifact.open(FeatureStore.open(url).storage, "full", ("eval", "m0")).read_self()
    wanted = oracle.full_self_influence(stored(url, "train"), stored(url, "eval"), [*GROUPS], damping=DAMPING)
    assert difference(selves, wanted) < tolerance


@pytest.mark.parametrize("route", ROUTES)
def test_workers_blocks_and_spans_do_not_change_contributions_beyond_rounding(route: str) -> None:
    found = []
    for workers, block_rows in ((1, 4), (3, 8), (2, 32)):
        spec = make_spec(make_store(block_rows=block_rows), workers=workers, **options(route))
        build(spec)
        found.append(contributions(spec))

    assert difference(found[1], found[0]) < 1e-5
    assert difference(found[2], found[0]) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
def test_the_self_influence_of_train_rows_is_that_of_the_dense_kernel(route: str) -> None:
    url = make_store()
    spec = make_spec(url, **options(route, spectra="float64"))
    build(spec)
    store = FeatureStore.open(url)

    dampings = [Damping(value=DAMPING), Damping(value=0.05)]
    found = dict(full_self_influences(store, spec, "m0", [1, 3], dampings))

    assert list(found) == [1, 3]
    for variant, damping in enumerate(dampings):
        train = stored(url, "train")
        wanted = oracle.full_self_influence(train, train, [*GROUPS], damping=damping.value)
        assert difference(found[1][variant], wanted[8:16]) < 1e-5
        assert difference(found[3][variant], wanted[24:30]) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
def test_rows_that_are_not_valid_take_no_part_in_the_kernel_and_have_no_contributions(route: str) -> None:
    lost = [3, 17]
    url = make_store(invalid=lost)
    spec = make_spec(url, **options(route))
    build(spec)

    found = contributions(spec)

    train = {group: np.delete(rows, lost, 0) for group, rows in stored(url, "train").items()}
    wanted = oracle.full_contributions(train, stored(url, "eval"), [*GROUPS], damping=DAMPING)
    assert np.isnan(found[:, lost]).all()
    assert difference(np.delete(found, lost, 1), wanted) < 1e-4
    of_first = dict(full_self_influences(FeatureStore.open(url), spec, "m0", [0], [Damping(value=DAMPING)]))[0]
    assert np.isnan(of_first[0]).all(1).tolist() == [row in lost for row in range(8)]


@pytest.mark.parametrize("route", ["primal", "low_rank"])
def test_one_kernel_of_the_mean_features_applies_to_every_member(route: str) -> None:
    url = make_store(members=("early", "late"))
    spec = make_spec(url, members="mean", **options(route))
    build(spec)

    for member in ("early", "late"):
        trains = [stored(url, "train", each) for each in ("early", "late")]
        mean = {group: (trains[0][group].astype(np.float64) + trains[1][group]) / 2 for group in GROUPS}
        wanted = oracle.full_contributions(
            mean, stored(url, "eval", member), [*GROUPS], damping=DAMPING, rows=stored(url, "train", member)
        )
        assert difference(contributions(spec, member), wanted) < 1e-4


def test_every_member_has_a_kernel_of_its_own() -> None:
    url = make_store(members=("early", "late"))
    spec = make_spec(url, **options("dual"))
    build(spec)

    for member in ("early", "late"):
        train, queries = stored(url, "train", member), stored(url, "eval", member)
        wanted = oracle.full_contributions(train, queries, [*GROUPS], damping=DAMPING)
        assert difference(contributions(spec, member), wanted) < 1e-4


def test_the_error_of_a_low_rank_falls_and_what_it_captures_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    url = make_store()
    train = np.concatenate([*stored(url, "train").values()], 1).astype(np.float64)
    eigenvalues = np.linalg.eigvalsh(train.T @ train)[::-1]
    errors = []
    for rank in (2, 6, 10):
        spec = make_spec(url, route="low_rank", rank=rank, oversample=2)
        named = spec.model_copy(update={"kernel": spec.kernel.model_copy(update={"name": f"full-{rank}"})})
        build_kernel(named, cast(Engine, InThisProcess()), Progress())
        errors.append(difference(contributions(named), expected(url)))
        facts = open_full(FeatureStore.open(url), named, "m0").facts(5)
        assert facts["trace"] == pytest.approx(eigenvalues.sum(), rel=1e-6)
        assert facts["captured"] == pytest.approx(eigenvalues[:rank].sum() / eigenvalues.sum(), rel=1e-2)
        assert f"low_rank: {rank} eigenvalues hold {facts['captured']:.2%} of the trace" in capsys.readouterr().err

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_coefficients_of_another_build_of_the_kernel_are_refused() -> None:
    url = make_store()
    spec = make_spec(url, **options("low_rank"))
    build(spec)
    contributions(spec)
    kernel = open_full(FeatureStore.open(url), spec, "m0")
    basis = {group: -kernel.read_basis(group) for group in GROUPS}
    trace = kernel.facts(0)["trace"]
    kernel.log.take_back(0, "a test")
    FullKernelArtifact.open(kernel.storage, "low_rank-12", "m0").write_basis(basis, facts={"trace": trace})
    build(spec)

    slab = Slab(target=Target(kernel="full", set_name="eval"), first=0, last=5)
    with pytest.raises(
        ContractError, match=r"queries/full/eval/m0: was made with another build of full-kernels/low_rank-12/m0"
    ):
        across.make_products(FeatureStore.open(url), spec, "m0", [[slab]])


def test_a_sweep_shares_the_pass_over_the_features_of_a_dual_kernel() -> None:
    url = make_store()
    spec = make_spec(url, **options("dual", damping=[0.2, 0.5]))
    build(spec)
    first, second = spec.sweep()
    store = FeatureStore.open(url)

    make_queries(first, sweep=spec)
    partials = PartialsArtifact.open(store.storage, ("queries-full", "eval.m0", "rotated"))

    assert partials.is_complete()
    assert across.query_tasks(store, spec, [("eval", "m0")]) == []
    make_queries(second, sweep=spec)
    across.remove_rotated(store, spec, [("eval", "m0")])
    for run, damping in ((first, 0.2), (second, 0.5)):
        assert difference(contributions(run), expected(url, damping)) < 1e-4
    assert not store.storage.list_folders("partials")


def test_two_runs_at_once_leave_each_other_what_queries_of_a_dual_kernel_are_made_from() -> None:
    url = make_store()
    first, second = (make_spec(url, name=name, **options("dual")) for name in ("first", "second"))
    build(first)

    def other() -> None:
        contribute(second, cast(Engine, InThisProcess()), Progress(quiet=True))

    engine = BeforeQueries(other)
    contribute(first, cast(Engine, engine), Progress(quiet=True))

    assert engine.ran
    storage = FeatureStore.open(url).storage
    for name in ("first", "second"):
        artifact = ContributionArtifact.open(storage, name, "eval")
        found = np.concatenate(list(artifact.read_blocks(0, artifact.shape.queries)), axis=1)
        assert difference(found, expected(url)) < 1e-4
    assert not storage.list_folders("partials")


class BeforeQueries:
    """An engine without a cluster that has another run go by when what queries are made from is there."""

    def __init__(self, other: Callable[[], None]) -> None:
        self._other = other
        self.ran = False

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        for task in tasks:
            if task.function is across.precondition and not self.ran:
                self.ran = True
                self._other()
            yield task, task.function(*task.arguments)


@pytest.mark.parametrize("spectra", ["float32", "float64"])
@pytest.mark.parametrize("route", ROUTES)
def test_small_damping_loses_no_digits_of_rows_that_are_fewer_than_their_features(route: str, spectra: str) -> None:
    groups = {"a": (8, 8), "d": (8, 8), "g": (8, 8)}
    store = contributing.make_store(groups=dict.fromkeys(contributing.ROWS, groups), invalid=[3])
    kernel = {"kind": "full", "damping": 1e-3, "route": route, "spectra": spectra}
    spec = contributing.make_spec(store, kernel=kernel)

    contributing.run(spec)
    self_influence(spec, cast(Engine, InThisProcess()), Progress(quiet=True))

    train, queries = (contributing.stored_features(store, name) for name in ("train", "eval"))
    kept = {group: np.delete(rows, 3, 0) for group, rows in train.items()}
    wanted = oracle.full_contributions(kept, queries, [*groups], damping=1e-3)
    assert difference(np.delete(contributing.stored_c(store, "eval", "full"), 3, 1), wanted) < 1e-6
    selves = SelfInfluenceArtifact.open(store.storage, "full", "m0").read()
    wanted = oracle.full_self_influence(kept, kept, [*groups], damping=1e-3)
    assert difference(np.delete(selves, 3, 0), wanted) < 1e-6


def test_weights_of_scores_are_folded_into_coefficients() -> None:
    url = make_store()
    for route in ROUTES:
        spec = make_spec(url, **options(route))
        named = spec.kernel.model_copy(update={"name": f"full-{route}"})
        spec = spec.model_copy(update={"kernel": named})
        build(spec)
        c = contributions(spec)
        scored = spec.model_copy(update={"contribute": spec.contribute.model_copy(update={"mode": "scores"})})
        store = FeatureStore.open(url)
        train = store.open_set("train")
        slab = Slab(target=Target(kernel=f"full-{route}", set_name="eval"), first=1, last=4)

        [product] = across.make_products(store, scored, "m0", [[slab]])

        product.begin(1)
        total, part = np.zeros((2, 8, 1, 3), np.float32)
        if product.reads_features:
            assert product.columns([*GROUPS]) == slice(0, 1)
            product.write(train.read_block(1), part)
            total += part
        if product.finish(slice(0, 8), part):
            total += part
        np.testing.assert_allclose(total[:, 0].T, c[1:4, 8:16].mean(2), atol=1e-4 * np.abs(c).max())


def test_features_that_are_all_zero_give_contributions_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.full_kernels.features_of", lambda info, member, group: np.zeros((info.rows, GROUPS[group]), np.float32)
    )
    url = make_store()
    for route in ROUTES:
        spec = make_spec(url, **options(route))
        spec = spec.model_copy(update={"kernel": spec.kernel.model_copy(update={"name": f"full-{route}"})})
        build(spec)
        assert not contributions(spec).any()


@pytest.mark.parametrize("route", ROUTES)
def test_the_stages_build_contributions_of_a_sweep_with_every_route(route: str) -> None:
    url = make_store()
    spec = make_spec(url, **options(route, damping=[0.2, 0.5]))
    build(spec)

    contribute(spec, cast(Engine, InThisProcess()), Progress(quiet=True))

    storage = FeatureStore.open(url).storage
    for name, damping in (("full_0p2", 0.2), ("full_0p5", 0.5)):
        artifact = ContributionArtifact.open(storage, name, "eval")
        found = np.concatenate(list(artifact.read_blocks(0, artifact.shape.queries)), axis=1)
        assert difference(found, expected(url, damping)) < 1e-4
        assert artifact.settings["kernel"]["route"] == route
    health = check_store(storage, full=True, watch=unwatched)
    assert not health.problems
    assert not health.unknown


@pytest.mark.parametrize("route", ROUTES)
def test_the_stage_of_self_influence_knows_the_full_kernel(route: str) -> None:
    url = make_store(rows=20)
    spec = make_spec(url, **options(route))
    build(spec)

    self_influence(spec, cast(Engine, InThisProcess()), Progress(quiet=True))

    artifact = SelfInfluenceArtifact.open(FeatureStore.open(url).storage, "full", "m0")
    wanted = oracle.full_self_influence(stored(url, "train"), stored(url, "train"), [*GROUPS], damping=DAMPING)
    assert difference(artifact.read(), wanted) < 1e-4
