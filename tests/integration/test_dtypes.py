"""A whole tiny run in every stored type, compressed or not: its contributions against those of float32 features."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine
from gradstore.plan.dtypes import SCORE_ERRORS
from gradstore.spec import read_spec
from gradstore.stages.progress import Progress
from gradstore.stages.run import STAGES
from gradstore.store.artifacts import ContributionArtifact
from gradstore.store.features import FeatureStore
from tests.runs import InThisProcess, make_run

# A model of 8 features a group is not the one that the errors were measured on; ten times as much would be another cause.
pytestmark = pytest.mark.slow

MOST = 10
LORIF = {"kind": "lorif", "rank": 4, "factors": 2}


@pytest.fixture(scope="module")
def exact(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Scores from float32 features, of logra and of lorif."""
    return {
        kind: scores(tiny_run, tmp_path_factory.mktemp(kind), {"dtype": "float32", "projection": projection})
        for kind, projection in (("logra", {"kind": "logra", "rank": 4}), ("lorif", LORIF))
    }


def scores(tiny_run: Path, folder: Path, features: dict[str, Any]) -> np.ndarray:
    """Featurize, build the kernel and contribute; return the scores [Q, N] of the eval queries."""
    (folder / "model").symlink_to(tiny_run / "model")
    spec = read_spec(make_run(folder, str(folder / "store"), {"features": features}))
    for stage in STAGES[:3]:
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    store = FeatureStore.open(spec.run.store)
    assert store.open_set("train").info.dtype == spec.features.dtype
    assert store.open_set("eval").info.dtype == "float32"
    artifact = ContributionArtifact.open(store.storage, "block", "eval")
    blocks = [block.copy() for block in artifact.read_blocks(0, artifact.shape.queries)]
    return np.asarray(np.concatenate(blocks, axis=1).sum(2, dtype=np.float64))


@pytest.mark.parametrize(
    ("dtype", "compression"), [("float32", "blosc"), ("float16", "none"), ("bfloat16", "blosc"), ("int8", "none")]
)
def test_scores_are_as_near_to_those_of_float32_as_the_plan_says(
    tiny_run: Path, tmp_path: Path, exact: dict[str, np.ndarray], dtype: str, compression: str
) -> None:
    found = scores(tiny_run, tmp_path, {"dtype": dtype, "compression": compression})
    assert relative(found, exact["logra"]) <= MOST * SCORE_ERRORS[dtype].block
    # Nothing was rounded if nothing differs.
    assert (relative(found, exact["logra"]) > 0) == (dtype != "float32")


def test_factors_with_a_scale_for_every_row_stand_for_the_same_matrices(
    tiny_run: Path, tmp_path: Path, exact: dict[str, np.ndarray]
) -> None:
    found = scores(tiny_run, tmp_path, {"dtype": "int8", "projection": LORIF})
    assert 0 < relative(found, exact["lorif"]) <= MOST * SCORE_ERRORS["int8"].block


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(found - expected).mean() / np.square(expected).mean()))
