from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.adapters import ADAPTERS, Adapter
from gradstore.adapters.causal_lm import CausalLM
from gradstore.errors import DataError, SpecError
from gradstore.spec import DataSection, ModelSection
from gradstore.store.examples import Example, from_table, hash_inputs, to_table
from tests.models import CONTEXT, END, SENTENCES, Kind, make_tiny_model, tiny_tokenizer

KINDS: tuple[Kind, ...] = ("llama", "gpt2")
LLAMA3_8B = Path(__file__).parents[2] / "pipelines" / "openwebtext-llama3-8b" / "config.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {kind: make_tiny_model(folder / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, sentence in enumerate(SENTENCES):
        (folder / f"{number}.txt").write_text(sentence)
    return folder


def _adapter(
    source: Path | str, texts: Path | None = None, *, data: dict[str, Any] | None = None, **model: Any
) -> CausalLM:
    splits = {"train": {"rows": 3}, "learn": {"rows": 1}, "eval": {"rows": 1}}
    return CausalLM(
        ModelSection(source=str(source), **model),
        DataSection.model_validate({"source": str(texts or "nowhere"), "length": 12, **splits, **(data or {})}),
        0,
    )


def _example(*tokens: int, predicted: Sequence[bool] | None = None) -> Example:
    inputs = {"tokens": np.array(tokens, np.int32)}
    if predicted is not None:
        inputs["predicted"] = np.array(predicted)
    return Example(
        example_id="x",
        source="s",
        label=None,
        text="",
        content_hash=hash_inputs(inputs),
        size=len(tokens),
        inputs=inputs,
    )


def test_the_adapter_is_made_by_its_name_and_travels_to_workers(models: dict[Kind, Path], texts: Path) -> None:
    ours = _adapter(models["llama"], texts)

    adapter: Adapter = ADAPTERS["causal_lm"](ours.model, ours.data, ours.seed)

    assert pickle.loads(pickle.dumps(adapter)) == ours


def test_importing_the_adapters_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, gradstore.adapters; print({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules))"
    )

    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_cannot_drop_anything_out(models: dict[Kind, Path], kind: Kind) -> None:
    model = _adapter(models[kind]).load("cpu")

    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} <= {0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_device_gives_the_model_without_its_weights(
    models: dict[Kind, Path], kind: Kind, tmp_path: Path
) -> None:
    shutil.copy(models[kind] / "config.json", tmp_path)

    shape, model = _adapter(tmp_path).load("meta"), _adapter(models[kind]).load("cpu")

    assert {parameter.device.type for parameter in shape.parameters()} == {"meta"}
    assert {name: value.shape for name, value in shape.named_parameters()} == {
        name: value.shape for name, value in model.named_parameters()
    }


def test_llama3_8b_is_built_from_its_configuration_alone() -> None:
    adapter = _adapter("meta-llama/Meta-Llama-3-8B", config=str(LLAMA3_8B))

    model = adapter.load("meta")

    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 225
    assert adapter.output_heads(model) == ("lm_head",)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_named_whether_or_not_it_is_tied(models: dict[Kind, Path], kind: Kind) -> None:
    adapter = _adapter(models[kind])

    assert adapter.output_heads(adapter.load("cpu")) == ("lm_head",)
    assert adapter.output_heads(torch.nn.Linear(2, 2)) == ()


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_the_sum_of_the_token_losses(models: dict[Kind, Path], kind: Kind) -> None:
    adapter = _adapter(models[kind])
    model = adapter.load("cpu")
    tokens = torch.tensor([[5, 60, 7, 200, 9]])

    (output,) = adapter.outputs(model, [_example(*tokens[0].tolist())])

    mean = model(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(output, 4 * mean)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_does_not_count_but_carries_gradient(models: dict[Kind, Path], kind: Kind) -> None:
    adapter = _adapter(models[kind])
    model = adapter.load("cpu")
    masked = _example(5, 60, 7, 200, 9, predicted=(False, False, True, False, True))
    labels = torch.tensor([[-100, -100, 7, -100, 9]])

    # Beside a longer row, so that it is padded.
    output = adapter.outputs(model, [masked, _example(1, 2, 3, 4, 5, 6)])[0]

    expected = 2 * model(input_ids=torch.tensor([[5, 60, 7, 200, 9]]), labels=labels).loss
    torch.testing.assert_close(output, expected)
    parameters = [parameter for name, parameter in model.named_parameters() if "wpe" not in name]
    gradients, wanted = (torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (output, expected))
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)
    embedding = dict(zip(parameters, gradients, strict=True))[model.get_input_embeddings().weight]  # type: ignore[operator]
    assert bool((embedding[[5, 60]] != 0).any(1).all())


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_does_not_depend_on_its_batch_mates(models: dict[Kind, Path], kind: Kind) -> None:
    adapter = _adapter(models[kind])
    model = adapter.load("cpu")
    examples = [_example(1, 2, 3, 4, 5, 6, 7), _example(9, 8), _example(40, 50, 60, 70)]

    together = adapter.outputs(model, examples)
    alone = torch.cat([adapter.outputs(model, [example]) for example in examples])

    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_an_output_is_differentiable_and_follows_autocast(models: dict[Kind, Path]) -> None:
    adapter = _adapter(models["llama"])
    model = adapter.load("cpu")
    examples = [_example(1, 2, 3), _example(4, 5)]

    with torch.autocast("cpu", torch.bfloat16):
        rough = adapter.outputs(model, examples)
    exact = adapter.outputs(model, examples)
    gradients = torch.autograd.grad(exact.sum(), list(model.parameters()), allow_unused=True)

    assert rough.dtype == exact.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.02)
    assert all(gradient is not None for gradient in gradients)


def test_examples_survive_the_store_and_need_no_data_afterwards(models: dict[Kind, Path], texts: Path) -> None:
    adapter = _adapter(models["llama"], texts)
    train = adapter.examples().splits["train"]
    model = adapter.load("cpu")

    stored = from_table(to_table(train, first_row=0))

    elsewhere = _adapter(models["llama"])
    torch.testing.assert_close(elsewhere.outputs(model, stored), adapter.outputs(model, train))
    tokenizer = tiny_tokenizer()
    for example in train:
        sentence = (texts / example.example_id).read_text()
        assert example.inputs["tokens"].tolist() == tokenizer(sentence)["input_ids"][:12]
        assert sentence.startswith(example.text)


def test_joined_documents_are_parted_by_the_end_token(models: dict[Kind, Path], texts: Path) -> None:
    adapter = _adapter(models["llama"], texts, data={"packing": "concatenate", "shuffle": False, "length": 30})

    train = adapter.examples().splits["train"]

    joined = END.join(SENTENCES)
    tokens = np.concatenate([example.inputs["tokens"] for example in train])
    assert tiny_tokenizer().decode(tokens.tolist()) == joined[: len(tiny_tokenizer().decode(tokens.tolist()))]
    assert {example.size for example in train} == {30}
    assert END not in "".join(example.text for example in train)


def test_joining_needs_a_tokenizer_with_an_end_token(models: dict[Kind, Path], texts: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": None}))

    with pytest.raises(DataError, match=r'data\.train\.packing: .* has none\. Use packing = "document"'):
        _adapter(folder, texts, data={"packing": "concatenate"}).examples()


def test_a_character_that_is_cut_in_two_is_left_out_of_the_text(models: dict[Kind, Path], tmp_path: Path) -> None:
    for number, text in enumerate(("aé", "bé", "cé", "dé", "eé")):
        (tmp_path / f"{number}.txt").write_text(text)

    # é is two tokens, of one byte each.
    train = _adapter(models["llama"], tmp_path, data={"length": 2}).examples().splits["train"]

    assert {example.size for example in train} == {2}
    assert {example.text for example in train} < set("abcde")


def test_a_length_beyond_the_models_context_is_refused(models: dict[Kind, Path], texts: Path) -> None:
    with pytest.raises(SpecError, match=rf"data\.train\.length: found 99; .* reads at most {CONTEXT} tokens"):
        _adapter(models["llama"], texts, data={"length": 99}).examples()


def test_the_identity_follows_the_tokenizer_and_the_cutting(models: dict[Kind, Path], tmp_path: Path) -> None:
    identity = _adapter(models["llama"]).identity()

    assert identity["adapter"] == "causal_lm"
    assert identity["output"] == "token_cross_entropy"
    assert identity["truncation"]["eval"] == {"packing": "document", "length": 12}
    assert _adapter(models["gpt2"]).identity()["tokenizer"] == identity["tokenizer"]
    assert _adapter(models["gpt2"]).identity()["architecture"] != identity["architecture"]
    assert _adapter(models["llama"], data={"length": 13}).identity() != identity
    other = shutil.copytree(models["llama"], tmp_path / "other")
    rules = json.loads((other / "tokenizer.json").read_text())
    rules["pre_tokenizer"]["add_prefix_space"] = True
    (other / "tokenizer.json").write_text(json.dumps(rules))
    assert _adapter(other).identity()["tokenizer"] != identity["tokenizer"]


def test_the_identity_sees_what_no_weight_shows(models: dict[Kind, Path], tmp_path: Path) -> None:
    shutil.copytree(models["llama"], tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "rms_norm_eps": 1e-3}))

    assert _adapter(tmp_path / "model").identity() != _adapter(models["llama"]).identity()


def test_using_a_tokenizer_does_not_change_its_hash(models: dict[Kind, Path], texts: Path) -> None:
    adapter = _adapter(models["llama"], texts)
    tokenizer = adapter._tokenizer()
    before = tokenizer.hash()

    tokenizer.encode(["some text"], special=True)

    assert tokenizer.hash() == before == adapter.identity()["tokenizer"]


def test_a_model_that_does_not_exist_is_refused_with_what_could_be_named(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"model\.source: 'nobody/nothing' does not load (.*\n)*Name .* hub id that this machine can"
    ):
        _adapter("nobody/nothing").load("cpu")
    with pytest.raises(SpecError, match=r"Name a folder with a config\.json, weights and a tokenizer"):
        _adapter(tmp_path).load("meta")


@pytest.mark.parametrize("source", ["/nope/model", "./nope", "nope/a/b", "~/nope"])
def test_a_path_where_no_folder_is_is_not_taken_for_a_hub_id(source: str) -> None:
    with pytest.raises(SpecError, match=rf"^model\.source: '{source}': there is no such folder\. Name a folder"):
        _adapter(source).load("meta")


def test_a_broken_tokenizer_is_told_apart_from_the_model(models: dict[Kind, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(models["llama"], tmp_path / "model")
    (folder / "tokenizer.json").write_text("garbage{")
    _adapter(folder).load("meta")
    with pytest.raises(SpecError, match=rf"model\.source: '{folder}' does not load as a tokenizer: "):
        _adapter(folder).examples()


@pytest.mark.parametrize("kept", [0, 5, -100])
def test_cut_weights_are_refused(models: dict[Kind, Path], tmp_path: Path, kept: int) -> None:
    weights = shutil.copytree(models["llama"], tmp_path / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(DataError, match=rf"model\.source: '{weights.parent}' holds damaged weights: .*Fetch or copy"):
        _adapter(weights.parent).load("cpu")


def test_weights_that_do_not_fill_the_model_are_refused(
    models: dict[Kind, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models["llama"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    with pytest.raises(DataError, match=r"lack 1 tensors of the model: lm_head\.weight"):
        _adapter(folder).load("cpu")

    weights["lm_head.weight"] = load_file(models["llama"] / "model.safetensors")["lm_head.weight"][1:].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        DataError, match=r"wrong shape for 1 tensors of the model: lm_head\.weight \[299, 32\] for \[300"
    ):
        _adapter(folder).load("cpu")
    # transformers would print a table of its own.
    assert capfd.readouterr() == ("", "")


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise RuntimeError('ran')")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}})
    )

    with pytest.raises(SpecError, match="does not load as a causal language model"):
        _adapter(tmp_path).load("cpu")
