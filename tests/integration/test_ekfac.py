"""EKFAC of a real model's features: its bases come from what featurize kept, groups of several parts among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine
from gradstore.errors import SpecError
from gradstore.numerics.kernel import Damping
from gradstore.plan import make_plan
from gradstore.spec import read_spec
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.stages.spectra import open_spectra, read_spectrum
from gradstore.store.features import FeatureStore
from tests import oracle
from tests.runs import InThisProcess, make_run

CHANGES: dict[str, dict[str, Any]] = {
    "data.train": {"rows": 20},
    "data.learn": {"rows": 3},
    "data.eval": {"rows": 3},
    "features": {"projection": {"kind": "logra", "rank": 3}, "dtype": "float32", "block_rows": 16},
    "features.groups": {"rule": "block"},
    "cluster": {"workers": 1},
}


def test_the_kernel_of_a_models_features_is_the_oracles_of_its_covariances(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    kernel = {"kernel": {"kind": "ekfac", "damping": 0.2}}
    spec = read_spec(make_run(tmp_path, str(tmp_path / "store"), {**CHANGES, **kernel}))
    for stage in (featurize, build_kernel):
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))

    store = FeatureStore.open(spec.run.store)
    train, artifact = store.open_set("train"), open_spectra(store, spec, "m0")
    statistics = train.read_statistics().to_pylist()
    for array in train.info.arrays:
        rows = np.concatenate([train.read_block(block)[array.name] for block in range(train.info.num_blocks)])
        factors = [
            tuple(
                np.sum([np.reshape(row[side], (size, size)) for row in statistics if row["part"] == part.part], axis=0)
                for side, size in zip(("left", "right"), part.shape, strict=True)
            )
            for part in array.parts
        ]
        assert len(factors) > 1
        found = read_spectrum(artifact, array.name).precondition(rows[:4], Damping(value=0.2))
        expected = oracle.precondition(
            rows,
            rows[:4],
            kind="ekfac",
            damping=0.2,
            mode="relative",
            factors=cast("list[tuple[np.ndarray, np.ndarray]]", factors),
        )
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"projection": {"kind": "dense", "features": 8}},
            r'group \S+ and of \d+ more are not matrices.*"logra" or "lorif"',
        ),
        ({"covariances": False}, r"found features.covariances = false"),
    ],
)
def test_a_plan_refuses_features_that_have_no_covariances(
    tiny_run: Path, tmp_path: Path, features: dict[str, object], message: str
) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    changes = {"features": {**CHANGES["features"], **features}, "kernel": {"kind": "ekfac"}}
    spec = read_spec(make_run(tmp_path, str(tmp_path / "store"), changes))

    with pytest.raises(SpecError, match=message):
        make_plan(spec)
