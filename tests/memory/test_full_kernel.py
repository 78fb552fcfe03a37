"""What the plan says of memory, against one task of each kind of the full kernel's exact routes (ADR 0016).

The Gram matrix is most of what they hold; of a dual kernel of few rows it is the rows of one group that is wide.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from gradstore.cluster import Engine
from gradstore.spec import RunSpec
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.kernel.sums import decompose, sum_gram
from gradstore.stages.progress import Progress
from gradstore.stages.synth import make_folder
from tests.memory.held import first_task
from tests.memory.test_true_shape import changed, check, planned, settings
from tests.runs import InThisProcess

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]

SIDE, BLOCK_ROWS = 2560, 128
PRIMAL: dict[str, Any] = {"kind": "full", "route": "primal"}
DUAL: dict[str, Any] = {"kind": "full", "route": "dual"}


def make(folder: Path, *, rows: int, groups: int, features: int) -> RunSpec:
    sizes = replace(settings(folder, groups), rows=rows, features=features, queries=8, learn_queries=8)
    spec = make_folder(replace(sizes, block_rows=BLOCK_ROWS))
    featurize(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    return spec


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunSpec]:
    """A run of as many rows as features."""
    spec = make(tmp_path_factory.mktemp("square"), rows=SIDE, groups=10, features=SIDE // 10)
    yield spec
    shutil.rmtree(spec.run.store)


@pytest.mark.parametrize("kernel", [PRIMAL, DUAL], ids=["primal", "dual"])
def test_a_gram_matrix_across_groups_takes_no_more_memory_than_planned(square: RunSpec, kernel: dict[str, Any]) -> None:
    spec = changed(square, kernel)
    most = planned(spec, "kernel")
    check(most, first_task(build_kernel, spec, sum_gram), largest=False)
    check(most, first_task(build_kernel, spec, decompose))


def test_a_sum_over_a_group_that_is_wide_takes_no_more_memory_than_planned(tmp_path: Path) -> None:
    # First 512 rows are held, then the rest.
    wide = make(tmp_path, rows=640, groups=1, features=2**16)
    spec = changed(wide, {**DUAL, "spectra": "float64"})
    check(planned(spec, "kernel"), first_task(build_kernel, spec, sum_gram))
    shutil.rmtree(wide.run.store)
