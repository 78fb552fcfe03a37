"""The kernel stage on small stores: every kind inside a group against the oracle, what it refuses, and how it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine, Task
from gradstore.stages.kernel import build_bundle, build_kernel
from gradstore.stages.repair import repair
from gradstore.stages.spectra import open_spectra, read_spectrum
from gradstore.store.artifacts import KernelArtifact
from gradstore.store.features import FeatureStore
from tests import stores
from tests.kernels import QUIET, ROWS, build, check, info, made, run
from tests.runs import InThisProcess

KINDS = ["diagonal", "block", "ekfac"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"damping": [0.01, 1.0]}, {"damping": 0.5, "mode": "absolute"}], ids=str)
def test_spectra_give_the_oracles_kernel_for_any_damping(kind: str, options: dict[str, Any]) -> None:
    train = made()
    spec = run(train, {"kind": kind, **options})

    build(spec)

    check(train, spec)


@pytest.mark.parametrize("kind", ["block", "ekfac"])
def test_spectra_in_float64_are_exact_to_what_queries_are_stored_in(kind: str) -> None:
    train = made()
    spec = run(train, {"kind": kind, "spectra": "float64"})

    build(spec)

    artifact = KernelArtifact.open(train.storage, kind, "m0")
    assert {array.dtype for array in artifact.read("one")} == {np.dtype(np.float64)}
    check(train, spec, tolerance=2e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_c_factors_are_multiplied_out(kind: str) -> None:
    train = made(info(factors=1))
    spec = run(train, {"kind": kind})

    build(spec)

    check(train, spec)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_valid_take_no_part(kind: str) -> None:
    train = made(invalid=1)
    spec = run(train, {"kind": kind})

    build(spec)

    check(train, spec)
    artifact = KernelArtifact.open(train.storage, kind, "m0")
    assert artifact.log.committed()[0].facts["rows"] == ROWS - 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_member_has_a_kernel_of_its_own(kind: str) -> None:
    train = made(info(members=("early", "late")))
    spec = run(train, {"kind": kind})

    build(spec)

    for member in ("early", "late"):
        check(train.of_member(member), spec)


@pytest.mark.parametrize("kind", ["diagonal", "block"])
def test_one_kernel_of_all_members_is_of_the_mean_of_their_features(kind: str) -> None:
    train = made(info(members=("early", "late")))
    spec = run(train, {"kind": kind, "members": "mean"})

    build(spec)

    # Both members of these stores have the same features, and so has their mean.
    check(train, spec)
    assert train.storage.list_folders(f"kernels/{kind}") == ["members.mean"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_whose_features_are_all_zero_is_built_and_contributes_nothing(kind: str) -> None:
    train = made(zero="one")
    spec = run(train, {"kind": kind})

    build(spec)

    check(train, spec)
    spectrum = read_spectrum(open_spectra(FeatureStore.open(train.storage), spec, "m0"), "one")
    assert not spectrum.eigenvalues.any()


def test_the_identity_stores_its_settings_alone() -> None:
    train = made()

    build(run(train, {"kind": "identity"}))

    assert [entry.path for entry in train.storage.list_objects("kernels")] == ["kernels/identity/m0/artifact.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_kernel_goes_on_with_what_is_missing(kind: str) -> None:
    train = made()
    spec = run(train, {"kind": kind})
    ran: list[str] = []

    class Stopping(InThisProcess):
        def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
            for task, result in super().run(tasks[: 1 + len(ran)]):
                ran.append(task.name)
                yield task, result

    for _ in range(4):
        build_kernel(spec, cast(Engine, Stopping()), QUIET)

    tasks = [f"kernel-{kind}-covariances"] if kind == "ekfac" else []
    assert ran == [*tasks, *(f"kernel-{kind}-{bundle:04d}" for bundle in range(3))]
    check(train, spec)


def test_a_task_that_runs_again_finds_its_unit_committed_and_returns() -> None:
    train = made()
    build(run(train, {"kind": "block"}))
    before = stores.all_objects(train.storage)

    assert build_bundle(train.storage.url, "block", "m0", 0) == 1

    assert stores.all_objects(train.storage) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_kernel_is_repaired_into_the_same_bytes(kind: str) -> None:
    train = made()
    spec = run(train, {"kind": kind})
    build(spec)
    before = stores.all_objects(train.storage)
    chunks = [path for path in before if "/c." in path and path.startswith("kernels")]
    for path in chunks[::3]:
        train.storage.delete(path)

    repair(train.storage.url, full=True, dry_run=False, progress=QUIET)
    build(spec)

    after = stores.all_objects(train.storage)
    assert {path: after[path] for path in chunks} == {path: before[path] for path in chunks}
    check(train, spec)
