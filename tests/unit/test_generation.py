from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.adapters.causal_lm import CausalLM
from gradstore.adapters.protocol import Examples
from gradstore.adapters.text.generation import Generation, ModelWriter
from gradstore.adapters.text.splits import split_examples
from gradstore.errors import DataError, SpecError
from gradstore.spec import DataSection, ModelSection
from gradstore.store.examples import data_hash
from tests.models import SENTENCES, Kind, make_tiny_model, tiny_tokenizer
from tests.texts import CharacterEncoder, Echo, spell

SPLITS = {"train": {"rows": 2}, "learn": {"rows": 1}, "eval": {"rows": 1}}
WRITTEN = {"prompt_tokens": 3, "new_tokens": 2}


def _write(path: Path, texts: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"text": text, "id": f"d{i}"}) + "\n" for i, text in enumerate(texts)))
    return str(path)


def _split(source: str, writer: Echo | None = None, **keys: Any) -> Examples:
    data = {"source": source, "id": "id", "shuffle": False, "length": 8, **SPLITS, **keys}
    return split_examples(DataSection.model_validate(data), 0, CharacterEncoder(), writer or Echo())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    folder = tmp_path_factory.mktemp("models")
    kinds: tuple[Kind, ...] = ("llama", "gpt2")
    return {kind: make_tiny_model(folder / kind, kind) for kind in kinds}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _write(tmp_path_factory.mktemp("texts") / "x.jsonl", SENTENCES)


def _adapter(model: Path, source: str, **generate: Any) -> CausalLM:
    splits = {**SPLITS, "eval": {"rows": 2, "generate": {"prompt_tokens": 6, "new_tokens": 9, **generate}}}
    return CausalLM(
        ModelSection(source=str(model)), DataSection.model_validate({"source": source, "length": 24, **splits}), 0
    )


def _writer(model: Path) -> ModelWriter:
    adapter = CausalLM(ModelSection(source=str(model)), DataSection.model_validate({"source": "x", **SPLITS}), 0)
    return ModelWriter(load=adapter.load, end=None, source="tiny")


def test_a_generated_example_is_a_prompt_of_its_source_and_what_the_model_wrote(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two", "three", "fourth"])
    writer = Echo()

    examples = _split(source, writer, eval={"rows": 1, "generate": WRITTEN})

    (example,) = examples.splits["eval"]
    assert (example.example_id, example.source, example.text) == ("d3+generated", source, "fopq")
    assert spell(example.inputs["tokens"]) == "^fopq"
    assert example.inputs["predicted"].tolist() == [False, False, False, True, True]
    assert writer.asked == [("d3", "^fo")]
    assert "predicted" not in examples.splits["learn"][0].inputs


def test_a_prompt_may_count_as_predicted(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two", "three", "fourth"])

    (example,) = _split(source, eval={"rows": 1, "generate": {**WRITTEN, "mask_prompt": False}}).splits["eval"]

    assert spell(example.inputs["tokens"]) == "^fopq"
    assert set(example.inputs) == {"tokens"}


@pytest.mark.parametrize("shared", [False, True], ids=["no source", "the source of all"])
def test_prompts_of_training_rows_are_shared_out_between_the_query_splits(tmp_path: Path, shared: bool) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two", "three", "fourth"])
    prompted = {"source": source if shared else "unread", "rows": 1, "generate": {**WRITTEN, "prompts": "train"}}
    writer = Echo()

    examples = _split(source, writer, train={"rows": 3}, learn=prompted, eval=prompted)

    assert writer.asked == [("d0", "^on"), ("d1", "^tw")]
    assert [examples.splits[name][0].source for name in ("learn", "eval")] == [source, source]
    assert len(examples.facts.sources) == 1
    with pytest.raises(DataError, match=r"data\.eval\.rows: prompts \[1, 4\) of data\.train are declared.*has 3 rows"):
        _split(source, train={"rows": 3}, learn=prompted, eval={**prompted, "rows": 3})


def test_a_model_that_writes_a_training_example_back_is_no_overlap_but_two_queries_alike_are(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["abcd", "abce", "other"])
    prompted = {"source": "unread", "rows": 1, "generate": {**WRITTEN, "prompts": "train"}}

    written = _split(source, train={"rows": 2}, eval=prompted).splits["eval"]
    assert spell(written[0].inputs["tokens"]) == "^abcd"
    with pytest.raises(DataError, match=r"data\.eval: d1\+generated of .* equals d0\+generated .* in data\.learn"):
        # Cut to three tokens, no training example is what the model wrote.
        _split(source, train={"rows": 2, "length": 3}, deduplicate=False, learn=prompted, eval=prompted)


def test_prompts_of_the_splits_own_rows_may_not_be_training_texts(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two", "three"])
    other = _write(tmp_path / "y.jsonl", ["ONE"])

    with pytest.raises(DataError, match=r"data\.eval: d0 of .*y\.jsonl equals d0 of .*x\.jsonl in data\.train"):
        _split(source, eval={"source": other, "rows": 1, "generate": WRITTEN})


def test_a_prompt_of_its_own_is_taken_whole_and_its_completion_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    pairs = [("ask a", "b"), ("ask b", "c"), ("ask c", "d"), ("ask d", "e")]
    path.write_text("".join(json.dumps({"p": p, "c": c, "id": p}) + "\n" for p, c in pairs))
    writer = Echo()

    _split(str(path), writer, prompt="p", completion="c", eval={"rows": 1, "generate": {"new_tokens": 2}})
    _split(str(path), writer, prompt="p", completion="c", eval={"rows": 1, "generate": WRITTEN})

    assert [prompt for _, prompt in writer.asked] == ["^ask d", "^as"]
    with pytest.raises(DataError, match=r"the prompt of ask d has 6 tokens; with new_tokens = 4 and length = 8 it may"):
        _split(str(path), prompt="p", completion="c", eval={"rows": 1, "generate": {"new_tokens": 4}})


@pytest.mark.parametrize(
    ("split", "keys", "problem"),
    [
        ("eval", {"rows": 1, "generate": {"tokens": 3}}, r"data\.eval\.generate\.tokens: unknown key; accepted for"),
        ("eval", {"rows": 1, "generate": {"new_tokens": "3"}}, r"data\.eval\.generate\.new_tokens: found '3'"),
        ("eval", {"rows": 1, "generate": {"new_tokens": 0}}, r"generate\.new_tokens: found 0; accepted: 1 or more"),
        ("eval", {"rows": 1, "generate": {"temperature": -1.0}}, r"temperature: found -1\.0; accepted: 0 or more"),
        ("eval", {"rows": 1, "generate": {"prompts": "learn"}}, r"generate\.prompts: found 'learn'; accepted"),
        ("eval", {"rows": 1, "generate": {"new_tokens": 8}}, r"new_tokens = 8 exceed length = 8\. Raise length"),
        ("eval", {"generate": WRITTEN}, r"data\.eval\.rows: is missing; say how many examples are generated"),
        ("train", {"rows": 1, "generate": WRITTEN}, r"data\.train\.generate: training examples cannot be generated"),
    ],
)
def test_what_generate_does_not_mean_is_refused(split: str, keys: dict[str, Any], problem: str) -> None:
    data = DataSection.model_validate({"source": "x", "length": 8, **SPLITS, split: keys})

    with pytest.raises(SpecError, match=problem):
        CausalLM(ModelSection(source="x"), data, 0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_likeliest_tokens_are_those_of_whole_passes(models: dict[Kind, Path], kind: Kind) -> None:
    writer = _writer(models[kind])
    prompt = np.array([5, 60, 7], np.int32)

    written = writer.write(prompt, Generation(new_tokens=12), "x")

    model = writer.load("cpu")
    tokens = prompt.tolist()
    with torch.no_grad():
        while len(tokens) < 15:
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == 0:
                break
    assert written.tolist() == tokens[3:]
    assert written.dtype == np.int32


def test_draws_follow_the_models_probabilities_and_the_rows_name(models: dict[Kind, Path]) -> None:
    writer = _writer(models["llama"])
    prompt = np.array([5, 60, 7], np.int32)
    # Cold enough that a few tokens have most of the probability.
    generation = Generation(new_tokens=1, temperature=0.3)

    drawn = [int(writer.write(prompt, generation, f"row {n}")[0]) for n in range(2000)]

    with torch.no_grad():
        scores = writer.load("cpu")(input_ids=torch.from_numpy(prompt.astype(np.int64))[None]).logits[0, -1]
    expected = (scores.double() / 0.3).softmax(0).numpy()
    found = np.bincount(drawn, minlength=len(expected)) / len(drawn)
    # Five standard errors of each frequency.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected / len(drawn)) + 1e-3).all()
    again = [int(writer.write(prompt, generation, f"row {n}")[0]) for n in range(50)]
    assert again == drawn[:50]
    other = Generation(new_tokens=1, temperature=0.3, seed=1)
    assert [int(writer.write(prompt, other, f"row {n}")[0]) for n in range(50)] != drawn[:50]


def test_writing_ends_with_the_token_that_ends_a_text(models: dict[Kind, Path]) -> None:
    writer = _writer(models["llama"])
    prompt = np.array([5, 60, 7], np.int32)
    written = writer.write(prompt, Generation(new_tokens=8), "x")
    assert 0 not in written
    stop = int(written[3])

    ended = ModelWriter(load=writer.load, end=stop, source="tiny").write(prompt, Generation(new_tokens=8), "x")

    assert ended.tolist() == written[: written.tolist().index(stop) + 1].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rerun_generates_the_same_examples_whatever_the_threads(
    models: dict[Kind, Path], texts: str, temperature: float
) -> None:
    threads = torch.get_num_threads()
    first = _adapter(models["llama"], texts, temperature=temperature).examples().splits["eval"]
    torch.set_num_threads(threads + 1)
    try:
        again = _adapter(models["llama"], texts, temperature=temperature).examples().splits["eval"]
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)

    assert data_hash(first) == data_hash(again)
    for example in first:
        assert example.example_id.endswith("+generated")
        row = int(example.example_id.removesuffix("+generated").rpartition(":")[2]) - 1
        prompt = tiny_tokenizer()(SENTENCES[row])["input_ids"][:6]
        assert example.inputs["tokens"][:6].tolist() == prompt
        assert not example.inputs["predicted"][:6].any()
        assert example.inputs["predicted"][6:].all()


def test_what_a_row_gets_does_not_depend_on_its_neighbours(models: dict[Kind, Path], texts: str) -> None:
    both = _adapter(models["llama"], texts, temperature=1.0).examples().splits["eval"]
    writer = _writer(models["llama"])

    for example in both:
        prompt = example.inputs["tokens"][:6]
        name = example.example_id.removesuffix("+generated")
        alone = writer.write(prompt, Generation(new_tokens=9, temperature=1.0), name)
        assert example.inputs["tokens"][6:].tolist() == alone.tolist()
