"""Journey-TRAK: members are timesteps, with one kernel of the mean of their features (arXiv 2506.05647, eq. 12 and 15)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine
from gradstore.errors import SpecError
from gradstore.plan import make_plan
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import ContributionArtifact, KernelArtifact
from gradstore.store.features import FeatureStore
from tests import oracle
from tests.pictures import draw, write_npz
from tests.runs import InThisProcess, write_run
from tests.unets import on_path

pytestmark = pytest.mark.slow

TIMESTEPS = (0, 200, 400, 600, 800)
KERNEL: dict[str, Any] = {"kind": "block", "damping": 0.3, "mode": "relative"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("journey")
    write_npz(folder / "images.npz", *draw(60))
    with on_path(folder) as name:
        yield folder, name


def spec_of(folder: tuple[Path, str], name: str, changes: Mapping[str, Mapping[str, Any]]) -> RunSpec:
    made = {"source": "made", "rows": 4, "generate": {"steps": len(TIMESTEPS), "trajectory": True}}
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": name, "store": str(folder[0] / name)},
        "model": {"adapter": "diffusion", "source": f"{folder[1]}:make", "precision": "float32"},
        "model.options": {"timesteps": list(TIMESTEPS)},
        "data": {"source": "images.npz"},
        "data.train": {"rows": 40},
        "data.learn": made,
        "data.eval": made,
        "features": {"dtype": "float32", "projection": {"kind": "logra", "rank": 3}, "block_rows": 16},
        "kernel": dict(KERNEL),
        "learn": {"k": 3},
        "cluster": {"workers": 1, "memory_per_worker": "4GiB", "device": "cpu"},
    }
    for table, values in changes.items():
        tables.setdefault(table, {}).update(values)
    return read_spec(write_run(folder[0] / f"{name}.toml", tables))


def run(spec: RunSpec) -> FeatureStore:
    for stage in (featurize, build_kernel, contribute):
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    return FeatureStore.open(spec.run.store)


def members(eta: float) -> list[dict[str, Any]]:
    return [{"name": f"t{t:03d}", "eta": eta, "options": {"timesteps": [t]}} for t in TIMESTEPS]


def features(store: FeatureStore, set_name: str, member: str | None = None) -> dict[str, np.ndarray]:
    feature_set = store.open_set(set_name, member)
    blocks = [feature_set.read_block(block) for block in range(feature_set.info.num_blocks)]
    return {name: np.concatenate([block[name] for block in blocks]).astype(np.float64) for name in blocks[0]}


def stored(store: FeatureStore) -> np.ndarray:
    artifact = ContributionArtifact.open(store.storage, "block", "eval")
    return np.concatenate(list(artifact.read_blocks(0, artifact.shape.queries)), axis=1)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.fixture(scope="module")
def journey(folder: tuple[Path, str]) -> FeatureStore:
    etas: dict[str, dict[str, Any]] = {"model": {"members": members(1 / len(TIMESTEPS))}, "kernel": {"members": "mean"}}
    return run(spec_of(folder, "journey", etas))


def test_contributions_add_up_over_timesteps_with_one_kernel_of_their_mean(journey: FeatureStore) -> None:
    names = [f"t{t:03d}" for t in TIMESTEPS]
    train = {name: features(journey, "train", name) for name in names}
    queries = {name: features(journey, "eval", name) for name in names}
    groups = [*train["t000"]]
    expected = np.zeros((4, 40, len(groups)))

    for j, group in enumerate(groups):
        gram = np.zeros((train["t000"][group].shape[1],) * 2)
        for n in range(40):
            mean = np.mean([train[name][group][n] for name in names], axis=0)
            gram += np.outer(mean, mean)
        kernel = np.linalg.inv(gram + 0.3 * np.trace(gram) / len(gram) * np.eye(len(gram)))
        for name in names:
            expected[:, :, j] += queries[name][group] @ kernel @ train[name][group].T / len(names)

    assert_close(stored(journey), expected)
    KernelArtifact.open(journey.storage, "block", "members.mean")
    assert journey.contract["model"]["copies"]["t200"]["timesteps"] == [200]


def test_the_mean_over_timesteps_is_what_one_member_sees_of_all(
    folder: tuple[Path, str], journey: FeatureStore
) -> None:
    alone = run(spec_of(folder, "alone", {}))

    for set_name in ("train", "eval"):
        together = features(alone, set_name)
        for group, values in together.items():
            each = [features(journey, set_name, f"t{t:03d}")[group] for t in TIMESTEPS]
            assert_close(values, np.mean(each, axis=0))
    preconditioned = {
        group: oracle.precondition(rows, features(alone, "eval")[group], **KERNEL)
        for group, rows in features(alone, "train").items()
    }
    assert_close(stored(alone), oracle.contributions(preconditioned, features(alone, "train"), [*preconditioned]))


def test_the_plan_counts_one_kernel(folder: tuple[Path, str], journey: FeatureStore) -> None:
    together: dict[str, dict[str, Any]] = {"model": {"members": members(0.2)}, "kernel": {"members": "mean"}}
    plan = make_plan(spec_of(folder, "journey", together))

    kernel = next(stage for stage in plan.stages if stage.name == "kernel")

    files = [path for path in (folder[0] / "journey" / "kernels").rglob("*") if path.is_file()]
    assert kernel.objects == len(files)
    separate = make_plan(spec_of(folder, "separate", {"model": {"members": members(0.2)}}))
    assert next(stage for stage in separate.stages if stage.name == "kernel").tasks == 5 * kernel.tasks


def test_members_may_not_differ_in_anything_but_weights_and_copies(folder: tuple[Path, str]) -> None:
    differing = [{"name": "a"}, {"name": "b", "options": {"beta_end": 0.03}}]
    with pytest.raises(
        SpecError, match=r"model\.members: schedule\.beta_end of a is 0\.02, of b 0\.03\. Members are checkpoints"
    ):
        featurize(
            spec_of(folder, "differing", {"model": {"members": differing}}),
            cast(Engine, InThisProcess()),
            Progress(quiet=True),
        )
    unknown = [{"name": "a", "options": {"timestep": 3}}]
    with pytest.raises(SpecError, match=r"model\.options\.timestep: unknown key; accepted for diffusion"):
        make_plan(spec_of(folder, "unknown", {"model": {"members": unknown}}))
