"""Networks for the numerics' tests, built in memory with random weights: every way in which a layer can be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradstore.groups import ParameterGroup, partition
from gradstore.numerics.gradients import supported_layers
from gradstore.numerics.outputs import token_cross_entropy
from tests.models import VOCABULARY, tiny_config


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and a batch of examples for it; ``outputs(model, rows)`` is one number per chosen row of the batch."""

    model: nn.Module
    outputs: Callable[[nn.Module, list[int]], Tensor]
    size: int

    @property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """Every layer of the network but a language model's head."""
        parameters = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        return partition(supported_layers(self.model), parameters, heads=("lm_head",)).groups


def randomised(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Set every parameter at random, since norms of one and biases of zero hide mistakes, and go to evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() == 1 and not name.endswith("bias")
            parameter.copy_(1 + 0.2 * noise if is_scale else 0.2 * noise)
    return model.eval()


def language_model(kind: str) -> nn.Module:
    """Build a two-layer causal language model: ``llama`` has Linear layers, ``gpt2`` Conv1D layers, biases, dropout."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind)  # type: ignore[arg-type]
    config.use_cache = False
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return randomised(model)


def weights_of(model: nn.Module) -> dict[str, bytes]:
    """The bytes of every stored tensor."""
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def sequences(lengths: list[int], *, pads: int = 0, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random tokens [B, longest + pads] with random tokens as pads on the right, and the mask of what is no pad."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + pads
    tokens = torch.randint(0, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return tokens, mask


def language_outputs(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Summed token loss of every sequence."""
    return token_cross_entropy(model(input_ids=tokens, attention_mask=mask.long()).logits, tokens, mask)


def language_case(kind: str) -> Case:
    """Five sequences of different lengths, padded."""
    tokens, mask = sequences([9, 4, 12, 2, 7])

    def outputs(model: nn.Module, rows: list[int]) -> Tensor:
        return language_outputs(model, tokens[rows], mask[rows])

    return Case(model=language_model(kind), outputs=outputs, size=5)


class Perceptron(nn.Module):
    """Linear layers on [B, d], without positions, and with activations that work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)
        )

    def forward(self, values: Tensor) -> Tensor:
        """Logits [B, 3]."""
        result: Tensor = self.layers(values)
        return result


class Reused(nn.Module):
    """One layer called twice, one weight in two layers, one layer on [B, H, W, d], one called with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        """Logits [B, 3]."""
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(values))))
        grid = torch.stack([hidden, 2 * hidden, -hidden, hidden**2], 1).reshape(-1, 2, 2, 6)
        pooled = torch.tanh(self.second(torch.tanh(self.first(grid)))).mean((1, 2))
        result: Tensor = self.head(input=pooled)
        return result


def classifier_case(model: nn.Module) -> Case:
    """Cross-entropy of five random vectors and classes."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(5, 6, generator=generator)
    classes = torch.randint(0, 3, (5,), generator=generator)

    def outputs(model: nn.Module, rows: list[int]) -> Tensor:
        dtype = next(model.parameters()).dtype
        return functional.cross_entropy(model(values[rows].to(dtype)), classes[rows], reduction="none")

    return Case(model=randomised(model), outputs=outputs, size=5)


CASES: dict[str, Callable[[], Case]] = {
    "Linear": lambda: language_case("llama"),
    "Conv1D": lambda: language_case("gpt2"),
    "without positions, in place": lambda: classifier_case(Perceptron()),
    "reused, tied, on a grid": lambda: classifier_case(Reused()),
}
