"""Real diffusion models of real digits, featurized by the installed command, against autograd example by example."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradstore.numerics.generator import derive_key, normal
from gradstore.plan.resolve import make_adapter, model_shape, resolve_projection
from gradstore.spec import RunSpec, read_spec
from gradstore.store.examples import Example, from_table
from gradstore.store.features import FeatureStore
from tests import oracle
from tests.runs import gradstore, toml
from tests.unets import on_path

pytestmark = pytest.mark.slow

SEED = 1
STEPS = 400
CLUSTER = {"workers": 2, "memory_per_worker": "4GiB", "device": "cpu"}
GENERATE = {"steps": 8, "seed": 3, "trajectory": True}
# f of one example, differentiable, by its own loops.
Output = Callable[[nn.Module, Example], Tensor]


def digits(path: Path) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits in an archive, and as a model is trained on them: float32 [n, 1, 8, 8] in [-1, 1]."""
    found = load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    np.savez(path, image=images, label=found.target)
    return torch.from_numpy(images)[:, None] / 127.5 - 1, torch.from_numpy(found.target)


def train(
    model: nn.Module, images: Tensor, classes: Tensor, call: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> list[float]:
    """A short training: its losses."""
    levels = torch.from_numpy(oracle.noise_levels(STEPS, 1e-4, 0.05)).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        rows = torch.randint(0, len(images), (64,), generator=generator)
        t = torch.randint(0, STEPS, (64,), generator=generator)
        noise = torch.randn(64, *images.shape[1:], generator=generator)
        left = levels[t].view(-1, 1, 1, 1)
        predicted = call(left.sqrt() * images[rows] + (1 - left).sqrt() * noise, t, classes[rows])
        loss = (predicted - noise).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def write_run(folder: Path, changes: Mapping[str, Mapping[str, Any]]) -> Path:
    tables: dict[str, dict[str, Any]] = {
        "run": {"name": "digits", "store": str(folder / "store"), "seed": SEED},
        "model": {"adapter": "diffusion", "precision": "float32"},
        "model.options": {"timesteps": 10},
        "data": {"source": str(folder / "digits.npz")},
        "data.train": {"rows": 48},
        "data.learn": {"rows": 8},
        "data.eval": {"rows": 12},
        "features": {"dtype": "float32", "projection": {"kind": "logra", "rank": 4}},
        "learn": {"k": 3},
        "cluster": CLUSTER,
    }
    for table, values in changes.items():
        tables.setdefault(table, {}).update(values)
    lines = []
    for table, values in tables.items():
        lines += [f"[{table}]", *(f"{key} = {toml(value)}" for key, value in values.items()), ""]
    (folder / "run.toml").write_text("\n".join(lines), encoding="utf-8")
    return folder / "run.toml"


@pytest.fixture(scope="module")
def unet_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run.toml of a class-conditional UNet that was trained here, featurized by the command line."""
    import importlib

    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("unet")
    with on_path(folder) as name:
        arguments = {"channels": 1, "width": 16, "classes": 10}
        model: nn.Module = importlib.import_module(name).make(**arguments)
        losses = train(model, *digits(folder / "digits.npz"), model)
        assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
        save_file(model.state_dict(), folder / "unet.safetensors")
        options = {
            "arguments": arguments,
            "class_argument": "y",
            "steps": STEPS,
            "beta_end": 0.05,
            "copies_per_call": 4,
        }
        run = write_run(
            folder,
            {
                "model": {"source": f"{name}:make", "weights": str(folder / "unet.safetensors")},
                "model.options": options,
                "data.eval": {"source": "the model", "rows": 12, "generate": GENERATE},
            },
        )
        done = gradstore("featurize", run, env={"PYTHONPATH": str(folder)}, cwd=folder)
        assert done.returncode == 0, done.stderr
        yield run


def noised(
    example: Example, timesteps: Sequence[int], levels: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """The noisy images that an example is seen in, the noise in them, and their timesteps."""
    image = example.inputs["image"].astype(np.float64) / 127.5 - 1
    for t in timesteps:
        noise = (
            normal(derive_key(SEED, f"timestep {t}", "noise"), 1, image.size).reshape(image.shape).astype(np.float32)
        )
        yield math.sqrt(levels[t]) * image + math.sqrt(1 - levels[t]) * noise, noise, t


def passed(example: Example, levels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """The noisy images that a sample went through."""
    last = example.inputs["sample"].astype(np.float64)
    for t, noisy in zip(example.inputs["timesteps"].tolist(), example.inputs["trajectory"], strict=True):
        yield noisy, (noisy - math.sqrt(levels[t]) * last) / math.sqrt(1 - levels[t]), t


def simple_loss(
    copies: Callable[[Example], Iterator[tuple[np.ndarray, np.ndarray, int]]], argument: str | None
) -> Output:
    """L_simple of one example, one noisy image after the other."""

    def output(model: nn.Module, example: Example) -> Tensor:
        losses = []
        for noisy, noise, t in copies(example):
            given = {} if argument is None else {argument: torch.tensor([int(example.inputs["class"])])}
            predicted = model(torch.tensor(noisy, dtype=torch.float64)[None], torch.tensor([t]), **given)
            predicted = getattr(predicted, "sample", predicted)
            losses.append((predicted[0] - torch.tensor(noise, dtype=torch.float64)).square().sum())
        return torch.stack(losses).mean()

    return output


def assert_features_are_projected_gradients(spec: RunSpec, set_name: str, rows: Sequence[int], output: Output) -> None:
    adapter, feature_set = make_adapter(spec), FeatureStore.open(spec.run.store).open_set(set_name)
    model = adapter.load("cpu")
    groups = model_shape(adapter, model, spec).partition.groups
    assert [array.name for array in feature_set.info.arrays] == [group.name for group in groups]
    projection = resolve_projection(spec)
    for row in rows:
        block, place = divmod(row, feature_set.info.block_rows)
        example = from_table(feature_set.read_inputs(block))[place]
        stored = feature_set.read_block(block)
        loss = feature_set.read_examples(["loss"], block=block)["loss"][place].as_py()
        with torch.no_grad():
            assert loss == pytest.approx(float(output(model.double(), example)), rel=1e-4)

        def of_this(copied: nn.Module, example: Example = example) -> Tensor:
            return output(copied, example)

        expected = oracle.gradient(model, of_this)
        for group in groups:
            (placed,) = projection.projectors(group, seed=SEED, device=torch.device("cpu"))
            (part,) = group.parts
            gradient = expected[part.parameter]
            want = placed.projector.whole(torch.from_numpy(gradient)[None])[0].numpy()
            error = np.abs(stored[group.name][place] - want).max()
            assert error <= 1e-4 * np.abs(want).max(), (set_name, row, group.name, error, np.abs(want).max())


def test_features_of_a_unet_are_the_projected_gradients_of_autograd(unet_run: Path) -> None:
    spec, levels = read_spec(unet_run), oracle.noise_levels(STEPS, 1e-4, 0.05)
    output = simple_loss(lambda example: noised(example, range(0, STEPS, STEPS // 10), levels), "y")

    assert_features_are_projected_gradients(spec, "train", [0, 17, 47], output)
    assert_features_are_projected_gradients(spec, "learn", [7], output)


def test_features_of_what_it_made_are_those_of_the_noisy_images_it_went_through(unet_run: Path) -> None:
    spec, levels = read_spec(unet_run), oracle.noise_levels(STEPS, 1e-4, 0.05)
    table = FeatureStore.open(spec.run.store).open_set("eval").read_inputs(0).to_pydict()

    assert table["example_id"] == [f"sample-3-{number}" for number in range(12)]
    assert table["label"] == [str(number % 10) for number in range(12)]
    assert_features_are_projected_gradients(
        spec, "eval", [0, 11], simple_loss(lambda example: passed(example, levels), "y")
    )


def test_the_whole_path_runs_and_a_second_run_finds_nothing_to_do(unet_run: Path) -> None:
    spec = read_spec(unet_run)
    changes = {"score": {"k": 5}, "score.tail_patch": {"queries": 1, "k": 2}}
    text = unet_run.read_text(encoding="utf-8")
    extra = "\n".join(
        f"[{table}]\n" + "\n".join(f"{key} = {toml(value)}" for key, value in values.items())
        for table, values in changes.items()
    )
    run = unet_run.with_name("whole.toml")
    run.write_text(f"{text}\n{extra}\n", encoding="utf-8")
    environment = {"PYTHONPATH": str(unet_run.parent)}

    done = gradstore("run", run, env=environment, cwd=unet_run.parent)

    assert done.returncode == 0, done.stderr
    before = sorted(path.stat().st_mtime_ns for path in Path(spec.run.store).rglob("*"))
    again = gradstore("featurize", run, env=environment, cwd=unet_run.parent)
    assert again.returncode == 0, again.stderr
    assert sorted(path.stat().st_mtime_ns for path in Path(spec.run.store).rglob("*")) == before


def test_features_of_a_pipeline_of_diffusers_are_the_projected_gradients_of_autograd(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=10,
    )
    images, classes = digits(tmp_path / "digits.npz")
    losses = train(unet, images, classes, lambda x, t, y: unet(x, t, class_labels=y).sample)
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5])
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_end=0.05)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "pipeline")
    run = write_run(tmp_path, {"model": {"source": str(tmp_path / "pipeline")}, "data.train": {"rows": 16}})

    done = gradstore("featurize", run, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    levels = oracle.noise_levels(STEPS, 1e-4, 0.05)
    output = simple_loss(lambda example: noised(example, range(0, STEPS, STEPS // 10), levels), "class_labels")
    assert_features_are_projected_gradients(read_spec(run), "train", [0, 15], output)
