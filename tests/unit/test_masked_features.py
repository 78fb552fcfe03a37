"""Features of what is not predicted whole, and of adapters, against gradients that autograd takes of each example alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gradstore.adapters.causal_lm import CausalLM
from gradstore.groups import Grouping, partition
from gradstore.numerics.gradients import FeatureExtractor, model_parameters
from gradstore.numerics.projection import PROJECTIONS
from gradstore.spec import DataSection, ModelSection
from gradstore.store.examples import Example, hash_inputs
from tests.models import make_tiny_lora, make_tiny_model

# Of different lengths, so that some are padded; of the second only the last token is predicted, of the third all.
ROWS = [([5, 60, 7, 200, 9, 3], [0, 0, 0, 1, 1, 1]), ([8, 9, 10], [0, 0, 1]), ([40, 41, 42, 43], [1, 1, 1, 1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "model", "llama")
    make_tiny_lora(folder / "lora", folder / "model", target_modules=["q_proj", "v_proj", "down_proj"])
    return folder


def _adapter(folder: Path, *, adapted: bool) -> CausalLM:
    data = {"source": "nowhere", **{name: {"rows": 1} for name in ("train", "learn", "eval")}}
    model = ModelSection(source=str(folder / "model"), peft=str(folder / "lora") if adapted else None)
    return CausalLM(model, DataSection.model_validate(data), 0)


def _examples() -> list[Example]:
    examples = []
    for tokens, predicted in ROWS:
        inputs = {"tokens": np.array(tokens, np.int32), "predicted": np.array(predicted, bool)}
        examples.append(
            Example(
                example_id="x",
                source="s",
                label=None,
                text="",
                content_hash=hash_inputs(inputs),
                size=len(tokens),
                inputs=inputs,
            )
        )
    return examples


def _gradients(model: nn.Module, names: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Of the summed loss of each row alone, with labels as transformers masks them."""
    parameters = dict(model.named_parameters())
    found = []
    for tokens, predicted in ROWS:
        labels = [token if p else -100 for token, p in zip(tokens, predicted, strict=True)]
        logits = model(input_ids=torch.tensor([tokens])).logits[0]
        # As transformers takes it from labels, but for its rounding to float32.
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(labels[1:]), reduction="sum")
        gradients = torch.autograd.grad(loss, [parameters[name] for name in names])
        found.append({name: value.flatten().numpy() for name, value in zip(names, gradients, strict=True)})
    return found


@pytest.mark.parametrize("adapted", [False, True])
def test_features_are_those_of_the_masked_loss(folder: Path, adapted: bool) -> None:
    adapter = _adapter(folder, adapted=adapted)
    model = adapter.load("cpu").double()
    groups = partition(model_parameters(model, adapter.output_heads(model)), Grouping()).groups
    extractor = FeatureExtractor(model, groups, PROJECTIONS["identity"](), seed=0)

    found = extractor(lambda: adapter.outputs(model, _examples()), examples=len(ROWS))

    assert {part.parameter for group in groups for part in group.parts} == (
        {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if adapted
        else {name for name, parameter in model.named_parameters() if "proj" in name}
    )
    for row, expected in enumerate(
        _gradients(adapter.load("cpu").double(), [f"{group.name}.weight" for group in groups])
    ):
        for group in groups:
            want = expected[f"{group.name}.weight"]
            assert np.abs(want).max() > 1e-6
            np.testing.assert_allclose(found.features[group.name][row].numpy(), want, rtol=1e-9, atol=1e-12)
