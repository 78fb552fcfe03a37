"""UNets of diffusers: pipelines and bare UNets in folders, their schedules, and LoRA on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from gradstore.adapters.diffusion.adapter import Diffusion
from gradstore.adapters.diffusion.schedule import noise_levels
from gradstore.errors import DataError, SpecError
from gradstore.groups import Grouping, partition
from gradstore.numerics.gradients import FeatureExtractor, model_parameters
from gradstore.numerics.projection import Identity
from gradstore.spec import DataSection, ModelSection
from tests import oracle
from tests.pictures import draw, write_npz

pytestmark = pytest.mark.slow

SHAPE: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "dropout": 0.1,
}
SPLITS: dict[str, Any] = {"train": {"rows": 6}, "learn": {"rows": 3}, "eval": {"rows": 3}}
TIMESTEPS = [1, 40, 90]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "a.npz", *draw(12))


def unet(**options: Any) -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**SHAPE, **options)


def pipeline(folder: Path, *, scheduler: dict[str, Any] | None = None, **options: Any) -> Path:
    made = DDPMScheduler(num_train_timesteps=100, beta_schedule="scaled_linear", **(scheduler or {}))
    DDPMPipeline(unet=unet(**options), scheduler=made).save_pretrained(folder)
    return folder


def diffusion(source: Path | str, data: Path, **model: Any) -> Diffusion:
    options = {"timesteps": TIMESTEPS, **model.pop("options", {})}
    return Diffusion(
        ModelSection(adapter="diffusion", source=str(source), options=options, **model),
        DataSection.model_validate({"source": str(data), **SPLITS}),
        5,
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_our_schedules_are_those_of_diffusers(ours: Any, theirs: str) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=theirs)

    found = noise_levels(ours, 1000, 1e-4, 0.02)

    np.testing.assert_allclose(found, scheduler.alphas_cumprod.double().numpy(), rtol=1e-4, atol=1e-7)
    if ours == "linear":
        np.testing.assert_allclose(found, oracle.noise_levels(1000, 1e-4, 0.02), rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"num_class_embeds": 3}], ids=["unconditional", "conditional"])
def test_outputs_of_a_pipeline_are_those_of_its_unet_on_its_schedule(
    options: dict[str, Any], archive: Path, tmp_path: Path
) -> None:
    folder = pipeline(tmp_path / "pipeline", **options)
    adapter = diffusion(folder, archive)
    model = adapter.load("cpu").double()
    examples = adapter.examples().splits["train"][:2]
    reference, scheduler = unet(**options).eval().double(), DDPMScheduler.from_pretrained(folder, subfolder="scheduler")

    with torch.no_grad():
        found = adapter.outputs(model, examples)
        for example, f in zip(examples, found, strict=True):
            image = torch.from_numpy(example.inputs["image"])[None].double() / 127.5 - 1
            given = {"class_labels": torch.from_numpy(example.inputs["class"])[None]} if options else {}
            total = torch.zeros((), dtype=torch.float64)
            for t, drawn in zip(TIMESTEPS, adapter._copies.noise((3, 8, 8)).copy(), strict=True):
                noise = torch.from_numpy(drawn)[None].double()
                noisy = scheduler.add_noise(image, noise, torch.tensor([t]))
                total += (reference(noisy, t, **given).sample - noise).square().sum() / len(TIMESTEPS)
            torch.testing.assert_close(f, total, rtol=1e-5, atol=0)
    assert adapter.identity()["class_argument"] == ("class_labels" if options else None)
    assert {part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)} == {0.0}


def test_shapes_are_known_without_weights_and_a_bare_unet_has_the_schedule_of_the_options(
    archive: Path, tmp_path: Path
) -> None:
    unet().save_pretrained(tmp_path / "unet")
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "unet.safetensors")
    bare = diffusion(tmp_path / "unet", archive, weights=str(tmp_path / "unet.safetensors"), options={"steps": 200})

    shape, model = bare.load("meta"), bare.load("cpu")

    assert all(parameter.is_meta for parameter in shape.parameters())
    assert [name for name, _ in shape.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert bare.outputs(shape, bare.examples().splits["train"][:2]).shape == (2,)
    assert bare.identity()["schedule"] == {"schedule": "linear", "steps": 200, "beta_start": 1e-4, "beta_end": 0.02}
    for name, value in unet().state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_the_identity_is_that_of_configuration_and_schedule(archive: Path, tmp_path: Path) -> None:
    first = diffusion(pipeline(tmp_path / "a"), archive).identity()

    assert first == diffusion(pipeline(tmp_path / "b"), archive).identity()
    assert first["schedule"]["beta_schedule"] == "scaled_linear"
    other = diffusion(pipeline(tmp_path / "c", scheduler={"beta_end": 0.03}), archive).identity()
    assert {key for key in first if first[key] != other[key]} == {"schedule"}
    other = diffusion(pipeline(tmp_path / "d", act_fn="relu"), archive).identity()
    assert {key for key in first if first[key] != other[key]} == {"architecture"}


def test_lora_on_a_unet_is_what_is_trainable(archive: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = pipeline(tmp_path / "pipeline")
    adapted = get_peft_model(unet(), LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    adapter = diffusion(folder, archive, peft=str(tmp_path / "lora"))
    examples = adapter.examples().splits["train"][:2]

    model = adapter.load("cpu")

    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_A" in name or "lora_B" in name for name in trainable)
    with torch.no_grad():
        plain = diffusion(folder, archive)
        assert not torch.allclose(adapter.outputs(model, examples), plain.outputs(plain.load("cpu"), examples))
    assert adapter.outputs(adapter.load("meta"), examples).shape == (2,)
    assert adapter.identity()["peft"] != plain.identity()["peft"]


def test_what_is_no_such_model_is_refused(archive: Path, tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "pipeline")
    config = folder / "unet" / "config.json"
    velocity = pipeline(tmp_path / "velocity", scheduler={"prediction_type": "v_prediction"})
    lacking = pipeline(tmp_path / "lacking", num_class_embeds=3)
    saved = json.loads((lacking / "unet" / "config.json").read_text()) | {"layers_per_block": 2}
    (lacking / "unet" / "config.json").write_text(json.dumps(saved))

    with pytest.raises(SpecError, match=r"model\.options\.steps: found 10, but model\.source has a saved schedule"):
        diffusion(folder, archive, options={"steps": 10}).examples()
    with pytest.raises(
        SpecError, match=r"timesteps: found 100 among them; accepted: timesteps from 0 to 99, each once"
    ):
        diffusion(folder, archive, options={"timesteps": [100]}).identity()
    with pytest.raises(SpecError, match=r"model\.options\.arguments: '.*pipeline' is no function"):
        diffusion(folder, archive, options={"arguments": {"a": 1}})
    with pytest.raises(
        SpecError, match=r"predicts 'v_prediction' \(prediction_type of its scheduler\); accepted: 'eps"
    ):
        diffusion(velocity, archive).identity()
    with pytest.raises(DataError, match=r"model\.source: the weights of .*lacking lack \d+ tensors of the model"):
        diffusion(lacking, archive).load("cpu")
    with pytest.raises(
        SpecError, match=r"model\.source: '/nowhere': there is no such folder\. Name a folder with a DDPM"
    ):
        diffusion("/nowhere", archive).identity()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(SpecError, match=r"pipeline holds a UNet2DConditionModel; accepted: a UNet2DModel"):
        diffusion(folder, archive).load("cpu")


@pytest.mark.parametrize("lora", [False, True], ids=["unet", "lora"])
def test_features_of_a_unet_and_of_lora_on_it_are_the_gradients_of_autograd(
    lora: bool, archive: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    folder = pipeline(tmp_path / "pipeline", num_class_embeds=3)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
    get_peft_model(unet(num_class_embeds=3), config).save_pretrained(tmp_path / "lora")
    peft = {"peft": str(tmp_path / "lora")} if lora else {}
    adapter = diffusion(folder, archive, options={"copies_per_call": 2}, **peft)
    model = adapter.load("cpu").double()
    examples = adapter.examples().splits["train"][:3]
    groups = partition(model_parameters(model, ()), Grouping(rule="tensor", biases=True, norms=True)).groups

    found = FeatureExtractor(model, groups, Identity(), seed=0)(lambda: adapter.outputs(model, examples), examples=3)

    outputs = adapter.outputs(model, examples)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {part.parameter for group in groups for part in group.parts} == parameters.keys() - {
        "class_embedding.weight"
    }
    for row in range(3):
        gradients = torch.autograd.grad(outputs[row], [*parameters.values()], retain_graph=True)
        by_name = dict(zip(parameters, gradients, strict=True))
        for group in groups:
            (part,) = group.parts
            torch.testing.assert_close(found.features[group.name][row], by_name[part.parameter].flatten())
