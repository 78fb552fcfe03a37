"""Networks for the numerics' tests, built in memory with random weights: every way in which a layer can be used."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from gradstore.groups import Grouping, ParameterGroup, partition
from gradstore.numerics.gradients import model_parameters
from gradstore.numerics.outputs import token_cross_entropy
from tests.models import VOCABULARY, tiny_config
from tests.unusual import Unusual

EVERYTHING = Grouping(rule="module", biases=True, norms=True, embeddings=True, output_head=True)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and a batch of examples for it; ``outputs(model, rows)`` is one number per chosen row of the batch."""

    model: nn.Module
    outputs: Callable[[nn.Module, list[int]], Tensor]
    size: int
    grouping: Grouping = EVERYTHING

    @cached_property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """The groups of the network's parameters."""
        return partition(model_parameters(self.model, ("lm_head",)), self.grouping).groups


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


def language_case(kind: str, grouping: Grouping = EVERYTHING) -> Case:
    """Five sequences of different lengths, padded."""
    tokens, mask = sequences([9, 4, 12, 2, 7])

    def outputs(model: nn.Module, rows: list[int]) -> Tensor:
        device = next(model.parameters()).device
        return language_outputs(model, tokens[rows].to(device), mask[rows].to(device))

    return Case(model=language_model(kind), outputs=outputs, size=5, grouping=grouping)


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


class Checkpointed(nn.Module):
    """A layer that is computed once more in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, values: Tensor) -> Tensor:
        """Logits [B, 3]."""
        hidden = torch.tanh(self.first(values))
        again = checkpoint(lambda given: torch.tanh(self.second(given)), hidden, use_reentrant=self.reentrant)
        result: Tensor = self.head(again)
        return result


class Scaled(nn.Module):
    """A layer of no known kind: a matrix, a scale and an offset of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.zeros(2, 6, 6))
        self.offset = nn.Parameter(torch.zeros(6))

    def forward(self, values: Tensor, *, sign: float) -> tuple[Tensor, None]:
        """[B, 6], and nothing."""
        return torch.tanh(values @ self.mixing[0] + sign * (values**2) @ self.mixing[1] + self.offset), None


class OfUnknownKind(nn.Module):
    """`Scaled` and a transposed convolution, whose gradients autograd takes one example at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = Scaled()
        self.upwards = nn.ConvTranspose1d(1, 2, 3)
        self.head = nn.Linear(16, 3)

    def forward(self, values: Tensor) -> Tensor:
        """Logits [B, 3]."""
        hidden, _ = self.scaled(values, sign=-1.0)
        result: Tensor = self.head(torch.tanh(self.upwards(hidden[:, None]).flatten(1)))
        return result


class Normalised(nn.Module):
    """Every normalisation, on vectors, grids and channels."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.LayerNorm(6)
        self.matrix = nn.LayerNorm((2, 3))
        self.root = nn.RMSNorm(6)
        self.group = nn.GroupNorm(2, 6)
        self.batch = nn.BatchNorm1d(6)
        self.instance = nn.InstanceNorm1d(6, affine=True)
        self.own = OnePlusRMSNorm()
        self.head = nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        """Logits [B, 3]."""
        hidden = self.own(self.root(self.vector(values)))
        hidden = self.batch(self.group(torch.tanh(hidden)))
        channels = self.instance(torch.stack([hidden, hidden**2, -hidden], 2))
        grid = self.matrix(channels.transpose(1, 2).reshape(-1, 3, 2, 3))
        result: Tensor = self.head(grid.reshape(-1, 3, 6).mean(1))
        return result


class OnePlusRMSNorm(nn.Module):
    """A norm of some model families, which scales by one more than its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6))

    def forward(self, values: Tensor) -> Tensor:
        """Values of root mean square 1, scaled."""
        return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Convolutional(nn.Module):
    """Convolutions of one, two and three dimensions: in groups, strided, dilated, padded in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(1, 4, 3, padding=1, padding_mode="circular")
        self.plane = nn.Conv2d(2, 6, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1), bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding="same")
        self.grouped = nn.Conv2d(6, 4, 1, groups=2)
        self.solid = nn.Conv3d(1, 2, (2, 1, 2))
        self.head = nn.Linear(2, 3)

    def forward(self, values: Tensor) -> Tensor:
        """Logits [B, 3]."""
        hidden = torch.tanh(self.line(values[:, None]))
        hidden = torch.tanh(self.plane(hidden.reshape(-1, 2, 4, 3)))
        hidden = torch.tanh(self.grouped(torch.tanh(self.depthwise(hidden))))
        result: Tensor = self.head(torch.tanh(self.solid(hidden[:, None])).mean((2, 3, 4)))
        return result


class PadsItself(nn.Conv1d):
    """A convolution that is one by its class, and pads before."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch has
        """As many positions as before."""
        return super().forward(functional.pad(input, (1, 1), mode="reflect"))


class ScalesItself(nn.Embedding):
    """An embedding that is one by its class, and scales what it looks up."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch has
        """Rows, three times."""
        return 3 * super().forward(input)


class Derived(nn.Module):
    """Layers whose classes are derived from those of torch, and compute something else."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = ScalesItself(9, 4)
        self.line = PadsItself(4, 5, 3)
        self.head = nn.Linear(5, 3)

    def forward(self, values: Tensor) -> Tensor:
        """Logits [B, 3]."""
        hidden = torch.tanh(self.tokens((values.abs() * 7).long() % 9))
        result: Tensor = self.head(torch.tanh(self.line(hidden.transpose(1, 2))).mean(2))
        return result


class Embedded(nn.Module):
    """Tokens with a pad among them, positions that all examples share, and steps that are flattened into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6, padding_idx=0)
        self.places = nn.Embedding(4, 6)
        self.class_of_example = nn.Embedding(3, 6)
        self.steps = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        """Logits [B, 3]."""
        numbers = (values[:, :4].abs() * 7).long() % 9
        places = self.places(torch.arange(4)[None])
        classes = self.class_of_example(numbers[:, 0] % 3)
        hidden = self.tokens(numbers) + places + classes[:, None]
        flat = torch.tanh(self.steps(hidden.reshape(-1, 6)))
        result: Tensor = self.head(flat.reshape(-1, 4, 6).mean(1))
        return result


def classifier_case(model: nn.Module) -> Case:
    """Cross-entropy of five random vectors and classes."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(5, 6, generator=generator)
    classes = torch.randint(0, 3, (5,), generator=generator)

    def outputs(model: nn.Module, rows: list[int]) -> Tensor:
        parameter = next(model.parameters())
        logits = model(values[rows].to(parameter.device, parameter.dtype))
        return functional.cross_entropy(logits, classes[rows].to(parameter.device), reduction="none")

    return Case(model=randomised(model), outputs=outputs, size=5)


def lora_case() -> Case:
    """A language model with a LoRA adapter: only the factors are trained."""
    from peft import LoraConfig, get_peft_model

    case = language_case("llama")
    options = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj", "down_proj"])
    with warnings.catch_warnings():
        # PEFT asks transformers by names that are to go.
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(case.model, options)
    return replace(case, model=randomised(adapted))


def mixture_case() -> Case:
    """A mixture of experts whose weights are stacked, behind a router."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        use_cache=False,
        # The others multiply no float64 matrices.
        experts_implementation="eager",
    )
    case = language_case("llama", replace(EVERYTHING, embeddings=False, output_head=False))
    return replace(case, model=randomised(MixtralForCausalLM(config)))


CASES: dict[str, Callable[[], Case]] = {
    "Linear, RMSNorm, Embedding": lambda: language_case("llama"),
    "Conv1D, LayerNorm, a tied head": lambda: language_case("gpt2"),
    "Linear in heads, shared keys": lambda: language_case("llama", Grouping(rule="head")),
    "Conv1D in heads": lambda: language_case("gpt2", Grouping(rule="head", biases=True)),
    "whole blocks": lambda: language_case("gpt2", Grouping(rule="block", biases=True, norms=True)),
    "without positions, in place": lambda: classifier_case(Perceptron()),
    "reused, tied, on a grid": lambda: classifier_case(Reused()),
    "checkpointed": lambda: classifier_case(Checkpointed(reentrant=False)),
    "checkpointed, reentrant": lambda: classifier_case(Checkpointed(reentrant=True)),
    "of unknown kind": lambda: classifier_case(OfUnknownKind()),
    "normalised": lambda: classifier_case(Normalised()),
    "convolutional": lambda: classifier_case(Convolutional()),
    "derived": lambda: classifier_case(Derived()),
    "unusual": lambda: classifier_case(Unusual()),
    "embedded, steps in the batch": lambda: classifier_case(Embedded()),
    "LoRA": lora_case,
    "mixture of experts": mixture_case,
}
