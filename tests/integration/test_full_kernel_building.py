"""How the kernel across groups is built: its route, what is not computed again, what is refused."""

from __future__ import annotations

from contextlib import suppress
from typing import cast

import numpy as np
import pytest

from gradstore.cluster import Engine
from gradstore.errors import ContractError, NotReadyError, ResourceError, SpecError
from gradstore.plan.full import full_stage
from gradstore.plan.sizes import SetPlan, Widths
from gradstore.stages.contribute import across
from gradstore.stages.full_kernel import find_full, kernel_settings, open_full
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.stages.prune import prune
from gradstore.store.artifacts import remove_artifact
from gradstore.store.features import FeatureStore
from gradstore.store.health import check_store, mend
from tests import oracle
from tests.full_kernels import (
    DAMPING,
    GROUPS,
    ROUTES,
    Beside,
    Counting,
    StopsBefore,
    build,
    contributions,
    difference,
    expected,
    make_spec,
    make_store,
    options,
    records,
    stored,
    write_block,
)
from tests.health import unwatched
from tests.runs import InThisProcess


def test_the_dual_route_of_the_mean_of_members_is_refused() -> None:
    spec = make_spec(make_store(members=("early", "late")), members="mean", route="dual")

    with pytest.raises(SpecError, match=r'found "dual" with kernel.members = "mean".*Set kernel.route to'):
        build(spec)


@pytest.mark.parametrize("route", ROUTES)
def test_a_kernel_that_was_stopped_computes_only_what_is_missing(route: str) -> None:
    url = make_store()
    spec = make_spec(url, workers=1, **options(route))
    whole = Counting()
    other = make_spec(make_store(), workers=1, **options(route))
    build(other, whole)

    written: dict[str, bytes] = {}
    for stop in range(1, len(whole.done)):
        with suppress(KeyboardInterrupt):
            build(spec, Counting(stop_before=stop))
        # Nothing that was committed is committed anew; partial sums go when the kernel is there.
        now = records(url)
        assert {path for path in written if "/full-kernels/" in f"/{path}"} <= set(now)
        assert all(now[path] == written[path] for path in set(now) & set(written))
        written = now
    build(spec)

    np.testing.assert_array_equal(contributions(spec), contributions(other))
    assert not FeatureStore.open(url).storage.list_folders("partials")


@pytest.mark.parametrize("route", ROUTES)
def test_a_part_that_is_committed_is_not_summed_again(route: str) -> None:
    url = make_store()
    spec = make_spec(url, workers=1, **options(route))
    with pytest.raises(KeyboardInterrupt):
        build(spec, Counting(stop_before=1))
    first = records(url)
    assert len(first) == 1

    with pytest.raises(KeyboardInterrupt):
        build(spec, Counting(stop_before=2))

    assert first.items() <= records(url).items()
    assert len(records(url)) == 2


def test_a_complete_kernel_is_built_by_no_task() -> None:
    spec = make_spec(make_store(), route="low_rank", rank=4)
    build(spec)
    again = Counting()

    build(spec, again)

    assert again.done == []


def test_coordinates_of_another_basis_are_computed_anew() -> None:
    url = make_store()
    spec = make_spec(url, **options("low_rank"))
    build(spec)
    before = contributions(spec)
    kernel = open_full(FeatureStore.open(url), spec, "m0")
    kernel.log.take_back(0, "a test")

    build(spec)

    kernel = open_full(FeatureStore.open(url), spec, "m0")
    assert {kernel.facts(unit)["basis"] for unit in range(1, kernel.info.num_units)} == {kernel.attempt(0)}
    np.testing.assert_array_equal(contributions(spec), before)


@pytest.mark.parametrize("route", ROUTES)
def test_verify_knows_every_object_and_repair_has_a_lost_one_made_anew(route: str) -> None:
    url = make_store()
    spec = make_spec(url, **options(route))
    build(spec)
    before = contributions(spec)
    storage = FeatureStore.open(url).storage
    health = check_store(storage, full=True, watch=unwatched)
    assert not health.problems
    assert not health.unknown
    assert not health.orphans

    kernel = open_full(FeatureStore.open(url), spec, "m0")
    storage.delete(f"{kernel.folder}/{sorted(kernel.unit_objects(0))[0]}")
    broken = check_store(storage, full=False, watch=unwatched)
    mend(broken, dry_run=False)
    build(spec)

    assert not check_store(storage, full=True, watch=unwatched).problems
    np.testing.assert_array_equal(contributions(spec), before)


def test_partial_sums_of_a_kernel_that_is_not_done_are_known_to_verify() -> None:
    url = make_store()
    spec = make_spec(url, workers=1, **options("low_rank"))
    with pytest.raises(KeyboardInterrupt):
        build(spec, Counting(stop_before=4))

    health = check_store(FeatureStore.open(url).storage, full=True, watch=unwatched)

    assert any(unit.ledger.name.startswith("partials/full-low_rank-12-full/m0/") for unit in health.units)
    assert not health.problems
    assert not health.unknown


def test_the_route_is_chosen_by_what_fits_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    url = make_store()
    build_kernel(make_spec(url), cast(Engine, InThisProcess()), Progress())

    told = capsys.readouterr().err
    kernel = open_full(FeatureStore.open(url), make_spec(url), "m0")

    assert kernel.shape.route == "primal"
    assert f"kernel full m0: primal: {kernel.reason}" in told
    assert "30 rows of 12 features: the Gram matrix of 12 x 12 takes" in kernel.reason


def test_a_route_that_is_left_open_is_that_of_the_kernel_that_is_there() -> None:
    url = make_store()
    forced = make_spec(url, **options("dual"))
    build(forced)
    again = Counting()

    build(make_spec(url), again)

    assert again.done == []
    found = find_full(FeatureStore.open(url), make_spec(url), "m0")
    assert found is not None
    assert found.shape.route == "dual"
    assert kernel_settings(FeatureStore.open(url), make_spec(url))["route"] == "dual"


def test_all_members_have_kernels_of_one_route_that_of_the_first_which_is_there() -> None:
    url = make_store(members=("early", "late"))
    with pytest.raises(KeyboardInterrupt):
        build(make_spec(url, **options("dual")), StopsBefore("kernel-full-late"))
    with pytest.raises(KeyboardInterrupt):
        build(make_spec(url, **options("primal")), StopsBefore("kernel-full-late"))
    store, spec = FeatureStore.open(url), make_spec(url)
    remove_artifact(store.storage, "full-kernels/dual/late")
    remove_artifact(store.storage, "full-kernels/primal/early")

    build(spec)

    assert {member: open_full(store, spec, member).shape.route for member in ("early", "late")} == {
        "early": "dual",
        "late": "dual",
    }
    for member in ("early", "late"):
        wanted = oracle.full_contributions(
            stored(url, "train", member), stored(url, "eval", member), [*GROUPS], damping=DAMPING
        )
        assert difference(contributions(spec, member), wanted) < 1e-4


def test_a_complete_kernel_counts_before_one_that_is_begun() -> None:
    url = make_store()
    build(make_spec(url, **options("dual")))
    with pytest.raises(KeyboardInterrupt):
        build(make_spec(url, **options("primal")), Counting(stop_before=1))

    assert open_full(FeatureStore.open(url), make_spec(url), "m0").shape.route == "dual"


def test_a_kernel_that_is_begun_is_not_gone_on_with_where_it_does_not_fit_a_worker() -> None:
    url = make_store()
    with pytest.raises(KeyboardInterrupt):
        build(make_spec(url), Counting(stop_before=1))

    with pytest.raises(ResourceError, match=r'kernel.route = "primal": .* a worker has 500 MB. Set kernel.route to'):
        build(make_spec(url, memory="500MB"))

    build(make_spec(url))
    build(make_spec(url, memory="500MB"))


def test_it_is_told_where_damping_is_so_small_that_rounding_is_much_of_c(capsys: pytest.CaptureFixture[str]) -> None:
    url = make_store()
    told = []
    for options_of in (
        options("primal", damping=[0.1, 1e-6]),
        options("low_rank", rank=4, damping=[0.1, 1e-6]),
        {"route": "low_rank", "rank": 12, "damping": 1e-6, "members": "mean"},
        options("dual", spectra="float64", damping=1e-6),
    ):
        build_kernel(make_spec(url, **options_of), cast(Engine, InThisProcess()), Progress())
        told.append([line for line in capsys.readouterr().err.splitlines() if "may lose" in line])

    # Of the truncated kernel, what is not captured is most of C.
    assert [len(lines) for lines in told] == [1, 0, 1, 0]
    assert all("at damping 1e-06, products in float32 may lose" in lines[0] for lines in told if lines)


@pytest.mark.parametrize("route", ROUTES)
def test_two_runs_that_build_one_kernel_at_once_leave_each_other_their_partial_sums(route: str) -> None:
    url = make_store()
    first, second = (make_spec(url, workers=1, name=name, **options(route)) for name in ("first", "second"))

    build(first, Beside(lambda: build(second)))

    assert difference(contributions(first), expected(url)) < 1e-4
    assert not FeatureStore.open(url).storage.list_folders("partials")


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_that_does_not_fit_a_worker_is_refused(route: str) -> None:
    spec = make_spec(make_store(), memory="500MB", **options(route))

    with pytest.raises(
        ResourceError, match=rf'kernel.route = "{route}": 30 rows of 12 features need .* a worker has 500 MB'
    ):
        build(spec)


def test_coefficients_that_do_not_fit_a_worker_are_refused() -> None:
    url = make_store()
    build(make_spec(url, **options("primal")))

    with pytest.raises(
        ResourceError, match=r"eval \(5 queries x 3 groups x 12 coordinates\) take 720 B.*Lower data.eval.rows"
    ):
        across.query_shape(FeatureStore.open(url), make_spec(url, memory="1KiB", **options("primal")), ("eval", "m0"))


def test_a_kernel_of_other_options_is_refused_with_both() -> None:
    url = make_store()
    build(make_spec(url, **options("low_rank", iterations=1)))

    with pytest.raises(ContractError, match=r"(?s)full-kernels/low_rank-12/m0.*iterations.*gradstore prune"):
        build(make_spec(url, **options("low_rank", iterations=3)))


def test_a_kernel_that_is_not_built_or_not_whole_is_not_applied() -> None:
    url = make_store()
    spec = make_spec(url, **options("low_rank"))
    with pytest.raises(
        NotReadyError, match=r'there is no full kernel of m0 by kernel.route = "low_rank". Run `gradstore kernel`'
    ):
        open_full(FeatureStore.open(url), spec, "m0")
    with pytest.raises(KeyboardInterrupt):
        build(spec, Counting(stop_before=3))

    with pytest.raises(NotReadyError, match=r"6 of 6 parts are missing. Run `gradstore kernel` again"):
        open_full(FeatureStore.open(url), spec, "m0")


def test_a_kernel_of_features_that_have_changed_since_is_refused_and_pruned() -> None:
    url = make_store()
    spec = make_spec(url, **options("dual"))
    build(spec)
    train = FeatureStore.open(url).open_set("train")
    train.log.take_back(1, "a test")
    write_block(train, 1)

    for use in (lambda: build(spec), lambda: open_full(FeatureStore.open(url), spec, "m0")):
        with pytest.raises(
            ContractError, match=r"full-kernels/dual/m0: is stale: blocks 1 of train/m0 .*prune .* --stale"
        ):
            use()

    prune(url, [], stale=True, dry_run=False)
    build(spec)
    assert difference(contributions(spec), expected(url)) < 1e-4


@pytest.mark.parametrize(
    ("route", "members"),
    [("primal", "each"), ("primal", "mean"), ("dual", "each"), ("low_rank", "each"), ("low_rank", "mean")],
)
def test_the_plan_counts_the_tasks_objects_and_bytes_of_a_kernel(route: str, members: str) -> None:
    url = make_store(members=("early", "late"))
    spec = make_spec(url, members=members, **options(route))
    engine = Counting()
    build(spec, engine)

    widths = tuple(GROUPS.values())
    train = SetPlan(
        name="train",
        rows=30,
        length=1,
        dtype="float32",
        compression="none",
        block_rows=8,
        blocks=4,
        objects=0,
        feature_bytes=0,
        largest_chunk_bytes=0,
    )
    planned = full_stage(spec, Widths(stored=widths, full=widths, sides=()), train, 0)

    found = list(FeatureStore.open(url).storage.list_objects("full-kernels"))
    assert planned.tasks == len(engine.done)
    assert planned.objects == len(found)
    assert planned.written_bytes == sum(info.bytes for info in found if "/c." in info.path)
