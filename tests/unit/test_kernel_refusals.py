"""Kernels inside a group: what the stage refuses, where covariances are missing, and what the plan says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine, Task
from gradstore.errors import ContractError, DataError, NotReadyError, ResourceError, SpecError
from gradstore.numerics.kernel import Block
from gradstore.plan.kernels import (
    kernel_bundles,
    kernel_bytes,
    kernel_objects,
    kernel_tasks,
    refuse_without_covariances,
)
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.sizes import Widths
from gradstore.stages.featurize.tables import Statistics, statistics_of
from gradstore.stages.kernel import build_kernel
from gradstore.stages.reading import full_width
from gradstore.stages.spectra import open_spectra, require_current
from gradstore.store.artifacts import KernelArtifact
from gradstore.store.features import FeatureStore, SetInfo
from gradstore.store.features.erasure import erase_rows
from tests import stores
from tests.kernels import QUIET, build, check, empty, info, made, run
from tests.runs import InThisProcess


class TestCovariances:
    def test_blocks_that_lost_theirs_to_an_erasure_are_left_out_and_counted(self) -> None:
        train = made()
        erase_rows(FeatureStore.open(train.storage), "train", [5], statistics_of)
        train = FeatureStore.open(train.storage).open_set("train")
        spec = run(train, {"kind": "ekfac"})

        build(spec)

        check(train, spec, without=(1,))
        artifact = KernelArtifact.open(train.storage, "ekfac", "m0")
        assert artifact.covariances_unit is not None
        facts = artifact.log.committed()[artifact.covariances_unit].facts
        assert facts == {"blocks": 3, "left_out": [1]}

    def test_none_in_any_block_are_refused_before_features_are_read(self) -> None:
        train = made(known=False)

        with pytest.raises(SpecError, match=r"group one of memory:.*/train/m0 has no covariances.*covariances = true"):
            build(run(train, {"kind": "ekfac"}))

        artifact = KernelArtifact.open(train.storage, "ekfac", "m0")
        assert artifact.missing_units() == [0, 1, 2, 3]

    def test_features_that_are_no_matrices_of_parts_are_refused(self) -> None:
        plain = info()
        dense = replace(plain, arrays=(replace(plain.arrays[0], parts=()), *plain.arrays[1:]))
        train = made(dense, known=False)

        with pytest.raises(SpecError, match=r'"ekfac": the features of group one are not matrices.*"logra" or "lorif"'):
            build(run(train, {"kind": "ekfac"}))
        assert not train.storage.list_folders("kernels")

    def test_of_the_mean_of_members_are_not_known(self) -> None:
        train = made(info(members=("early", "late")))

        with pytest.raises(SpecError, match=r'found kernel.members = "mean"; accepted: "each"'):
            build(run(train, {"kind": "ekfac", "members": "mean"}))


def test_a_row_that_is_not_finite_though_it_counts_as_valid_is_told_with_the_artifact_and_the_group() -> None:
    train = made(info(rows=8), known=True)
    values = {name: np.full_like(rows, 1e25) for name, rows in stores.features(info(rows=12), 2).items()}
    other = empty(info(rows=4))
    statistics = Statistics(other.info).table(values)
    other.write_block(0, values, examples=stores.examples(other.info, 0), statistics=statistics, facts={})

    with pytest.raises(DataError, match=r"memory:.*/kernels/block/m0: group one: Gram matrix.*spectra = .float64"):
        build(run(other, {"kind": "block"}))
    build(run(train, {"kind": "block"}))


def test_a_kernel_of_other_features_or_settings_is_refused() -> None:
    train = made()
    build(run(train, {"kind": "block"}))

    with pytest.raises(ContractError, match=r"(?s)kernels/block/m0.*spectra.*float32.*float64.*prune"):
        build(run(train, {"kind": "block", "spectra": "float64"}))


def test_a_stale_kernel_is_refused_by_those_who_build_and_those_who_apply_it() -> None:
    train = made()
    spec = run(train, {"kind": "block"})
    build(spec)
    store = FeatureStore.open(train.storage)
    erase_rows(store, "train", [5], statistics_of)

    for use in (build, lambda spec: open_spectra(store, spec, "m0")):
        with pytest.raises(ContractError, match=r"kernels/block/m0: is stale: blocks 1 of train/m0.*prune .* --stale"):
            use(spec)


def test_a_kernel_of_a_train_set_that_was_made_of_other_examples_is_refused() -> None:
    train, other = made(), made(replace(info(), data_hash="other examples"))
    build(run(train, {"kind": "block"}))
    artifact = KernelArtifact.open(train.storage, "block", "m0")

    require_current(artifact, FeatureStore.open(train.storage))
    with pytest.raises(ContractError, match=r"made from other examples.*prune .* kernels/block/m0.*gradstore kernel"):
        require_current(artifact, FeatureStore.open(other.storage))


def test_a_kernel_that_is_not_there_or_not_complete_says_what_to_run() -> None:
    train = made()
    spec, store = run(train, {"kind": "block"}), FeatureStore.open(train.storage)

    with pytest.raises(NotReadyError, match=r"kernels/block/m0: there is no such artifact. Run `gradstore kernel`"):
        open_spectra(store, spec, "m0")

    class Nothing(InThisProcess):
        def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
            return iter(())

    build_kernel(spec, cast(Engine, Nothing()), QUIET)
    with pytest.raises(NotReadyError, match=r"3 of 3 bundles of groups are missing. Run `gradstore kernel`"):
        open_spectra(store, spec, "m0")


def test_a_worker_that_is_too_small_is_told_before_work_starts() -> None:
    train = made()
    small = {"workers": 1, "memory_per_worker": "300MiB"}

    with pytest.raises(
        ResourceError, match=r'kernel.kind = "block": one task needs .* a worker may use 315 MB.*"ekfac"'
    ):
        build(run(train, {"kind": "block"}, cluster=small))
    assert not train.storage.list_folders("kernels")


def widths_of(of: SetInfo) -> Widths:
    return Widths(
        stored=tuple(array.features for array in of.arrays),
        full=tuple(full_width(array) for array in of.arrays),
        sides=tuple(tuple(part.shape for part in array.parts) for array in of.arrays),
    )


@pytest.mark.parametrize("options", [{"kind": "identity"}, {"kind": "diagonal"}, {"kind": "block"}, {"kind": "ekfac"}])
@pytest.mark.parametrize("spectra", ["float32", "float64"])
def test_the_plan_counts_tasks_objects_and_bytes_exactly(options: dict[str, Any], spectra: str) -> None:
    if options["kind"] in ("block", "ekfac"):
        options = {**options, "spectra": spectra}
    train = made()
    spec = run(train, options)
    ran: list[Task] = []

    class Counting(InThisProcess):
        def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
            ran.extend(tasks)
            return super().run(tasks)

    build_kernel(spec, cast(Engine, Counting()), QUIET)

    kernel, widths = resolve_kernel(spec), widths_of(train.info)
    written = {path: data for path, data in stores.all_objects(train.storage).items() if path.startswith("kernels/")}
    above = [path for path in written if path.count("/") < 3 and path.endswith("zarr.json")]
    assert len(written) - len(above) == kernel_objects(kernel.basis, widths)
    assert sum(len(data) for path, data in written.items() if "/c." in path) == kernel_bytes(kernel, widths)
    assert len(ran) == kernel_tasks(kernel.basis, widths)


def test_a_plan_refuses_ekfac_where_featurize_keeps_no_covariances() -> None:
    train = made()
    adam = {"source": "nowhere", "members": [{"name": "one"}, {"name": "two", "optimizer": "adam.pt"}]}
    settings: list[tuple[str, dict[str, Any]]] = [
        (r"found features.covariances = false. Set it to true", {"features": {"covariances": False}}),
        (r"found model.optimizer; features in Adam's direction have none", {"model": adam}),
    ]
    for message, sections in settings:
        spec = run(train, {"kind": "ekfac"}, **sections)
        with pytest.raises(SpecError, match=message):
            refuse_without_covariances(spec, resolve_kernel(spec))
        refuse_without_covariances(spec, Block())


def test_gram_matrices_of_wide_groups_are_built_in_more_bundles_and_sums_of_squares_are_not() -> None:
    assert kernel_bundles("vectors", [128] * 224) == 32
    assert kernel_bundles("vectors", [4096] * 224) == 42
    assert kernel_bundles("kronecker", [4096] * 224) == kernel_bundles("standard", [4096] * 224) == 32
    assert kernel_bundles("vectors", [4096] * 3) == 3
