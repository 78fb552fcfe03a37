"""Diffusion models: every image in the same noised copies, of models of any origin, and what is refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradstore.adapters import ADAPTERS, Adapter
from gradstore.adapters.diffusion.adapter import OUTPUT_NAMES, Diffusion
from gradstore.errors import DataError, SpecError
from gradstore.groups import Grouping, partition
from gradstore.numerics.generator import derive_key, normal
from gradstore.numerics.gradients import FeatureExtractor, model_parameters
from gradstore.numerics.projection import Identity
from gradstore.spec import DataSection, ModelSection
from gradstore.store.examples import Example, from_table, to_table
from tests import oracle
from tests.pictures import draw, write_folder, write_idx, write_npz
from tests.unets import on_path

SPLITS: dict[str, Any] = {"train": {"rows": 6}, "learn": {"rows": 3}, "eval": {"rows": 3}}
CONDITIONAL = {"arguments": {"classes": 3}, "class_argument": "y"}
TIMESTEPS = [900, 0, 431]


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with on_path(tmp_path_factory.mktemp("unets")) as name:
        yield name


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "a.npz", *draw(15))


def diffusion(
    source: str, data: Path, *, seed: int = 5, splits: dict[str, Any] | None = None, **model: Any
) -> Diffusion:
    options = model.pop("options", {})
    section = {"source": str(data), **(splits or SPLITS)}
    return Diffusion(
        ModelSection(adapter="diffusion", source=source, options=options, **model),
        DataSection.model_validate(section),
        seed,
    )


def expected_outputs(
    model: nn.Module, examples: Sequence[Example], output: str, *, noises: int = 1, seed: int = 5
) -> list[float]:
    """f of each example, one noised copy after the other, under a linear schedule of 1,000 steps."""
    levels = oracle.noise_levels(1000, 1e-4, 0.02)
    found = []
    for example in examples:
        image = example.inputs["image"].astype(np.float64) / 127.5 - 1
        predicted, noise = [], []
        for t in TIMESTEPS:
            drawn = normal(derive_key(seed, f"timestep {t}", "noise"), noises, image.size).astype(np.float32)
            for row in drawn.astype(np.float64):
                noise.append(row.reshape(image.shape))
                noisy = math.sqrt(levels[t]) * image + math.sqrt(1 - levels[t]) * noise[-1]
                predicted.append(predict(model, noisy, t, example))
        f = oracle.diffusion_output(np.stack(predicted), np.stack(noise) if output == "ddpm_simple" else None, output)
        found.append(f)
    return found


def predict(model: nn.Module, noisy: np.ndarray, t: int, example: Example) -> np.ndarray:
    given = [torch.tensor([int(example.inputs["class"])])] if "class" in example.inputs else []
    with torch.no_grad():
        result: np.ndarray = model(torch.from_numpy(noisy)[None], torch.tensor([t]), *given)[0].numpy()
    return result


def test_the_adapter_is_made_by_its_name_and_travels_to_workers(module: str, archive: Path) -> None:
    ours = diffusion(f"{module}:make", archive)

    adapter: Adapter = ADAPTERS["diffusion"](ours.model, ours.data, ours.seed)

    assert pickle.loads(pickle.dumps(adapter)) == ours


@pytest.mark.parametrize("options", [{}, CONDITIONAL], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("output", OUTPUT_NAMES)
def test_an_output_is_the_oracles_over_the_same_copies_of_every_image(
    output: str, options: dict[str, Any], module: str, archive: Path
) -> None:
    options = {"timesteps": TIMESTEPS, "noises": 2, **options}
    adapter = diffusion(f"{module}:make", archive, output=output, options=options)
    model = adapter.load("cpu").double()
    splits = adapter.examples().splits
    examples = [*splits["train"][:3], splits["learn"][0], splits["eval"][0]]

    with torch.no_grad():
        found = adapter.outputs(model, examples)
        alone = torch.cat([adapter.outputs(model, [example]) for example in examples])

    np.testing.assert_allclose(found.numpy(), expected_outputs(model, examples, output, noises=2), rtol=1e-9)
    torch.testing.assert_close(found, alone)
    assert adapter.identity()["output"] == output


@pytest.mark.parametrize("copies_per_call", [None, 2])
def test_the_residual_of_das_is_the_simple_loss_over_the_copies_of_the_same_pass(
    copies_per_call: int | None, module: str, archive: Path
) -> None:
    options = {"timesteps": TIMESTEPS, "noises": 2, "copies_per_call": copies_per_call}
    adapter = diffusion(f"{module}:make", archive, output="das", options=options)
    model, examples = adapter.load("cpu").double(), adapter.examples().splits["train"][:3]
    seen: list[int] = []
    model.register_forward_hook(lambda _module, given, _output: seen.append(len(given[0])))

    outputs, residuals = adapter.outputs_and_residuals(model, examples)

    assert residuals is not None
    assert outputs.requires_grad
    assert not residuals.requires_grad
    assert sum(seen) == 3 * 6
    np.testing.assert_allclose(residuals.numpy(), expected_outputs(model, examples, "ddpm_simple", noises=2), rtol=1e-9)
    np.testing.assert_allclose(outputs.detach().numpy(), expected_outputs(model, examples, "das", noises=2), rtol=1e-9)


@pytest.mark.parametrize("output", ["ddpm_simple", "square"])
def test_other_output_functions_have_no_residual(output: str, module: str, archive: Path) -> None:
    adapter = diffusion(f"{module}:make", archive, output=output, options={"timesteps": [3]})

    assert adapter.outputs_and_residuals(adapter.load("cpu"), adapter.examples().splits["train"][:1])[1] is None


@pytest.mark.parametrize("copies_per_call", [1, 2, 5, 50])
def test_how_many_copies_a_call_takes_changes_neither_outputs_nor_gradients(
    copies_per_call: int, module: str, archive: Path
) -> None:
    def found(**options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        adapter = diffusion(f"{module}:make", archive, options={"timesteps": 5, **CONDITIONAL, **options})
        model = adapter.load("cpu").double()
        outputs = adapter.outputs(model, adapter.examples().splits["train"][:2])
        return outputs.detach(), list(torch.autograd.grad(outputs[1], [*model.parameters()]))

    outputs, gradients = found(copies_per_call=copies_per_call)

    expected, expected_gradients = found()
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_a_model_may_return_an_object_that_holds_the_noise(module: str, archive: Path) -> None:
    options = {"timesteps": 3}
    plain, wrapped = (diffusion(f"{module}:{name}", archive, options=options) for name in ("make", "wrapped"))
    examples = plain.examples().splits["train"]

    with torch.no_grad():
        found = wrapped.outputs(wrapped.load("cpu"), examples)

        torch.testing.assert_close(found, plain.outputs(plain.load("cpu"), examples))


def test_noise_depends_on_seed_and_timestep_and_on_nothing_else(module: str, archive: Path) -> None:
    def noise(seed: int = 5, **options: Any) -> np.ndarray:
        return diffusion(f"{module}:make", archive, seed=seed, options=options)._copies.noise((3, 8, 8))

    few = noise(timesteps=[20, 500])

    np.testing.assert_array_equal(few[0], noise(timesteps=50)[1])
    np.testing.assert_array_equal(few[1], noise(timesteps=[500], noises=3)[0])
    assert not np.array_equal(few[0], noise(seed=6, timesteps=[20])[0])
    assert abs(float(noise(timesteps=50).std()) - 1) < 0.02


def test_examples_are_bytes_with_a_class_where_the_model_takes_one(module: str, archive: Path) -> None:
    images, classes = draw(15)

    plain = diffusion(f"{module}:make", archive, options={"timesteps": 7}).examples()
    conditional = diffusion(f"{module}:make", archive, options={"timesteps": 7, **CONDITIONAL}).examples()

    for name, rows in {"train": 6, "learn": 3, "eval": 3}.items():
        assert len(plain.splits[name]) == rows
        for example, labelled in zip(plain.splits[name], conditional.splits[name], strict=True):
            row = int(example.example_id.removeprefix("a.npz:"))
            np.testing.assert_array_equal(example.inputs["image"], images[row].transpose(2, 0, 1))
            assert {*example.inputs} == {"image"}
            assert labelled.inputs["class"] == classes[row]
            assert example.label == labelled.label == str(classes[row])


def test_images_without_labels_are_enough_for_a_model_without_classes(module: str, tmp_path: Path) -> None:
    path = write_idx(tmp_path / "images.idx", draw(15, (8, 8))[0])
    options = {"arguments": {"channels": 1}, "timesteps": 3}
    splits = {"format": "idx", **SPLITS}

    examples = diffusion(f"{module}:make", path, splits=splits, options=options).examples()

    assert examples.splits["train"][0].label is None
    with pytest.raises(DataError, match=r"data\.train: images\.idx:\d+ has no label\. Give it one"):
        diffusion(
            f"{module}:make", path, splits=splits, options={**CONDITIONAL, "arguments": {"channels": 1, "classes": 3}}
        ).examples()


def test_a_batch_counts_the_pixels_of_all_copies(module: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", *draw(12, (16, 8, 3)))

    def size(**options: Any) -> int:
        return diffusion(f"{module}:make", path, options=options).examples().splits["train"][0].size

    assert size() == 50 * 2
    assert size(timesteps=10, noises=3) == 30 * 2
    assert size(timesteps=[3, 7], copies_per_call=1) == 2 * 2


def test_shapes_alone_tell_what_is_alive_at_once(module: str, archive: Path) -> None:
    adapter = diffusion(f"{module}:make", archive, options={"timesteps": 10, "copies_per_call": 2, **CONDITIONAL})
    seen: list[int] = []
    model = adapter.load("meta")
    model.get_submodule("enter").register_forward_hook(lambda module, args, output: seen.append(len(output)))

    with torch.no_grad():
        found = adapter.outputs(model, adapter.examples().splits["train"][:3])

    assert found.is_meta
    assert found.shape == (3,)
    # Two copies of each of three images, and of the eight others a quarter.
    assert sum(seen) == 3 * (2 + 2)


def test_a_model_is_in_evaluation_mode_without_dropout_and_filled_from_a_file(
    module: str, archive: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    state = {
        name: torch.full_like(value, 0.5)
        for name, value in diffusion(f"{module}:make", archive).load("cpu").state_dict().items()
    }
    save_file(state, tmp_path / "unet.safetensors")

    model = diffusion(f"{module}:make", archive, weights=str(tmp_path / "unet.safetensors")).load("cpu")

    assert not any(part.training for part in model.modules())
    assert {part.p for part in model.modules() if isinstance(part, nn.Dropout)} == {0.0}
    for value in model.state_dict().values():
        assert (value == 0.5).all()


def test_what_features_depend_on_is_the_identity_and_what_they_do_not_is_not(module: str, archive: Path) -> None:
    def identity(seed: int = 5, output: str | None = None, **options: Any) -> dict[str, Any]:
        return diffusion(f"{module}:make", archive, seed=seed, output=output, options=options).identity()

    same = identity()

    assert same == identity(output="ddpm_simple", timesteps=50, schedule="linear", steps=1000, copies_per_call=3)
    changed: list[dict[str, Any]] = [
        {"output": "das"},
        {"seed": 6},
        {"timesteps": 49},
        {"noises": 2},
        {"schedule": "cosine"},
        {"steps": 500},
        {"beta_end": 0.03},
        {"size": 4},
        {"arguments": {"width": 8}},
        {"class_argument": "y", "arguments": {"classes": 3}},
    ]
    assert len({str(identity(**change)) for change in changed} | {str(same)}) == len(changed) + 1
    named = diffusion(f"{module}:make", archive, options={**CONDITIONAL, "classes": ["a", "b", "c"]})
    assert named.identity()["classes"] == ["a", "b", "c"]


def test_examples_survive_the_store(module: str, archive: Path) -> None:
    splits = {**SPLITS, "eval": {"source": "made", "rows": 2, "generate": {"steps": 3, "trajectory": True}}}
    adapter = diffusion(f"{module}:make", archive, splits=splits, options={"timesteps": 4, **CONDITIONAL})
    model, examples = adapter.load("cpu"), adapter.examples().splits

    for rows in examples.values():
        found = from_table(to_table(rows, 0))
        assert [example.content_hash for example in found] == [example.content_hash for example in rows]
        with torch.no_grad():
            torch.testing.assert_close(adapter.outputs(model, found), adapter.outputs(model, rows), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"output": "loss"}, r"model\.output: found 'loss'; accepted: ddpm_simple \(default\), square, das\."),
        ({"gguf_file": "a"}, r"model\.gguf_file: diffusion has no such key"),
        ({"options": {"timestep": 3}}, r"model\.options\.timestep: unknown key; accepted for diffusion: arguments, "),
        (
            {"options": {"timesteps": 0}},
            r"timesteps: found 0; accepted: 1 to 1,000 timesteps, or a list of those from 0",
        ),
        ({"options": {"timesteps": 1001}}, r"timesteps: found 1001; accepted: 1 to 1,000 timesteps"),
        ({"options": {"timesteps": [3, 1000]}}, r"found 1000 among them; accepted: timesteps from 0 to 999, each once"),
        ({"options": {"timesteps": [3, 3]}}, r"found \[3, 3\]; accepted: timesteps from 0 to 999, each once"),
        ({"options": {"timesteps": []}}, r"model\.options\.timesteps: found \[\]; accepted"),
        ({"options": {"noises": 0}}, r"model\.options\.noises: found 0; accepted: 1 or more"),
        ({"options": {"copies_per_call": 0}}, r"model\.options\.copies_per_call: found 0; accepted: 1 or more"),
        ({"options": {"steps": 1}}, r"model\.options\.steps: found 1; accepted: 2 or more"),
        ({"options": {"schedule": "sigmoid"}}, r"model\.options\.schedule: found 'sigmoid'; accepted"),
        ({"options": {"schedule": "cosine", "beta_end": 0.1}}, r"beta_end: found 0\.1; a cosine schedule has none"),
        ({"options": {"beta_start": 0.5}}, r"found 0\.5, 0\.02; accepted: 0 < beta_start <= beta_end < 1"),
        ({"options": {"size": [3]}}, r"model\.options\.size: found \[3\]; accepted: one number, or \[height, width\]"),
        ({"options": {"channels": 2}}, r"model\.options\.channels: found 2; accepted: 1 or 3"),
    ],
)
def test_what_run_toml_says_wrongly_is_refused_before_any_work(
    model: dict[str, Any], message: str, module: str, archive: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        diffusion(f"{module}:make", archive, **model)


def test_what_the_model_cannot_take_is_refused_with_what_to_change(module: str, archive: Path, tmp_path: Path) -> None:
    gray = write_folder(tmp_path / "gray", *draw(15, (8, 8)))
    cases = [
        (
            "make",
            gray,
            {},
            r"cannot be run on images of \[1, 8, 8\] .*: .*channels.*Set model\.options\.channels, size",
        ),
        (
            "doubled",
            archive,
            {},
            r"returns \[1, 6, 8, 8\] for images of \[1, 3, 8, 8\]; it must return the noise in them",
        ),
        ("make", archive, {"class_argument": "kind"}, r"unexpected keyword argument 'kind'.*class_argument"),
        (
            "make",
            archive,
            {"class_argument": "y", "arguments": {"classes": 2}},
            r"at timesteps up to 999 and classes up to 2: index out of range",
        ),
        ("make", archive, {"arguments": {"depth": 2}}, r"make\(depth = 2\) failed"),
    ]
    for name, data, options, message in cases:
        with pytest.raises(SpecError, match=message):
            diffusion(f"{module}:{name}", data, options=options).examples()


def test_a_damaged_source_or_overlap_is_refused_as_of_any_images(module: str, tmp_path: Path) -> None:
    images, classes = draw(15)
    images[9] = images[2]
    path = write_npz(tmp_path / "a.npz", images, classes)

    with pytest.raises(DataError, match=r"a\.npz:9 of .* has the pixels of a\.npz:2 .* in data\.train"):
        diffusion(f"{module}:make", path, splits={**SPLITS, "shuffle": False, "deduplicate": False}).examples()
    with pytest.raises(DataError, match=r"data\.eval\.rows: rows \[9, 18\) are declared"):
        diffusion(f"{module}:make", path, splits={**SPLITS, "eval": {"rows": 9}}).examples()


@pytest.mark.parametrize("copies_per_call", [None, 2])
def test_features_are_the_gradients_of_autograd_whatever_a_call_takes(
    copies_per_call: int | None, module: str, archive: Path
) -> None:
    options = {"timesteps": 5, **CONDITIONAL, **({"copies_per_call": copies_per_call} if copies_per_call else {})}
    adapter = diffusion(f"{module}:make", archive, options=options)
    model = adapter.load("cpu").double()
    examples = adapter.examples().splits["train"][:3]
    groups = partition(model_parameters(model, ()), Grouping(biases=True, norms=True)).groups

    found = FeatureExtractor(model, groups, Identity(), seed=0)(lambda: adapter.outputs(model, examples), examples=3)

    outputs = adapter.outputs(model, examples)
    parameters = dict(model.named_parameters())
    torch.testing.assert_close(found.outputs, outputs.detach())
    for row in range(3):
        gradients = torch.autograd.grad(outputs[row], [*parameters.values()], retain_graph=True)
        by_name = dict(zip(parameters, gradients, strict=True))
        for group in groups:
            expected = torch.cat([by_name[part.parameter].flatten() for part in group.parts])
            torch.testing.assert_close(found.features[group.name][row], expected)
