"""Embeddings as baselines: hidden states of models and of a sentence encoder, against plain loops; kept block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.embeddings import similarities
from gradstore.stages.featurize import featurize
from gradstore.stages.progress import Progress
from gradstore.stages.reading import examples_at
from gradstore.stages.train import train_model
from gradstore.store.features import FeatureStore
from tests.digits import write_digits
from tests.runs import InThisProcess, make_run

QUIET = Progress(quiet=True)
ENGINE: Any = InThisProcess()
ROWS = {"train": 40, "eval": 6}


def expected(store: FeatureStore, embed: Any) -> np.ndarray:
    """Cosines of vectors that ``embed`` makes of one example at a time."""
    found = []
    for name in ("eval", "train"):
        vectors = np.stack([embed(example) for example in examples_at(store.open_set(name), range(ROWS[name]))])
        found.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return np.asarray(found[0] @ found[1].T)


def texts(folder: Path, **evaluate: Any) -> RunSpec:
    tables = {
        "data.train": {"rows": ROWS["train"]},
        "data.eval": {"rows": ROWS["eval"]},
        "features": {"block_rows": 16},
        "evaluate": evaluate,
    }
    spec = read_spec(make_run(folder, str(folder / "store"), tables))
    featurize(spec, ENGINE, QUIET)
    return spec


def test_those_of_a_language_model_are_means_over_tokens_of_its_last_hidden_states(tmp_path: Path) -> None:
    spec = texts(tmp_path)
    model: Any = make_adapter(spec).load("cpu")
    store = FeatureStore.open(spec.run.store)

    def embed(example: Any) -> np.ndarray:
        tokens = torch.from_numpy(example.inputs["tokens"].astype(np.int64))[None]
        with torch.no_grad():
            return model.model(tokens).last_hidden_state[0].mean(0).double().numpy()  # type: ignore[no-any-return]

    found = similarities(spec, store, ENGINE, QUIET)

    assert found.shape == (ROWS["eval"], ROWS["train"])
    assert found == pytest.approx(expected(store, embed), abs=1e-5)
    kept = {info.path for info in store.storage.list_objects("embeddings")}
    commits = sorted(path for path in kept if "/train/" in path and "/commits" in path)
    assert len(commits) == 3
    store.storage.delete(commits[1])
    ran: list[str] = []

    class Counts(InThisProcess):
        def run(self, tasks: Any) -> Any:
            ran.extend(task.name for task in tasks)
            return super().run(tasks)

    counting: Any = Counts()
    assert np.array_equal(similarities(spec, FeatureStore.open(spec.run.store), counting, QUIET), found)
    assert ran == ["embed-train-00000001"]


def test_those_of_a_sentence_encoder_are_of_the_texts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path / "encoder"
    made = make_run(tmp_path, str(tmp_path / "store"))
    tokenizer = AutoTokenizer.from_pretrained(read_spec(made).model.source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    encoder = BertModel(config).eval()
    encoder.save_pretrained(folder)
    spec = texts(tmp_path, encoder=str(folder))

    def embed(example: Any) -> np.ndarray:
        with torch.no_grad():
            states = encoder(**tokenizer(example.text, return_tensors="pt")).last_hidden_state
        return states[0].mean(0).double().numpy()  # type: ignore[no-any-return]

    store = FeatureStore.open(spec.run.store)
    assert similarities(spec, store, ENGINE, QUIET) == pytest.approx(expected(store, embed), abs=1e-5)


def test_those_of_a_classifier_enter_its_last_linear_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    tables: dict[str, dict[str, Any]] = {
        "data.train": {"rows": ROWS["train"]},
        "data.eval": {"rows": ROWS["eval"]},
        "training": {"options": {"epochs": 2}},
    }
    train_model(read_spec(write_digits(tmp_path, tables)), QUIET)
    spec = read_spec(tmp_path / "run.toml")
    featurize(spec, ENGINE, QUIET)
    model: Any = make_adapter(spec).load("cpu")

    def embed(example: Any) -> np.ndarray:
        image = torch.from_numpy(example.inputs["image"] / np.float32(255)).reshape(1, -1)
        with torch.no_grad():
            return model[:3](image)[0].double().numpy()  # type: ignore[no-any-return]

    store = FeatureStore.open(spec.run.store)
    assert similarities(spec, store, ENGINE, QUIET) == pytest.approx(expected(store, embed), abs=1e-5)
