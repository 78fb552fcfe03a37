"""Images that a diffusion model makes itself: the sampler's, the same in every run, and seen where they came by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.adapters.diffusion.adapter import OUTPUT_NAMES, Diffusion
from gradstore.errors import DataError, SpecError
from gradstore.numerics.generator import derive_key, normal
from gradstore.spec import DataSection, ModelSection
from gradstore.store.examples import Example
from tests import oracle
from tests.pictures import CLASSES, draw, write_folder, write_npz
from tests.unets import on_path

CONDITIONAL = {"arguments": {"classes": 3}, "class_argument": "y"}
SHAPE = (3, 8, 8)


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with on_path(tmp_path_factory.mktemp("unets")) as name:
        yield name


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "a.npz", *draw(9))


def diffusion(
    source: str,
    data: Path,
    *,
    learn: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    output: str = "ddpm_simple",
    **evaluated: Any,
) -> Diffusion:
    """A model whose eval images it makes itself, three in five steps unless told otherwise."""
    generate = {"steps": 5, **evaluated.pop("generate", {})}
    splits = {
        "train": {"rows": 6},
        "learn": learn or {"rows": 3},
        "eval": {"source": "made", "rows": 3, "generate": generate, **evaluated},
    }
    model = ModelSection(adapter="diffusion", source=source, options=options or CONDITIONAL, output=output)
    return Diffusion(model, DataSection.model_validate({"source": str(data), **splits}), 5)


def drawn(seed: int, number: int, role: str) -> np.ndarray:
    return normal(derive_key(seed, f"sample {number}", role), 1, math.prod(SHAPE)).astype(np.float32).reshape(SHAPE)


def expected(adapter: Diffusion, example: Example, *, sampler: str, seed: int, number: int) -> Any:
    """The image and the trajectory of one sample, in float64."""
    model = adapter.load("cpu").double()
    levels = oracle.noise_levels(1000, 1e-4, 0.02)
    timesteps = [0, 200, 400, 600, 800]
    draws = {t: drawn(seed, number, f"after timestep {t}") for t in timesteps[1:]} if sampler == "ddpm" else {}
    given = [torch.from_numpy(example.inputs["class"])[None]] if "class" in example.inputs else []

    def predict(x: np.ndarray, t: int) -> np.ndarray:
        with torch.no_grad():
            result: np.ndarray = model(torch.from_numpy(x)[None], torch.tensor([t]), *given)[0].numpy()
        return result

    return oracle.sample(predict, drawn(seed, number, "start"), {t: levels[t] for t in timesteps}, draws)


@pytest.mark.parametrize("options", [{"arguments": {}}, CONDITIONAL], ids=["unconditional", "conditional"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_sample_is_the_oracles_and_so_is_what_it_went_through(
    sampler: str, options: dict[str, Any], module: str, archive: Path
) -> None:
    generate = {"sampler": sampler, "seed": 7, "trajectory": True}
    adapter = diffusion(f"{module}:make", archive, options=options, start=2, rows=2, generate=generate)

    examples = adapter.examples().splits["eval"]

    assert [example.example_id for example in examples] == ["sample-7-2", "sample-7-3"]
    for number, example in enumerate(examples, start=2):
        image, path = expected(adapter, example, sampler=sampler, seed=7, number=number)
        np.testing.assert_allclose(example.inputs["sample"], image, atol=1e-4)
        assert example.inputs["timesteps"].tolist() == [800, 600, 400, 200, 0]
        for t, noisy in zip(example.inputs["timesteps"].tolist(), example.inputs["trajectory"], strict=True):
            np.testing.assert_allclose(noisy, path[t], atol=1e-4)
        assert example.inputs["image"].dtype == np.uint8
        np.testing.assert_allclose(
            example.inputs["image"] / 127.5 - 1, example.inputs["sample"], atol=0.5 / 127.5 + 1e-6
        )
        assert (example.source, example.text) == ("made", "")


def test_classes_are_made_in_turn(module: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", *draw(9))

    def labels(**generate: Any) -> list[str | None]:
        adapter = diffusion(f"{module}:make", folder, rows=4, generate=generate)
        return [example.label for example in adapter.examples().splits["eval"]]

    assert labels() == [*CLASSES, CLASSES[0]]
    assert labels(classes=["dog", "bird"]) == ["dog", "bird", "dog", "bird"]
    with pytest.raises(SpecError, match=r"data\.eval\.generate\.classes: found 'cow'; accepted: 'bird', 'cat', 'dog'"):
        labels(classes=["cow"])


def test_a_sample_is_the_same_however_many_there_are_and_on_any_number_of_threads(
    module: str, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(**evaluated: Any) -> dict[str, str]:
        adapter = diffusion(f"{module}:make", archive, generate={"trajectory": True}, **evaluated)
        return {example.example_id: example.content_hash for example in adapter.examples().splits["eval"]}

    many = found(rows=20)

    assert found(rows=3).items() <= many.items()
    assert found(rows=1, start=17).items() <= many.items()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert found(rows=20) == many
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_splits_of_one_source_share_out_its_samples(module: str, archive: Path) -> None:
    made = {"source": "made", "rows": 2, "generate": {"steps": 5}}

    splits = diffusion(f"{module}:make", archive, learn=made).examples().splits

    ids = {name: [example.example_id for example in splits[name]] for name in ("learn", "eval")}
    assert ids == {"learn": ["sample-0-0", "sample-0-1"], "eval": ["sample-0-2", "sample-0-3", "sample-0-4"]}
    with pytest.raises(DataError, match=r"data\.eval: sample-0-0 has the pixels of sample-0-0 in data\.learn"):
        diffusion(f"{module}:make", archive, learn={**made, "source": "other"}).examples()


def test_without_its_trajectory_a_sample_is_seen_as_any_image(module: str, archive: Path) -> None:
    adapter = diffusion(f"{module}:make", archive)
    examples = adapter.examples().splits

    assert {*examples["eval"][0].inputs} == {*examples["train"][0].inputs} == {"image", "class"}
    assert examples["eval"][0].size == examples["train"][0].size == 50


@pytest.mark.parametrize("output", OUTPUT_NAMES)
def test_with_its_trajectory_a_sample_is_seen_in_what_it_went_through(output: str, module: str, archive: Path) -> None:
    adapter = diffusion(f"{module}:make", archive, output=output, generate={"trajectory": True})
    model = adapter.load("cpu").double()
    examples = adapter.examples().splits["eval"]
    levels = oracle.noise_levels(1000, 1e-4, 0.02)

    with torch.no_grad():
        found = adapter.outputs(model, examples)

    for example, f in zip(examples, found.tolist(), strict=True):
        predicted, noise = [], []
        for t, noisy in zip(example.inputs["timesteps"].tolist(), example.inputs["trajectory"], strict=True):
            last = example.inputs["sample"].astype(np.float64)
            noise.append((noisy - math.sqrt(levels[t]) * last) / math.sqrt(1 - levels[t]))
            with torch.no_grad():
                given = torch.from_numpy(example.inputs["class"])[None]
                predicted.append(model(torch.from_numpy(noisy).double()[None], torch.tensor([t]), given)[0].numpy())
        kept = np.stack(noise) if output == "ddpm_simple" else None
        assert f == pytest.approx(oracle.diffusion_output(np.stack(predicted), kept, output), rel=1e-8)
        assert example.size == 5


def test_listed_timesteps_are_those_of_a_trajectory_too(module: str, archive: Path) -> None:
    def adapter(*timesteps: int) -> Diffusion:
        options = {**CONDITIONAL, **({"timesteps": [*timesteps]} if timesteps else {})}
        return diffusion(f"{module}:make", archive, options=options, generate={"trajectory": True})

    model = adapter().load("cpu").double()
    examples = adapter().examples().splits["eval"]

    with torch.no_grad():
        each = {t: adapter(t).outputs(model, examples) for t in (0, 200, 400, 600, 800)}
        torch.testing.assert_close(adapter().outputs(model, examples), torch.stack([*each.values()]).mean(0))
        torch.testing.assert_close(adapter(600, 0).outputs(model, examples), (each[600] + each[0]) / 2)
    assert adapter(600, 0).examples().splits["eval"][0].size == 2
    with pytest.raises(
        SpecError, match=r"timesteps: found 300; the trajectory of data\.eval\.generate with steps = 5 goes"
    ):
        adapter(600, 300)


@pytest.mark.parametrize(
    ("evaluated", "problem"),
    [
        (
            {"generate": {"temperature": 1.0}},
            r"data\.eval\.generate\.temperature: unknown key; accepted for generate: seed",
        ),
        ({"generate": {"steps": 0}}, r"data\.eval\.generate\.steps: found 0; accepted: 1 to 1,000, the timesteps"),
        ({"generate": {"steps": 1001}}, r"data\.eval\.generate\.steps: found 1001; accepted: 1 to 1,000"),
        ({"generate": {"sampler": "euler"}}, r"data\.eval\.generate\.sampler: found 'euler'; accepted"),
        ({"generate": {"seed": -1}}, r"data\.eval\.generate\.seed: found -1; accepted: 0 or more"),
        ({"generate": {"classes": []}}, r"data\.eval\.generate\.classes: found \[\]; accepted: one class or more"),
        ({"rows": None}, r"data\.eval\.rows: is missing; say how many images are generated"),
    ],
)
def test_what_generate_does_not_mean_is_refused(
    evaluated: dict[str, Any], problem: str, module: str, archive: Path
) -> None:
    with pytest.raises(SpecError, match=problem):
        diffusion(f"{module}:make", archive, **evaluated)


def test_training_images_are_never_generated(module: str, archive: Path) -> None:
    data = {"source": str(archive), "learn": {"rows": 3, "start": 0}, "eval": {"rows": 3, "start": 3}}
    train = {"source": "made", "rows": 3, "generate": {}}

    with pytest.raises(SpecError, match=r"data\.train\.generate: training examples cannot be generated"):
        Diffusion(
            ModelSection(adapter="diffusion", source=f"{module}:make"),
            DataSection.model_validate({**data, "train": train}),
            0,
        )


def test_a_model_that_makes_no_numbers_is_refused(module: str, archive: Path, tmp_path: Path) -> None:
    adapter = diffusion(f"{module}:make", archive)
    state = adapter.load("cpu").state_dict()
    state["leave.bias"][0] = math.nan
    torch.save(state, tmp_path / "unet.pt")
    broken = adapter.model.model_copy(update={"weights": str(tmp_path / "unet.pt")})

    with pytest.raises(DataError, match=r"generate: sample 0 of the model is not finite\. Name a sound model"):
        Diffusion(broken, adapter.data, 5).examples()
