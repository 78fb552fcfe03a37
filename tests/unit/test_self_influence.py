"""Self-influence of every train example in every group: against the dense kernels, however the work is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray

from gradstore.cluster import Task
from gradstore.errors import ContractError, NotReadyError
from gradstore.plan import self_influence as division
from gradstore.spec import RunSpec
from gradstore.stages.featurize.tables import statistics_of
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.stages.self_influence import compute_units, self_influence
from gradstore.store.artifacts import SelfInfluenceArtifact, SelfInfluenceShape, list_artifacts
from gradstore.store.features import FeatureStore
from gradstore.store.features.erasure import erase_rows
from tests import oracle, stores
from tests.gradients import RandomStore, covariances, random_store
from tests.runs import InSmallerTasks, InThisProcess

QUIET = Progress(quiet=True)
GROUPS = list(stores.GROUPS)
ROWS = 11


class Counting(InThisProcess):
    """An engine that notes the tasks that it ran."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def run(self, tasks: Any) -> Any:
        self.tasks += tasks
        yield from super().run(tasks)


def computed(spec: RunSpec) -> Counting:
    engine = Counting()
    build_kernel(spec, InThisProcess(), QUIET)  # type: ignore[arg-type]
    self_influence(spec, engine, QUIET)  # type: ignore[arg-type]
    return engine


def tau(url: str, kernel: str, member: str = "m0") -> np.ndarray:
    return SelfInfluenceArtifact.open(FeatureStore.open(url).storage, kernel, member).read()


def expected(made: RandomStore, member: str = "m0", **kernel: Any) -> np.ndarray:
    """The oracle's, of valid rows; NaN of the others."""
    rows = made.features("train", member)
    valid = np.isfinite(rows[GROUPS[0]]).all(1)
    settings = {"damping": 0.1, "mode": "relative", **kernel}
    found = np.full((len(valid), len(GROUPS)), np.nan)
    kept = {group: array[valid].astype(np.float64) for group, array in rows.items()}
    factors = covariances(member) if settings["kind"] == "ekfac" else {}
    preconditioned = {
        group: oracle.precondition(array, array, factors=[factors[group]] if factors else (), **settings)
        for group, array in kept.items()
    }
    found[valid] = oracle.self_influence(preconditioned, kept, GROUPS)
    return found


def expected_across(made: RandomStore, damping: float) -> np.ndarray:
    """The oracle's under the kernel of all groups side by side."""
    rows = made.features("train")
    valid = np.isfinite(rows[GROUPS[0]]).all(1)
    kept = {group: array[valid].astype(np.float64) for group, array in rows.items()}
    whole = np.concatenate([kept[group] for group in GROUPS], 1)
    edges = np.cumsum([0, *stores.GROUPS.values()])
    answers = oracle.precondition(whole, whole, kind="block", damping=damping, mode="relative")
    split = {group: answers[:, edges[j] : edges[j + 1]] for j, group in enumerate(GROUPS)}
    found = np.full((len(valid), len(GROUPS)), np.nan)
    found[valid] = oracle.self_influence(split, kept, GROUPS)
    return found


@pytest.mark.parametrize("kind", ["identity", "diagonal", "block", "ekfac"])
def test_self_influence_is_the_oracles_and_nan_where_a_row_is_not_valid(kind: str) -> None:
    made = random_store(invalid=[2, 9], zero=[4])

    computed(made.spec({"kernel": {"kind": kind}}))

    found = tau(made.url, kind)
    np.testing.assert_allclose(found, expected(made, kind=kind), rtol=2e-6)
    assert np.isnan(found[[2, 9]]).all()
    assert (found[4] == 0).all()


@pytest.mark.parametrize("route", ["primal", "dual", "low_rank"])
def test_across_groups_it_is_the_oracles_by_every_route(route: str) -> None:
    made = random_store(invalid=[2, 9], zero=[4])
    kernel = {"kind": "full", "route": route, "damping": [0.1, 2.0], "rank": 12, "spectra": "float64"}

    computed(made.spec({"kernel": kernel}))

    for name, damping in {"full_0p1": 0.1, "full_2": 2.0}.items():
        np.testing.assert_allclose(tau(made.url, name), expected_across(made, damping), rtol=1e-5, atol=1e-7)


def test_dampings_of_a_sweep_are_computed_in_one_pass_over_the_features() -> None:
    made = random_store()

    engine = computed(made.spec({"kernel": {"kind": "block", "damping": [0.01, 0.5]}}))

    assert len(engine.tasks) == len(GROUPS)
    for name, damping in {"block_0p01": 0.01, "block_0p5": 0.5}.items():
        np.testing.assert_allclose(tau(made.url, name), expected(made, kind="block", damping=damping), rtol=2e-6)


def test_every_member_has_its_own_kernel_or_that_of_the_mean() -> None:
    made = random_store(etas={"a": 0.5, "b": 2.0}, invalid=[3])
    computed(made.spec({"kernel": {"kind": "block"}}))
    np.testing.assert_allclose(tau(made.url, "block", "a"), expected(made, "a", kind="block"), rtol=2e-6)
    np.testing.assert_allclose(tau(made.url, "block", "b"), expected(made, "b", kind="block"), rtol=2e-6)

    shared = random_store(etas={"a": 0.5, "b": 2.0})
    computed(shared.spec({"kernel": {"kind": "block", "members": "mean"}}))

    both = [shared.features("train", member) for member in ("a", "b")]
    mean = {group: (both[0][group].astype(np.float64) + both[1][group]) / 2 for group in GROUPS}
    of_b = {
        group: oracle.precondition(mean[group], both[1][group], kind="block", damping=0.1, mode="relative")
        for group in GROUPS
    }
    found = tau(shared.url, "block", "b")
    np.testing.assert_allclose(found, oracle.self_influence(of_b, both[1], GROUPS), rtol=5e-6)


@pytest.mark.parametrize(("numbers", "workers"), [(4, 1), (8, 7), (24, 2)])
def test_however_the_work_is_divided_the_numbers_are_the_same_bit_for_bit(
    numbers: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = random_store(dtype="float16", invalid=[5])
    computed(made.spec({"kernel": {"kind": "block", "name": "whole"}}))
    monkeypatch.setattr(division, "CHUNK_NUMBERS", numbers)
    monkeypatch.setattr(division, "KERNEL_BUNDLES", 2)

    engine = computed(made.spec({"kernel": {"kind": "block", "name": "cut"}, "cluster": {"workers": workers}}))

    np.testing.assert_array_equal(tau(made.url, "cut"), tau(made.url, "whole"))
    rows = max(1, numbers // 8)
    units = -(-3 // rows) * 2
    assert sorted(unit for task in engine.tasks for unit in task.arguments[-1]) == list(range(units))
    assert len(engine.tasks) == min(units, 2 * -(-workers // 2))


@pytest.mark.parametrize("kind", ["identity", "block", "full"])
def test_a_task_in_smaller_pieces_computes_the_same_bit_for_bit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_store(invalid=[5])
    monkeypatch.setattr(division, "KERNEL_BUNDLES", 2)
    monkeypatch.setattr(division, "CHUNK_NUMBERS", 8)
    computed(made.spec({"kernel": {"kind": kind, "name": "whole"}}))

    self_influence(made.spec({"kernel": {"kind": kind, "name": "pieces"}}), InSmallerTasks(), QUIET)  # type: ignore[arg-type]

    np.testing.assert_array_equal(tau(made.url, "pieces"), tau(made.url, "whole"))


def test_what_is_committed_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_store()
    monkeypatch.setattr(division, "CHUNK_NUMBERS", 4)
    spec = made.spec({"kernel": {"kind": "block"}})
    build_kernel(spec, InThisProcess(), QUIET)  # type: ignore[arg-type]
    engine = Counting()
    self_influence(spec, engine, QUIET)  # type: ignore[arg-type]
    whole = tau(made.url, "block")
    artifact = SelfInfluenceArtifact.open(FeatureStore.open(made.url).storage, "block", "m0")
    task = engine.tasks[1]
    artifact.log.take_back(task.arguments[-1][1], "repair")
    with pytest.raises(NotReadyError, match=r"part 4 of 9 is not committed. Run `gradstore self-influence`"):
        artifact.read()

    again = Counting()
    self_influence(spec, again, QUIET)  # type: ignore[arg-type]

    assert [(task.function, task.arguments[-1]) for task in again.tasks] == [(compute_units, [4])]
    assert compute_units(*task.arguments) == 0
    np.testing.assert_array_equal(tau(made.url, "block"), whole)
    assert engine.tasks[0].rows == ROWS
    self_influence(spec, again, QUIET)  # type: ignore[arg-type]
    assert len(again.tasks) == 1


def test_an_erased_row_is_nan_and_self_influence_of_an_earlier_set_is_stale() -> None:
    made = random_store()
    spec = made.spec({"kernel": {"kind": "identity"}})
    computed(spec)
    erase_rows(FeatureStore.open(made.url), "train", [6], statistics_of)
    with pytest.raises(ContractError, match=r"self-influence/identity/m0: is stale: blocks 1 of train/m0"):
        self_influence(spec, InThisProcess(), QUIET)  # type: ignore[arg-type]

    later = made.spec({"kernel": {"kind": "identity", "name": "after"}})
    self_influence(later, InThisProcess(), QUIET)  # type: ignore[arg-type]

    found = tau(made.url, "after")
    assert np.isnan(found[6]).all()
    np.testing.assert_array_equal(np.delete(found, 6, 0), np.delete(tau(made.url, "identity"), 6, 0))


def test_another_tool_reads_it_and_the_store_lists_it(tmp_path: Path) -> None:
    made = random_store(tmp_path, invalid=[1])
    computed(made.spec({"kernel": {"kind": "block"}}))

    opened = xarray.open_zarr(f"{made.url}/self-influence/block/m0/values", consolidated=False, chunks=None)

    assert opened["tau"].dims == ("example", "group")
    assert opened["tau"].attrs["groups"] == GROUPS
    np.testing.assert_array_equal(opened["tau"].values, tau(made.url, "block"))
    listed = [found.path for found in list_artifacts(FeatureStore.open(made.url).storage)]
    assert listed == ["kernels/block/m0", "self-influence/block/m0"]


def test_a_missing_kernel_and_other_settings_are_refused_with_what_to_do() -> None:
    made = random_store()
    with pytest.raises(NotReadyError, match=r"kernels/block/m0: there is no such artifact. Run `gradstore kernel`"):
        self_influence(made.spec(), InThisProcess(), QUIET)  # type: ignore[arg-type]
    computed(made.spec({"kernel": {"damping": 0.1}}))
    with pytest.raises(
        ContractError, match=r"kernel\.damping: store has 0\.1, the run asks for 0\.2(.|\n)*choose another kernel"
    ):
        self_influence(made.spec({"kernel": {"damping": 0.2}}), InThisProcess(), QUIET)  # type: ignore[arg-type]


def test_units_of_chunks_cover_every_row_and_group_once() -> None:
    shape = SelfInfluenceShape(
        rows=30, block_rows=4, gaps=((18, 20),), groups=tuple("abcde"), chunk_rows=8, chunk_groups=2
    )
    seen = np.zeros((30, 5), int)
    for unit in range(shape.num_units):
        for block in shape.blocks_of(unit):
            for group in shape.groups_of(unit):
                seen[slice(*shape.block_range(block)), "abcde".index(group)] += 1
    assert (np.delete(seen, [18, 19], 0) == 1).all()
    assert (seen[18:20] == 0).all()
