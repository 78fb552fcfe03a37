"""The whole path on a tiny model: against the oracle, killed and resumed, on a disk and on a real S3 server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from gradstore.numerics.learner import LearnerSettings, initial_raw_weights, visit_order
from gradstore.numerics.projection import Logra
from gradstore.plan.resolve import make_adapter, model_shape, resolve_projection
from gradstore.spec import read_spec
from gradstore.store.artifacts import ContributionArtifact, ScoresArtifact, WeightsArtifact
from gradstore.store.examples import from_table
from gradstore.store.features import FeatureStore
from tests import oracle
from tests.runs import command, gradstore, make_run
from tests.servers import S3Server

pytestmark = pytest.mark.slow

SETS = ("train", "learn", "eval")
ONE_WORKER = {"cluster": {"workers": 1}}


@pytest.fixture(scope="module")
def finished(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run.toml of a run that went undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "model").symlink_to(tiny_run / "model")
    run = make_run(folder, str(folder / "store"))
    done = gradstore("run", run)
    assert done.returncode == 0, done.stderr
    return run


def read_features(store: str | Path, set_name: str) -> dict[str, np.ndarray]:
    """All rows of every group of a set, [n, k_j]."""
    feature_set = FeatureStore.open(str(store)).open_set(set_name)
    blocks = [feature_set.read_block(block) for block in range(feature_set.info.num_blocks)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def test_every_number_of_the_path_is_the_oracles(finished: Path) -> None:
    spec = read_spec(finished)
    store = FeatureStore.open(spec.run.store)
    adapter = make_adapter(spec)
    model = adapter.load("cpu")
    groups = model_shape(adapter, model, spec).partition.groups
    names = [group.name for group in groups]
    projection = resolve_projection(spec)
    assert isinstance(projection, Logra)
    matrices = {group.name: projection.part_matrices(*group.parts, seed=spec.run.seed) for group in groups}

    features = {}
    for set_name in SETS:
        stored = read_features(spec.run.store, set_name)
        feature_set = store.open_set(set_name)
        expected: dict[str, list[np.ndarray]] = {name: [] for name in names}
        for block in range(feature_set.info.num_blocks):
            for example in from_table(feature_set.read_inputs(block)):
                gradients = oracle.gradient(model, lambda m, e=example: adapter.outputs(m, [e]))  # type: ignore[misc]
                for name in names:
                    output_matrix, input_matrix = (matrix.numpy() for matrix in matrices[name])
                    expected[name].append(
                        oracle.project_two_sided(gradients[f"{name}.weight"], output_matrix, input_matrix)
                    )
        # float16 rounds the train set to 2^-11; the model itself runs in float32.
        tolerance = 1e-3 if feature_set.info.dtype == "float16" else 1e-4
        for name in names:
            want = np.stack(expected[name])
            assert np.abs(stored[name] - want).max() <= tolerance * np.abs(want).max(), (set_name, name)
        features[set_name] = stored

    damping = {"kind": "block", "damping": 0.1, "mode": "relative"}
    c = {}
    for set_name in ("learn", "eval"):
        preconditioned = {
            name: oracle.precondition(features["train"][name], features[set_name][name], **damping)  # type: ignore[arg-type]
            for name in names
        }
        c[set_name] = oracle.contributions(preconditioned, features["train"], names)
        artifact = ContributionArtifact.open(store.storage, "block", set_name)
        stored_c = np.concatenate(list(artifact.read_blocks(0, artifact.shape.queries)), axis=1)
        assert np.abs(stored_c - c[set_name]).max() <= 1e-4 * np.abs(c[set_name]).max()
        c[set_name] = stored_c

    settings = LearnerSettings(k=3, epochs=3, seed=3, tile=12)
    w, losses = oracle.learn(
        c["learn"],
        initial_raw_weights(len(names), seed=3),
        visit_order(12, settings),
        k=3,
        learning_rate=spec.learn.learning_rate,
        weight_decay=spec.learn.weight_decays[0],
    )
    weights = WeightsArtifact.open(store.storage, "learned")
    np.testing.assert_allclose(weights.read()["weight"].to_numpy(), w, rtol=1e-6)
    np.testing.assert_allclose(weights.read_trajectory()["loss"].to_numpy(), losses, rtol=1e-6)

    scores = oracle.scores(c["eval"], w)
    ranked = ScoresArtifact.open(store.storage, "block.learned").read().to_pylist()
    for query in range(12):
        rows = [row for row in ranked if row["query"] == query]
        proponents = [row for row in rows if row["side"] == "proponent"]
        opponents = [row for row in rows if row["side"] == "opponent"]
        assert [row["example"] for row in proponents] == oracle.top(scores[query], 10)
        assert [row["example"] for row in opponents] == oracle.top(-scores[query], 10)
        for row in rows:
            assert row["score"] == pytest.approx(scores[query, row["example"]], rel=1e-6)
            assert sum(row["parts"]) == pytest.approx(row["score"], rel=1e-4, abs=1e-9)


def test_status_lists_what_the_run_made(finished: Path) -> None:
    store = read_spec(finished).run.store
    shown = gradstore("status", store, "--json")
    found = json.loads(shown.stdout)
    assert {row["name"]: row["rows"] for row in found["feature_sets"]} == {"train": 48, "learn": 12, "eval": 12}
    for row in found["feature_sets"]:
        assert row["groups"] == 14
        assert row["blocks"]["committed"] == row["blocks"]["total"] > 0
    assert [(row["kernel"], row["weights"]) for row in found["scores"]] == [("block", "learned"), ("block", None)]
    assert all(0 <= row["precision_at_10"] <= 1 for row in found["scores"])
    assert {row["method"] for row in found["baselines"]} == {"bm25", "random"}
    for kind in ("kernels", "contributions", "weights", "scores"):
        assert found[kind]
        assert all(row["committed"] == row["total"] for row in found[kind])
    assert "block.learned" in gradstore("status", store).stdout


def test_the_report_is_one_page_that_asks_for_nothing(finished: Path) -> None:
    store = Path(read_spec(finished).run.store)
    page = (store / "report.html").read_text(encoding="utf-8")

    class Links(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [
                f"{tag} {name}" for name, value in attrs if name in ("src", "href") and value and value[0] != "#"
            ]

    links = Links()
    links.feed(page)
    assert links.found == []
    assert "striker" in page
    shown = gradstore("report", str(store), "--output", str(store / "again.html"))
    assert shown.returncode == 0, shown.stderr
    assert "Label precision@10" in shown.stdout
    assert (store / "again.html").read_text(encoding="utf-8") == page


def test_running_again_computes_nothing(finished: Path) -> None:
    store = Path(read_spec(finished).run.store)

    def objects() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file() and path.suffix != ".html"}

    before = objects()
    again = gradstore("run", finished)
    assert again.returncode == 0, again.stderr
    assert objects() == before
    assert "48 done earlier" in again.stderr


def test_the_same_run_on_s3_ends_in_the_same_numbers(finished: Path, seaweed: S3Server, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(finished.parent / "model")
    run = make_run(tmp_path, seaweed.url("whole"), ONE_WORKER)
    done = gradstore("run", run, "--quiet", env=seaweed.env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Label precision@10" in done.stdout
    assert (tmp_path / "small-report.html").exists()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in seaweed.env.items():
            patch.setenv(name, value)
        for set_name in SETS:
            there, here = (
                read_features(seaweed.url("whole"), set_name),
                read_features(finished.parent / "store", set_name),
            )
            assert all((there[name] == here[name]).all() for name in here)
        weights = [
            WeightsArtifact.open(FeatureStore.open(url).storage, "learned").read()
            for url in (seaweed.url("whole"), str(finished.parent / "store"))
        ]
        assert weights[0].equals(weights[1])


def test_killed_in_featurize_the_same_command_computes_the_missing_blocks_and_the_same_bits(
    finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(finished.parent / "model")
    run = make_run(tmp_path, str(tmp_path / "store"))
    records = tmp_path / "store" / "features" / "train" / "blocks" / "m0"
    killed = subprocess.Popen(command("run", run), stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (records.exists() and any(records.glob("*.json"))) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    total = FeatureStore.open(str(tmp_path / "store")).open_set("train").info.num_blocks
    before = {path.name: path.read_bytes() for path in records.glob("*.json")}
    assert 0 < len(before) < total, "the kill came too late or too early to show anything"

    again = gradstore("run", run)
    assert again.returncode == 0, again.stderr
    after = {path.name: path.read_bytes() for path in records.glob("*.json")}
    assert len(after) == total
    assert {name: after[name] for name in before} == before
    for set_name in SETS:
        ours, undisturbed = (
            read_features(tmp_path / "store", set_name),
            read_features(finished.parent / "store", set_name),
        )
        assert all((ours[name] == undisturbed[name]).all() for name in undisturbed)


def test_other_settings_are_refused_side_by_side_and_leave_the_store_as_it_is(finished: Path, tmp_path: Path) -> None:
    store = Path(read_spec(finished).run.store)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    (tmp_path / "model").symlink_to(finished.parent / "model")
    cases: list[tuple[str, dict[str, dict[str, object]], str]] = [
        (
            "featurize",
            {"features": {"projection": {"kind": "logra", "rank": 5}}},
            "projection.rank: store has 4, the run asks for 5",
        ),
        ("featurize", {"data": {"label": "id"}}, "data_hash: store has"),
        ("contribute", {"kernel": {"damping": 0.7}}, "kernel.damping: store has 0.1, the run asks for 0.7"),
        ("learn", {"learn": {"k": 4}}, "learner.k: store has 3, the run asks for 4"),
        ("score", {"score": {"k": 11}}, "k: store has 10, the run asks for 11"),
    ]
    for stage, change, message in cases:
        refused = gradstore(stage, make_run(tmp_path, str(store), {**change, **ONE_WORKER}))
        assert refused.returncode == 4, (stage, refused.stderr)
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_a_second_kernel_in_half_precision_lives_beside_the_first(finished: Path, tmp_path: Path) -> None:
    spec = read_spec(finished)
    store = FeatureStore.open(spec.run.store)
    (tmp_path / "model").symlink_to(finished.parent / "model")
    second = make_run(
        tmp_path,
        spec.run.store,
        {
            **ONE_WORKER,
            "kernel": {"kind": "identity", "name": "plain"},
            "contribute": {"dtype": "float16"},
            "learn": {"name": "plain"},
        },
    )
    text = second.read_text(encoding="utf-8").replace("damping = 0.1\n", "")
    second.write_text(text, encoding="utf-8")
    for stage in ("kernel", "contribute", "learn", "score"):
        done = gradstore(stage, second)
        assert done.returncode == 0, done.stderr

    features = {name: read_features(spec.run.store, name) for name in ("train", "eval")}
    c = oracle.contributions(features["eval"], features["train"], list(features["train"]))
    artifact = ContributionArtifact.open(store.storage, "plain", "eval")
    stored = np.concatenate(list(artifact.read_blocks(0, 12)), axis=1)
    # Half precision keeps 11 bits of every value, and the largest of a query within its range.
    assert np.abs(stored - c).max() <= 2**-10 * np.abs(c).max()
    assert (np.abs(stored - c) <= 2**-10 * np.abs(c) + 1e-6 * np.abs(c).max(axis=(1, 2), keepdims=True)).all()

    unsure = gradstore("report", spec.run.store, "--output", tmp_path / "page.html")
    assert unsure.returncode == 2
    assert "Choose one with --kernel" in unsure.stderr
    shown = gradstore("report", spec.run.store, "--kernel", "plain", "--output", tmp_path / "page.html")
    assert shown.returncode == 0, shown.stderr
    assert "plain, unweighted" in shown.stdout
    assert "block, unweighted" not in shown.stdout
