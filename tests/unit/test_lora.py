from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.adapters.causal_lm import CausalLM
from gradstore.errors import DataError, SpecError
from gradstore.spec import DataSection, ModelSection
from gradstore.store.examples import Example, hash_inputs
from tests.models import Kind, make_tiny_lora, make_tiny_model

TARGETS: dict[Kind, list[str]] = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
KINDS: tuple[Kind, ...] = ("llama", "gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models by kind, and their adapters by ``<kind>-lora``."""
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        make_tiny_model(folder / kind, kind)
        make_tiny_lora(
            folder / f"{kind}-lora", folder / kind, target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2"
        )
    return folder


def _adapter(model: Path, peft: Path | str | None = None) -> CausalLM:
    data = {"source": "nowhere", **{name: {"rows": 1} for name in ("train", "learn", "eval")}}
    section = ModelSection(source=str(model), peft=None if peft is None else str(peft))
    return CausalLM(section, DataSection.model_validate(data), 0)


def _example(*tokens: int) -> Example:
    inputs = {"tokens": np.array(tokens, np.int32)}
    return Example(
        example_id="x",
        source="s",
        label=None,
        text="",
        content_hash=hash_inputs(inputs),
        size=len(tokens),
        inputs=inputs,
    )


def _changed(folder: Path, source: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_is_what_peft_loads(folders: Path, kind: Kind) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = _adapter(folders / kind, folders / f"{kind}-lora")

    model = adapter.load("cpu")

    base = AutoModelForCausalLM.from_pretrained(folders / kind)
    theirs = PeftModel.from_pretrained(base, folders / f"{kind}-lora", is_trainable=True).eval()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == {
        name: parameter.requires_grad for name, parameter in theirs.named_parameters()
    }
    assert all(value.equal(theirs.state_dict()[name]) for name, value in model.state_dict().items())
    tokens = torch.tensor([[5, 60, 7, 200, 9]])
    (output,) = adapter.outputs(model, [_example(*tokens[0].tolist())])
    torch.testing.assert_close(output, 4 * theirs(input_ids=tokens, labels=tokens).loss)
    (plain,) = adapter.outputs(_adapter(folders / kind).load("cpu"), [_example(*tokens[0].tolist())])
    assert abs((output - plain).item()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_factors_are_thawed_and_nothing_drops_out(folders: Path, kind: Kind) -> None:
    model = _adapter(folders / kind, folders / f"{kind}-lora").load("cpu")

    thawed = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert thawed
    assert all(".lora_A.default.weight" in name or ".lora_B.default.weight" in name for name in thawed)
    assert not model.training
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} <= {0.0}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_device_gives_the_adapted_model_without_weights(folders: Path, kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(folders / kind / "config.json", tmp_path / "model")
    (tmp_path / "lora").mkdir()
    shutil.copy(folders / f"{kind}-lora" / "adapter_config.json", tmp_path / "lora")

    shape = _adapter(tmp_path / "model", tmp_path / "lora").load("meta")

    model = _adapter(folders / kind, folders / f"{kind}-lora").load("cpu")
    assert {parameter.device.type for parameter in shape.parameters()} == {"meta"}
    assert {name: (value.shape, value.requires_grad) for name, value in shape.named_parameters()} == {
        name: (value.shape, value.requires_grad) for name, value in model.named_parameters()
    }


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_head_is_named_through_the_adapter(folders: Path, tmp_path: Path, device: str) -> None:
    model = folders / "llama"
    adapted = make_tiny_lora(tmp_path / "head", model, target_modules=["lm_head", "q_proj"])
    saved = make_tiny_lora(tmp_path / "saved", model, target_modules=["q_proj"], modules_to_save=["lm_head"])

    def heads(peft: Path) -> set[str]:
        adapter = _adapter(model, peft)
        return {name.removeprefix("base_model.model.") for name in adapter.output_heads(adapter.load(device))}

    assert heads(folders / "llama-lora") == {"lm_head"}
    assert heads(adapted) == {"lm_head", "lm_head.base_layer"}
    assert heads(saved) == {"lm_head", "lm_head.original_module", "lm_head.modules_to_save.default"}


def test_the_identity_follows_what_the_adapter_computes(folders: Path, tmp_path: Path) -> None:
    model, lora = folders / "llama", folders / "llama-lora"

    identity = _adapter(model, lora).identity()

    assert "peft" not in _adapter(model).identity()
    moved = _changed(
        tmp_path / "moved", lora, base_model_name_or_path="elsewhere", lora_dropout=0.0, inference_mode=True
    )
    assert _adapter(model, moved).identity() == identity
    scaled = _changed(tmp_path / "scaled", lora, lora_alpha=7)
    assert _adapter(model, scaled).identity() != identity


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"use_dora": True}, r"is LORA with use_dora = True; accepted: plain LoRA"),
        ({"target_modules": ["nothing"]}, r"does not load as a LoRA adapter of this model: Target modules"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_adapters_that_are_no_plain_lora_of_the_model_are_refused(
    folders: Path, tmp_path: Path, changes: dict[str, Any], found: str, device: str
) -> None:
    lora = _changed(tmp_path / "lora", folders / "llama-lora", **changes)

    with pytest.raises(SpecError, match=rf"model\.peft: '{lora}' {found}"):
        _adapter(folders / "llama", lora).load(device)


def test_adapters_of_other_kinds_are_refused(folders: Path, tmp_path: Path) -> None:
    config = {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(SpecError, match=rf"model\.peft: '{tmp_path}' is IA3; accepted: plain LoRA"):
        _adapter(folders / "llama", tmp_path).load("meta")


def test_weights_that_do_not_fill_an_adapter_are_refused(folders: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    lora = shutil.copytree(folders / "llama-lora", tmp_path / "lora")
    weights = load_file(lora / "adapter_model.safetensors")
    name = next(name for name in weights if "lora_B" in name)
    kept = weights.pop(name)
    save_file(weights, lora / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"model\.peft: the weights of .* lack 1 tensors of the model: .*lora_B"):
        _adapter(folders / "llama", lora).load("cpu")

    save_file({**weights, name: kept[1:].clone()}, lora / "adapter_model.safetensors")
    with pytest.raises(SpecError, match=r"does not load as a LoRA adapter of this model: (.|\n)*size mismatch"):
        _adapter(folders / "llama", lora).load("cpu")

    file = lora / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"model\.peft: .* holds damaged weights: .*Fetch or copy it again"):
        _adapter(folders / "llama", lora).load("cpu")


def test_an_adapter_that_is_not_there_is_refused(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"model\.peft: './nope': there is no such folder\. Name a folder with an adapter"
    ):
        _adapter(folders / "llama", "./nope").load("meta")
    with pytest.raises(
        SpecError, match=r"model\.peft: .* does not load as a LoRA adapter (.*\n)*Name a folder with an"
    ):
        _adapter(folders / "llama", tmp_path).load("cpu")


def test_without_peft_what_to_install_is_said(folders: Path) -> None:
    program = (
        "import sys; sys.modules['peft'] = None\n"
        "from gradstore.adapters.models.lora import lora_identity\n"
        f"lora_identity({str(folders / 'llama-lora')!r})"
    )

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert "pip install 'gradstore[peft]'" in result.stderr


def test_keys_of_other_adapters_are_refused() -> None:
    data = DataSection.model_validate({"source": "x", **{name: {"rows": 1} for name in ("train", "learn", "eval")}})

    for keys, found in (
        ({"output": "margin"}, r"model\.output: found 'margin'; causal_lm has token_cross_entropy alone"),
        ({"weights": "w.pt"}, r"model\.weights: causal_lm has no such key"),
        ({"options": {"depth": 3}}, r"model\.options\.depth: causal_lm has no such key"),
    ):
        with pytest.raises(SpecError, match=found):
            CausalLM(ModelSection.model_validate({"source": "x", **keys}), data, 0)
