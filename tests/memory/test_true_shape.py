"""What the plan says of memory, against one task of every stage at the shape of the reference study: 224 groups of 4,096.

The store is of two blocks of 256 rows and 500 queries. featurize and tail-patch, which need a model, are in test_plan.py.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine, Task
from gradstore.errors import DataError
from gradstore.plan import make_plan
from gradstore.plan.kernels import kernel_bundles
from gradstore.plan.memory import PROCESS_BYTES
from gradstore.plan.self_influence import influence_chunk
from gradstore.spec import RunSpec
from gradstore.stages.contribute import contribute, contribute_span, precondition
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_bundle, build_kernel
from gradstore.stages.kernel.sums import sum_power
from gradstore.stages.progress import Progress
from gradstore.stages.self_influence import compute_units
from gradstore.stages.spectra import kernel_settings
from gradstore.stages.synth import SynthSettings, make_folder
from gradstore.store.artifacts import KernelArtifact, SelfInfluenceArtifact, SelfInfluenceShape, SpectraShape
from gradstore.store.features import FeatureStore
from tests import stores
from tests.memory.held import Peak, first_task, in_a_fresh_process
from tests.runs import InThisProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]

GROUPS, FEATURES, ROWS, BLOCK_ROWS, QUERIES = 224, 4096, 512, 256, 250
# The groups of one bundle of the block kernel, and of one column of self-influence.
BUNDLED, TOGETHER = 6, 7
# Of features that are this large, products pass the largest float32.
HUGE = 2.0**64
# Where what a task adds to its process passes these multiples the plan would refuse what fits.
TOO_HIGH = 2.5
# Code that only a task touches, allocator arenas, and stacks of threads.
SLACK_BYTES = 32 * 2**20


class TrivialSpectra:
    """An engine that commits spectra without decomposing anything: they take the memory of any others."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        for task in tasks:
            store_url, kind, member, bundle = task.arguments
            artifact = KernelArtifact.open(FeatureStore.open(store_url).storage, kind, member)
            vectors = np.eye(FEATURES, dtype=np.float32)
            found = {group: (np.ones(FEATURES), vectors) for group in artifact.bundles[bundle]}
            artifact.write_bundle(bundle, found, facts={"rows": ROWS})
            yield task, len(found)


def settings(folder: Path, groups: int) -> SynthSettings:
    return SynthSettings(
        folder=folder,
        store=None,
        rows=ROWS,
        queries=QUERIES,
        learn_queries=QUERIES,
        groups=groups,
        features=FEATURES,
        topics=16,
        contributors=1,
        noisy=0.5,
        seed=1,
        dtype="float16",
        block_rows=BLOCK_ROWS,
        kernel="identity",
        workers=2,
        memory_per_worker="12GiB",
    )


def changed(spec: RunSpec, kernel: Mapping[str, Any], contribute: Mapping[str, Any] | None = None) -> RunSpec:
    """The same run with another kernel and contributions."""
    values = spec.model_dump()
    values["kernel"] = {**kernel}
    values["contribute"] = {**values["contribute"], **(contribute or {})}
    return RunSpec.model_validate(values)


def planned(spec: RunSpec, stage: str) -> int:
    """What a task of a stage adds to its process by the plan."""
    plan = make_plan(spec)
    of_stage = next(planned for planned in plan.stages if planned.name == stage)
    return of_stage.task_memory_bytes - PROCESS_BYTES - 4 * plan.partition.total_parameters


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """A run of all groups, to be planned."""
    return make_folder(settings(tmp_path_factory.mktemp("whole"), GROUPS))


@pytest.fixture(scope="module")
def wide(whole: RunSpec) -> Iterator[RunSpec]:
    """The same run with its features."""
    # A billion numbers: by two workers.
    with Engine(whole.cluster) as engine:
        featurize(whole, engine, Progress(quiet=True))
    yield whole
    shutil.rmtree(whole.run.store)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunSpec]:
    """A run of as many groups as tasks hold the spectra of, with its features and a block kernel."""
    folder = tmp_path_factory.mktemp("narrow")
    spec = changed(make_folder(settings(folder, TOGETHER)), {"kind": "block"})
    featurize(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    build_kernel(spec, cast(Engine, TrivialSpectra()), Progress(quiet=True))
    yield spec
    shutil.rmtree(folder)


def check(planned: int, peak: Peak, *, largest: bool = True) -> None:
    """Compare; where another task of the stage is the ``largest``, the plan is of that."""
    print(f"planned {planned >> 20} MiB, measured {peak.added >> 20} MiB beside {peak.before >> 20}")
    assert peak.before <= PROCESS_BYTES
    assert peak.added <= planned + SLACK_BYTES
    assert peak.highest <= planned + PROCESS_BYTES
    if largest:
        assert planned <= TOO_HIGH * peak.added + SLACK_BYTES


IDENTITY: dict[str, Any] = {"kind": "identity"}


@pytest.mark.parametrize("mode", ["tensor", "streamed", "scores"])
def test_contributions_take_no_more_memory_than_planned(wide: RunSpec, mode: str) -> None:
    spec = changed(wide, IDENTITY, {"mode": mode})
    check(planned(spec, "contribute"), first_task(contribute, spec, contribute_span))


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
def test_a_bundle_without_gram_matrices_takes_no_more_memory_than_planned(wide: RunSpec, kind: str) -> None:
    spec = changed(wide, {"kind": kind})
    check(planned(spec, "kernel"), first_task(build_kernel, spec, build_bundle))


def test_a_partial_sum_across_groups_takes_no_more_memory_than_planned(wide: RunSpec) -> None:
    spec = changed(wide, {"kind": "full", "route": "low_rank", "rank": 24, "oversample": 8})
    check(planned(spec, "kernel"), first_task(build_kernel, spec, sum_power))


def decompose_the_first(store_url: str) -> str:
    """Task: a bundle whose second group's Gram matrix is not finite, so that it ends when the first is decomposed."""
    with pytest.raises(DataError, match="it holds NaN or infinite values") as raised:
        build_bundle(store_url, "block", "m0", 0)
    return str(raised.value)


def test_bundles_and_columns_are_of_as_many_groups_as_are_measured() -> None:
    widths = [FEATURES] * GROUPS
    assert math.ceil(GROUPS / kernel_bundles("vectors", widths)) == BUNDLED
    assert influence_chunk(widths, ROWS, BLOCK_ROWS, apart=True) == (ROWS, TOGETHER)


def test_a_bundle_of_gram_matrices_takes_no_more_memory_than_planned(whole: RunSpec, tmp_path: Path) -> None:
    # All decompositions of a bundle would take minutes; those after the first take less than the matrices they replace.
    groups = {f"layers.{number}": FEATURES for number in range(BUNDLED)}
    info = stores.set_info(rows=ROWS, block_rows=BLOCK_ROWS, dtype="float16", groups=groups)
    arrays = tuple(replace(array, scale=HUGE) if array.name == "layers.1" else array for array in info.arrays)
    info = replace(info, arrays=arrays)
    train = stores.create(str(tmp_path / "store"), info)
    for block in range(info.num_blocks):
        rows = stores.features(info, block)
        rows["layers.1"] *= HUGE
        tables = {"examples": stores.examples(info, block), "statistics": stores.statistics(info, block)}
        train.write_block(block, rows, **tables, facts={})
    KernelArtifact.create(
        train.storage,
        "block",
        "m0",
        settings={"kind": "block"},
        shape=SpectraShape(widths=groups),
        bundles=[[*groups]],
    )
    task = Task(name="bundle-0", function=decompose_the_first, arguments=(train.storage.url,))
    told, peak = in_a_fresh_process(task)
    assert "group layers.1" in told
    check(planned(changed(whole, {"kind": "block"}), "kernel"), peak)
    shutil.rmtree(tmp_path / "store")


def test_self_influence_takes_no_more_memory_than_planned(whole: RunSpec, narrow: RunSpec) -> None:
    asked = {"normalize": "relatif"}
    store, spec = FeatureStore.open(narrow.run.store), changed(narrow, {"kind": "block"}, asked)
    groups = tuple(array.name for array in store.open_set("train").info.arrays)
    SelfInfluenceArtifact.create(
        store.storage,
        "block",
        "m0",
        settings={
            "kernel": kernel_settings(spec),
            "kernel_of": "each",
            "train": store.describe("train", ["m0"]),
        },
        shape=SelfInfluenceShape(
            rows=ROWS, block_rows=BLOCK_ROWS, gaps=(), groups=groups, chunk_rows=ROWS, chunk_groups=TOGETHER
        ),
    )
    arguments = (spec.run.store, spec.model_dump(), "m0", ["block"], [0])
    _, peak = in_a_fresh_process(Task(name="self-influence-0", function=compute_units, arguments=arguments))
    check(planned(changed(whole, {"kind": "block"}, asked), "self-influence"), peak)


def test_preconditioning_takes_no_more_memory_than_planned(wide: RunSpec, narrow: RunSpec) -> None:
    # Under the identity a task of all groups is measured, under a block kernel one of a few: it holds one spectrum at a time.
    spec = changed(wide, {**IDENTITY, "name": "again"})
    check(planned(spec, "contribute"), first_task(contribute, spec, precondition), largest=False)
    check(planned(narrow, "contribute"), first_task(contribute, narrow, precondition))
