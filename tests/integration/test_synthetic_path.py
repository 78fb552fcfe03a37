"""The whole path on a synthetic run finds what was planted: contributors, topics, and the groups that are good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest

from gradstore.plan import make_plan
from gradstore.spec import KernelSection, RunSpec, read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.report import report
from gradstore.stages.score import score
from gradstore.stages.verify import verify
from gradstore.store.artifacts import ScoresArtifact, WeightsArtifact
from gradstore.store.features import FeatureStore
from tests.runs import InThisProcess, gradstore
from tests.synthetic import features_of, synthesized

if TYPE_CHECKING:
    from tests.servers import S3Server

GROUPS, CONTRIBUTORS = 16, 4


class Found(NamedTuple):
    """Of a ranking, the share of contributors among as many first rows, and label precision@10."""

    recall: float
    precision: float


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a synthetic run in which half of the groups are noisy."""
    folder = tmp_path_factory.mktemp("planted")
    planted = {"topics": 12, "contributors": CONTRIBUTORS}
    synthesized(folder, rows=400, queries=16, learn_queries=16, groups=GROUPS, features=32, block_rows=128, **planted)
    return folder


def run_with(folder: Path, kind: str) -> RunSpec:
    run = read_spec(folder / "run.toml")
    weights = run.learn.model_copy(update={"name": f"of_{kind}", "k": 5})
    return run.model_copy(update={"kernel": KernelSection(kind=kind, name=kind), "learn": weights})


def attribute(run: RunSpec) -> None:
    for stage in (build_kernel, contribute, learn, score):
        stage(run, InThisProcess(), Progress(quiet=True))  # type: ignore[arg-type]


def judged(folder: Path, run: RunSpec, method: str) -> Found:
    artifact = ScoresArtifact.open(FeatureStore.open(run.run.store).storage, f"{run.kernel.name}.{method}")
    contributors = json.loads((folder / "planted.json").read_text(encoding="utf-8"))["contributors"]["eval"]
    first = [row for row in artifact.read().to_pylist() if row["side"] == "proponent" and row["rank"] <= CONTRIBUTORS]
    hits = sum(row["example"] in contributors[row["query"]] for row in first)
    return Found(hits / (len(contributors) * CONTRIBUTORS), artifact.read_summary()["precision_at_10"])


def weight_of_good(folder: Path, run: RunSpec) -> float:
    good = json.loads((folder / "planted.json").read_text(encoding="utf-8"))["good"]
    table = WeightsArtifact.open(FeatureStore.open(run.run.store).storage, run.learn.name).read().to_pylist()
    return float(sum(row["weight"] for row in table if row["group"] in good))


# Without a kernel the noisy groups drown the rest; one that whitens each group takes their scale away, and leaves noise.
@pytest.mark.parametrize(
    ("kind", "most_unweighted", "least_learned"),
    [("identity", 0.5, 0.6), ("diagonal", 1.0, 0.9), ("block", 1.0, 0.9), ("ekfac", 1.0, 0.9)],
)
def test_learned_weights_find_the_good_groups_and_with_them_the_contributors(
    made: Path, kind: str, most_unweighted: float, least_learned: float
) -> None:
    run = run_with(made, kind)

    attribute(run)

    unweighted, learned = (judged(made, run, method) for method in ("unweighted", run.learn.name))
    assert weight_of_good(made, run) > 0.65
    assert unweighted.recall < most_unweighted or unweighted.recall == 1.0
    assert learned.recall >= max(least_learned, unweighted.recall)
    assert learned.precision > unweighted.precision


@pytest.mark.slow
def test_the_kernel_across_groups_takes_the_same_store(made: Path) -> None:
    run = run_with(made, "full")

    attribute(run)

    assert judged(made, run, run.learn.name).recall > judged(made, run, "unweighted").recall > 0.05


def test_the_store_is_whole_planned_and_reported_like_any_other(made: Path) -> None:
    run = run_with(made, "identity")
    attribute(run)

    found = verify(run.run.store, full=True, progress=Progress(quiet=True))
    shown, page = report(run.run.store, None, "identity")
    planned = make_plan(run)

    assert found["problems"] == []
    assert shown.queries
    assert "topic-" in page.read_text(encoding="utf-8")
    assert planned.features == GROUPS * 32
    assert planned.sets["train"].rows == 400


@pytest.mark.slow
def test_the_command_makes_the_same_features_with_two_workers(tmp_path: Path) -> None:
    asked = ["--rows", "300", "--groups", "9", "--features", "24", "--queries", "8", "--topics", "6", "--noisy", "0.3"]

    done = gradstore("synth", tmp_path / "two", *asked, "--block-rows", "32", "--workers", "2", "--kernel", "identity")

    assert done.returncode == 0, done.stderr
    assert f"next: gradstore kernel {tmp_path / 'two' / 'run.toml'}" in done.stdout
    alone = synthesized(
        tmp_path / "one",
        rows=300,
        groups=9,
        features=24,
        queries=8,
        learn_queries=8,
        topics=6,
        contributors=5,
        noisy=0.3,
    )
    store = FeatureStore.open(str(tmp_path / "two" / "store"))
    for name in ("train", "learn", "eval"):
        expected = features_of(alone, name)
        for group, rows in features_of(store, name).items():
            np.testing.assert_array_equal(rows, expected[group])
    again = gradstore("synth", tmp_path / "two", *asked, "--seed", "1")
    assert again.returncode == 4
    assert "run.seed: store has 0, the run asks for 1" in again.stderr
    for verb in ("kernel", "contribute", "learn", "score"):
        done = gradstore(verb, tmp_path / "two" / "run.toml", "--quiet")
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_store_on_s3_holds_the_same_bits_as_one_on_a_disk(
    seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)

    remote = synthesized(tmp_path / "remote", store=seaweed.url("synthetic"))

    local = synthesized(tmp_path / "local")
    for name in ("train", "learn", "eval"):
        expected = features_of(local, name)
        for group, rows in features_of(remote, name).items():
            np.testing.assert_array_equal(rows, expected[group])
    assert (tmp_path / "remote" / "planted.json").exists()
    assert not (tmp_path / "remote" / "store").exists()
