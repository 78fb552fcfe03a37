"""The memory of a task does not follow the number of train examples: ten times as many blocks take as much."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from gradstore.cluster import Engine
from gradstore.spec import RunSpec
from gradstore.stages.contribute import contribute, contribute_span
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_bundle, build_kernel
from gradstore.stages.progress import Progress
from gradstore.stages.self_influence import compute_units, self_influence
from gradstore.stages.synth import SynthSettings, make_folder
from tests.memory.held import HoldingEngine
from tests.runs import InThisProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]

FEW, MANY = 4_000, 40_000
# Records of ten times as many blocks, and the allocator's moods.
SLACK_BYTES = 16 * 2**20


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RunSpec]]:
    """Runs of few and of many rows, with their features."""
    found = {}
    for rows in (FEW, MANY):
        folder = tmp_path_factory.mktemp(f"rows-{rows}")
        spec = make_folder(settings(folder, rows))
        featurize(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
        found[rows] = RunSpec.model_validate({**spec.model_dump(), "contribute": {"normalize": "relatif"}})
    yield found
    for spec in found.values():
        shutil.rmtree(Path(spec.run.store).parent)


def settings(folder: Path, rows: int) -> SynthSettings:
    return SynthSettings(
        folder=folder,
        store=None,
        rows=rows,
        queries=16,
        learn_queries=16,
        groups=24,
        features=64,
        topics=16,
        contributors=5,
        noisy=0.5,
        seed=1,
        dtype="float16",
        block_rows=500,
        kernel="block",
        workers=1,
        memory_per_worker="4GiB",
    )


def test_ten_times_as_many_rows_take_no_more_memory(runs: dict[int, RunSpec]) -> None:
    stages: list[tuple[Callable[..., None], Callable[..., Any]]] = [
        (build_kernel, build_bundle),
        (self_influence, compute_units),
        (contribute, contribute_span),
    ]
    for stage, task in stages:
        added = {}
        for rows, spec in runs.items():
            engine = HoldingEngine(task, finish=True)
            stage(spec, cast(Engine, engine), Progress(quiet=True))
            assert engine.peak is not None
            added[rows] = engine.peak.added
        print(f"{task.__name__}: {added[FEW] >> 10} KiB of {FEW:,} rows, {added[MANY] >> 10} KiB of {MANY:,}")
        assert added[MANY] <= added[FEW] + SLACK_BYTES
