"""DAS of a small UNet: residuals come with the features, and C, weights and scores are the dense pipeline's."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch

from gradstore.cluster import Engine
from gradstore.errors import SpecError
from gradstore.numerics.generator import derive_key, normal
from gradstore.numerics.learner import LearnerSettings, initial_raw_weights, visit_order
from gradstore.plan import make_plan
from gradstore.spec import KernelSection, RunSpec, read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.score import score
from gradstore.stages.self_influence import self_influence
from gradstore.store.artifacts import ContributionArtifact, ScoresArtifact, WeightsArtifact
from gradstore.store.examples import from_table
from gradstore.store.features import FeatureStore
from tests import oracle
from tests.pictures import draw, write_npz
from tests.runs import InThisProcess, write_run
from tests.unets import on_path

TIMESTEPS = (900, 400, 50)
ROWS = 14


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunSpec, str]]:
    """A run of DAS to its scores, and the module that its model is in."""
    folder = tmp_path_factory.mktemp("das")
    write_npz(folder / "images.npz", *draw(24))
    with on_path(folder) as name:
        tables: dict[str, dict[str, Any]] = {
            "run": {"name": "das", "store": f"memory://{name}", "seed": 5},
            "model": {"adapter": "diffusion", "source": f"{name}:make", "output": "das", "precision": "float32"},
            "model.options": {"timesteps": list(TIMESTEPS)},
            "data": {"source": "images.npz"},
            "data.train": {"rows": ROWS},
            "data.learn": {"rows": 5},
            "data.eval": {"rows": 4},
            "features": {"dtype": "float32", "projection": {"kind": "logra", "rank": 2}, "block_rows": 8},
            "kernel": {"kind": "full", "damping": 0.2, "spectra": "float64"},
            "learn": {"k": 3, "epochs": 2},
            "score": {"k": 10},
            "cluster": {"workers": 1, "memory_per_worker": "4GiB", "device": "cpu"},
        }
        spec = read_spec(write_run(folder / "run.toml", tables))
        for stage in (featurize, build_kernel, contribute, learn, score):
            stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
        yield spec, name


def test_the_plan_counts_the_self_influence_that_leverages_take(finished: tuple[RunSpec, str]) -> None:
    planned = next(stage for stage in make_plan(finished[0]).stages if stage.name == "self-influence")

    objects = list(FeatureStore.open(finished[0].run.store).storage.list_objects("self-influence"))
    assert planned.objects == len(objects)
    chunks = [info for info in objects if "/values/tau/c." in info.path]
    assert planned.written_bytes == sum(info.bytes for info in chunks)
    assert planned.tasks == 1
    assert planned.task_memory_bytes > 0
    plain = finished[0].model_copy(update={"model": finished[0].model.model_copy(update={"output": "square"})})
    assert "self-influence" not in [stage.name for stage in make_plan(plain).stages]


def test_the_plan_counts_that_of_every_damping_of_a_sweep(finished: tuple[RunSpec, str]) -> None:
    kernel = KernelSection(kind="block", name="block", options={"damping": [5.0, 50.0]})
    spec = finished[0].model_copy(update={"kernel": kernel})
    engine, quiet = cast(Engine, InThisProcess()), Progress(quiet=True)
    build_kernel(spec, engine, quiet)
    self_influence(spec, engine, quiet)

    planned = next(stage for stage in make_plan(spec).stages if stage.name == "self-influence")

    storage = FeatureStore.open(spec.run.store).storage
    written = [info for name in ("block_5", "block_50") for info in storage.list_objects(f"self-influence/{name}")]
    assert planned.objects == 1 + len(written)
    assert planned.written_bytes == sum(info.bytes for info in written if "/values/tau/c." in info.path)


def test_das_with_another_kernel_is_refused_by_the_plan(finished: tuple[RunSpec, str]) -> None:
    kernel = finished[0].kernel.model_copy(update={"kind": "diagonal", "options": {}})
    with pytest.raises(SpecError, match=r'kernel\.kind: found "diagonal" with model\.output = "das"'):
        make_plan(finished[0].model_copy(update={"kernel": kernel}))


def features(store: FeatureStore, set_name: str) -> dict[str, np.ndarray]:
    feature_set = store.open_set(set_name)
    blocks = [feature_set.read_block(block) for block in range(feature_set.info.num_blocks)]
    return {name: np.concatenate([block[name] for block in blocks]).astype(np.float64) for name in blocks[0]}


def residual(model: torch.nn.Module, image: np.ndarray) -> float:
    """Mean over the noised copies of the squared error of the noise that the model sees in them."""
    levels = oracle.noise_levels(1000, 1e-4, 0.02)
    pixels = image.astype(np.float64) / 127.5 - 1
    predicted, noise = [], []
    for t in TIMESTEPS:
        noise.append(normal(derive_key(5, f"timestep {t}", "noise"), 1, pixels.size).astype(np.float32))
        noisy = math.sqrt(levels[t]) * pixels + math.sqrt(1 - levels[t]) * noise[-1].reshape(pixels.shape)
        with torch.no_grad():
            predicted.append(model(torch.from_numpy(noisy)[None], torch.tensor([t]))[0].numpy())
    return oracle.diffusion_output(np.stack(predicted), np.stack(noise), "ddpm_simple")


def test_the_residual_of_every_example_is_in_its_table(finished: tuple[RunSpec, str]) -> None:
    store = FeatureStore.open(finished[0].run.store)
    model = importlib.import_module(finished[1]).make().double().eval()

    for set_name in ("train", "learn", "eval"):
        opened = store.open_set(set_name)
        rows = [row for block in range(opened.info.num_blocks) for row in from_table(opened.read_inputs(block))]
        expected = [residual(model, row.inputs["image"]) for row in rows]
        np.testing.assert_allclose(opened.read_column("residual"), expected, rtol=1e-5)


def test_contributions_weights_and_scores_are_those_of_the_dense_pipeline(finished: tuple[RunSpec, str]) -> None:
    store = FeatureStore.open(finished[0].run.store)
    train = features(store, "train")
    groups = [*train]
    whole = np.concatenate([train[group] for group in groups], 1)
    residuals = np.array(store.open_set("train").read_column("residual"))
    settings: dict[str, Any] = {"kind": "block", "damping": 0.2, "mode": "relative"}
    leverages = np.einsum("nd,nd->n", oracle.precondition(whole, whole, **settings), whole)
    assert (leverages < 1).all()
    c = {}
    for set_name in ("learn", "eval"):
        queries = features(store, set_name)
        linear = np.zeros((len(queries[groups[0]]), ROWS, len(groups)))
        for j, group in enumerate(groups):
            alone = np.concatenate([queries[each] * (each == group) for each in groups], 1)
            linear[:, :, j] = oracle.precondition(whole, alone, **settings) @ whole.T
        c[set_name] = oracle.das(linear, residuals, leverages)
        artifact = ContributionArtifact.open(store.storage, "full", set_name)
        found = np.concatenate([*artifact.read_blocks(0, artifact.shape.queries)], 1)
        assert np.abs(found - c[set_name]).max() <= 1e-4 * np.abs(c[set_name]).max()

    weights, _ = oracle.learn(
        c["learn"],
        initial_raw_weights(len(groups), seed=5),
        visit_order(5, LearnerSettings(k=3, epochs=2, tile=5, seed=5)),
        k=3,
        learning_rate=0.01,
        weight_decay=0.1,
        square=True,
    )
    learned = WeightsArtifact.open(store.storage, "learned").read()["weight"].to_numpy()
    np.testing.assert_allclose(learned, weights, rtol=1e-3)
    squares = oracle.scores(c["eval"], learned) ** 2
    table = ScoresArtifact.open(store.storage, "full.learned").read().to_pylist()
    for query in range(4):
        found_scores = [row["score"] for row in table if row["query"] == query and row["side"] == "proponent"]
        np.testing.assert_allclose(found_scores, sorted(squares[query], reverse=True)[:10], rtol=1e-3)
