"""C of members, of margins and beside rows that are not valid, from stored features by the oracle."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gradstore.cluster import Engine
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.progress import Progress
from gradstore.stages.reading import examples_at
from gradstore.stages.run import stages_of
from gradstore.stages.score.tail_patch import patch_query
from gradstore.store.artifacts import ContributionArtifact, ScoresArtifact, WeightsArtifact
from gradstore.store.features import FeatureStore
from tests import oracle
from tests.pictures import draw, write_npz
from tests.runs import InThisProcess, write_run

pytestmark = pytest.mark.slow

# An image whose first pixel is white gives no number.
NETWORK = """
    from torch import nn


    class Glare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3))

        def forward(self, images):
            return self.layers(images / (1 - images[:, :, :1, :1]))
"""
ROWS = {"train": 40, "learn": 12, "eval": 12}
KERNEL = {"kind": "block", "damping": 0.3, "mode": "relative"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The module of a network, two sets of weights for it, and images, of which the last of each split has glare."""
    folder = tmp_path_factory.mktemp("contribute")
    (folder / "glare_networks.py").write_text(textwrap.dedent(NETWORK), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import glare_networks  # type: ignore[import-not-found]

        for seed, name in enumerate(("early", "late")):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                save_file(glare_networks.Glare().state_dict(), folder / f"{name}.safetensors")
        for seed, (name, rows) in enumerate(ROWS.items()):
            images, classes = draw(rows, (8, 8), seed=seed)
            images[:, 0, 0] //= 2
            write_npz(folder / f"{name}.npz", images, classes)
            images[-1, 0, 0] = 255
            write_npz(folder / f"{name}-glare.npz", images, classes)
        yield folder


def run(folder: Path, name: str, changes: Mapping[str, Mapping[str, Any]], *, glare: bool = False) -> RunSpec:
    """Do the whole path, but for the report, without a cluster."""
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": name, "store": str(folder / name)},
        "model": {
            "adapter": "image_classifier",
            "source": "glare_networks:Glare",
            "weights": "late.safetensors",
            "precision": "float32",
        },
        "data": {"shuffle": False},
        **{f"data.{split}": {"source": f"{split}{'-glare' if glare else ''}.npz"} for split in ROWS},
        "features": {"dtype": "float32", "projection": {"kind": "logra", "rank": 4}, "block_rows": 16},
        "kernel": KERNEL,
        "learn": {"k": 3, "epochs": 2},
        "score.tail_patch": {"queries": 12, "k": 2, "learning_rate": 0.001},
        "cluster": {"workers": 1, "memory_per_worker": "4GiB", "device": "cpu"},
    }
    for table, values in changes.items():
        # One kind of kernel does not take the options of another.
        tables[table] = dict(values) if table == "kernel" else {**tables.get(table, {}), **values}
    spec = read_spec(write_run(folder / f"{name}.toml", tables))
    for stage in stages_of(spec):
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    return spec


def stored_features(store: FeatureStore, set_name: str, member: str | None = None) -> dict[str, np.ndarray]:
    feature_set = store.open_set(set_name, member)
    blocks = [feature_set.read_block(block) for block in range(feature_set.info.num_blocks)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def stored_contributions(store: FeatureStore, set_name: str, kernel: str = "block") -> np.ndarray:
    artifact = ContributionArtifact.open(store.storage, kernel, set_name)
    return np.concatenate(list(artifact.read_blocks(0, artifact.shape.queries)), axis=1)


def expected_contributions(
    train: Mapping[str, np.ndarray], queries: Mapping[str, np.ndarray], kind: str = "block"
) -> np.ndarray:
    preconditioned = {
        name: oracle.precondition(train[name], queries[name], **{**KERNEL, "kind": kind})  # type: ignore[arg-type]
        for name in train
    }
    return oracle.contributions(preconditioned, train, list(train))


def multiplied_out(store: FeatureStore, features: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The matrices that stored factors stand for, one sum of outer products at a time."""
    full = {}
    for array in store.open_set("train").info.arrays:
        found = []
        for row in features[array.name].astype(np.float64):
            matrices = []
            for part in array.parts:
                assert part.factors is not None
                (rows, columns), stop = part.shape, part.start + part.features
                u = row[part.start : part.start + part.factors * rows].reshape(part.factors, rows)
                v = row[part.start + part.factors * rows : stop].reshape(part.factors, columns)
                matrices.append(sum(np.outer(u[a], v[a]) for a in range(part.factors)).reshape(-1))  # type: ignore[union-attr]
            found.append(np.concatenate(matrices))
        full[array.name] = np.stack(found)
    return full


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_members_add_up_each_its_eta_times_and_each_with_its_own_kernel(folder: Path) -> None:
    etas = {"early": 0.25, "late": 2.0}
    members = [{"name": name, "eta": eta, "weights": f"{name}.safetensors"} for name, eta in etas.items()]
    spec = run(folder, "members", {"model": {"members": members}})
    store = FeatureStore.open(spec.run.store)

    parts = {
        member: expected_contributions(stored_features(store, "train", member), stored_features(store, "eval", member))
        for member in etas
    }

    assert np.abs(parts["early"] - parts["late"]).max() > 0.1 * np.abs(parts["late"]).max()
    assert_close(stored_contributions(store, "eval"), 0.25 * parts["early"] + 2 * parts["late"])


def test_in_half_precision_the_scales_of_queries_fit_the_sum_over_members(folder: Path) -> None:
    members = [{"name": name, "eta": 1e-6, "weights": f"{name}.safetensors"} for name in ("early", "late")]
    spec = run(folder, "half", {"model": {"members": members}, "contribute": {"dtype": "float16"}})
    store = FeatureStore.open(spec.run.store)

    expected = 1e-6 * sum(
        expected_contributions(stored_features(store, "train", member), stored_features(store, "eval", member))
        for member in ("early", "late")
    )

    found = stored_contributions(store, "eval")
    assert np.abs(found - expected).max() <= 2**-10 * np.abs(expected).max()


def test_a_train_example_counts_one_minus_its_probability_times_where_the_output_is_a_margin(folder: Path) -> None:
    spec = run(folder, "margin", {"model": {"output": "margin"}})
    store = FeatureStore.open(spec.run.store)
    adapter = make_adapter(spec)
    model = adapter.load("cpu")
    rest = []
    for example in examples_at(store.open_set("train"), range(ROWS["train"])):
        with torch.no_grad():
            logits = model(torch.from_numpy(example.inputs["image"][None] / np.float32(255)))[0].numpy()
        rest.append(1 - oracle.class_probability(logits, int(example.inputs["class"])))

    expected = expected_contributions(stored_features(store, "train"), stored_features(store, "eval"))

    assert min(rest) < 0.9 * max(rest)
    assert_close(stored_contributions(store, "eval"), expected * np.array(rest)[None, :, None])


@pytest.mark.parametrize(("kind", "dtype"), [("block", "float32"), ("block", "float16"), ("identity", "float16")])
def test_rank_c_factors_are_the_matrices_that_they_stand_for(folder: Path, kind: str, dtype: str) -> None:
    changes: dict[str, dict[str, Any]] = {
        "features": {"projection": {"kind": "lorif", "rank": 4, "factors": 2}},
        "features.groups": {"biases": True},
        "kernel": KERNEL if kind == "block" else {"kind": kind},
        "contribute": {"dtype": dtype},
    }
    spec = run(folder, f"factors-{kind}-{dtype}", changes)
    store = FeatureStore.open(spec.run.store)
    train, queries = (multiplied_out(store, stored_features(store, name)) for name in ("train", "eval"))

    expected = expected_contributions(train, queries, kind)

    found = stored_contributions(store, "eval", kind)
    tolerance = 1e-4 if dtype == "float32" else 2**-10
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_the_tail_patch_of_a_margin_is_that_of_its_cross_entropy(folder: Path) -> None:
    changes = []
    for output in ("margin", "cross_entropy"):
        spec = run(folder, f"patched-{output}", {"model": {"output": output}})
        changes.append(
            patch_query(spec.run.store, spec.model_dump(), 1, {"some": [1, 4, 7]}, spec.score.tail_patch.model_dump())[
                "some"
            ]
        )

    # Images 1, 4 and 7 have the query's class: training on them raises its probability.
    assert changes[0] == pytest.approx(changes[1], rel=1e-3)
    assert changes[0] > 0


def test_rows_that_are_not_valid_take_no_part_in_kernel_scores_weights_and_figures(folder: Path) -> None:
    spec = run(folder, "glare", {"features": {"max_invalid": 0.1}}, glare=True)
    store = FeatureStore.open(spec.run.store)
    train, queries = (stored_features(store, name) for name in ("train", "eval"))
    assert all(np.isnan(rows[-1]).all() for rows in (*train.values(), *queries.values()))

    expected = expected_contributions(
        {name: rows[:-1] for name, rows in train.items()}, {name: rows[:-1] for name, rows in queries.items()}
    )

    assert_close(stored_contributions(store, "eval")[:-1, :-1], expected)
    assert np.isfinite(WeightsArtifact.open(store.storage, "learned").read()["weight"].to_numpy()).all()
    for name in ("block.unweighted", "block.learned", "baseline.random"):
        artifact = ScoresArtifact.open(store.storage, name)
        ranked = artifact.read()
        assert np.isfinite(ranked["score"].to_numpy()).all()
        assert max(ranked["example"].to_pylist()) < ROWS["train"] - 1
        assert artifact.read_summary()["tail_patch"]["queries"] == ROWS["eval"] - 1
        assert 0 <= artifact.read_summary()["precision_at_10"] <= 1


def test_images_without_captions_are_not_ranked_by_words(folder: Path) -> None:
    spec = run(folder, "wordless", {"score.tail_patch": {"queries": 0}})
    storage = FeatureStore.open(spec.run.store).storage

    assert sorted(storage.list_folders("scores")) == ["baseline.random", "block.learned", "block.unweighted"]


def test_scores_under_given_weights_rank_as_the_tensor_does_and_nothing_is_learned(folder: Path) -> None:
    without: dict[str, dict[str, Any]] = {"score.tail_patch": {"queries": 0}}
    spec = run(folder, "scored", without)
    changes = {**without, "kernel": {**KERNEL, "name": "again"}, "contribute": {"mode": "scores", "weights": "learned"}}

    run(folder, "scored", changes)

    storage = FeatureStore.open(spec.run.store).storage
    assert storage.list_folders("weights") == ["learned"]
    assert storage.list_folders("contributions") == ["block"]
    for name in ("unweighted", "learned"):
        found, expected = (ScoresArtifact.open(storage, f"{kernel}.{name}").read() for kernel in ("again", "block"))
        np.testing.assert_allclose(found["score"].to_numpy(), expected["score"].to_numpy(), rtol=1e-4)
        assert found["example"].to_pylist() == expected["example"].to_pylist()
        assert set(map(len, found["parts"].to_pylist())) == {0}
