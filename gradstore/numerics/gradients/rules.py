"""How the per-example gradient of a module's tensor follows from its input and its output gradient: one rule a kind.

A rule either gives the two factors of G = sum_t left_t right_t^T, one of them known in the forward pass and one in the
backward pass, or gives G itself in the backward pass. Examples are the first dimension of every input, or m rows each of a
first dimension of m times as many, example by example, as mixtures of experts and averages over timesteps have it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

from gradstore.groups import Category
from gradstore.numerics.projection import Projector, TwoSided

# What a module was called with: the first input, and the others by position and name.
Call = tuple[Tensor, tuple[Any, ...], dict[str, Any]]
CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """G = sum_t left_t right_t^T.

    Attributes
    ----------
    early
        The side that is known in the forward pass; the other comes of the output gradient.
    forward
        (module, input, examples) -> that factor [B, T, F], or integer [B, T] for one-hot rows.
    backward
        (module, input, output gradient, examples) -> the other factor [B, T, F].
    needs_input
        Whether ``backward`` is to be given the input, which is None otherwise and need not be kept.
    projected
        Whether the first factor is projected already.
    """

    early: Literal["left", "right"]
    forward: Callable[[nn.Module, Tensor, int], Tensor]
    backward: Callable[[nn.Module, Tensor | None, Tensor, int], Tensor]
    needs_input: bool = False
    projected: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """G [B, O, I] itself; ``needs_input`` says whether more than the output gradient is needed.

    ``gradient`` is (module, call, output gradient, examples) -> G.
    """

    needs_input: bool
    gradient: Callable[[nn.Module, Call, Tensor, int], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class OneByOne:
    """G by autograd: the module is run once more for each example, with an alias of its parameters for each."""


Rule = Factors | Whole | OneByOne


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRule:
    """A parameter tensor of a module: what it is, the shape of its canonical matrix, and the rule of its gradient.

    ``rule_for`` gives the rule under a projector, since a convolution has factors only where these are cheap.
    """

    category: Category
    shape: tuple[int, int]
    rule_for: Callable[[Projector], Rule]


def linear_rules(module: nn.Module, shape: tuple[int, int]) -> dict[str, TensorRule]:
    """Rules of y = W x + b over the last dimension, of ``shape`` [out, in]."""
    weight = Factors(early="right", forward=_rows, backward=lambda module, _, gradient, B: _rows(module, gradient, B))
    return _with_bias(module, shape, lambda projector: weight, _rows)


def convolution_rules(module: nn.Module) -> dict[str, TensorRule]:
    """Rules of a convolution: its weight [out, in / groups x window].

    Under a two-sided projection the right factor is the input convolved with the rows of P_i, so that no patch is ever laid
    out. Otherwise, and in several groups, G is what autograd computes, example by example.
    """
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    weight = module.weight
    whole = Whole(needs_input=True, gradient=_convolution_gradient)

    def rule_for(projector: Projector) -> Rule:
        if not isinstance(projector, TwoSided) or module.groups > 1:
            return whole
        return Factors(
            early="right",
            forward=lambda _, value, examples: _convolved(module, value, examples, projector),
            backward=lambda module, _, gradient, examples: _channels_last(module, gradient, examples),
            projected=True,
        )

    return _with_bias(module, (weight.shape[0], weight[0].numel()), rule_for, _channels_last)


def embedding_rules(module: nn.Module) -> dict[str, TensorRule]:
    """Rules of an embedding: its weight [vocabulary, width], whose left factors are one-hot."""
    assert isinstance(module, nn.Embedding)
    rule = Factors(early="left", forward=_tokens, backward=_token_gradients, needs_input=True)
    shape = module.num_embeddings, module.embedding_dim
    return {"weight": TensorRule(category="embedding", shape=shape, rule_for=lambda projector: rule)}


def norm_rules(module: nn.Module, *, channels_first: bool) -> dict[str, TensorRule]:
    """Rules of a normalisation: its scale and bias [n, 1], over the trailing dimensions or over dimension 1."""
    spread = _channels_last if channels_first else _trailing

    def scale_gradient(module: nn.Module, call: Call, gradient: Tensor, examples: int) -> Tensor:
        normalised = _normalised(module, call).to(gradient.dtype)
        return _sums(spread(module, gradient * normalised, examples))

    def bias_gradient(module: nn.Module, call: Call, gradient: Tensor, examples: int) -> Tensor:
        return _sums(spread(module, gradient, examples))

    gradients = {"weight": (scale_gradient, True), "bias": (bias_gradient, False)}
    found = {}
    for name, parameter in module.named_parameters(recurse=False):
        gradient, needs_input = gradients[name]
        rule = Whole(needs_input=needs_input, gradient=gradient)
        found[name] = TensorRule(
            category="norm" if name == "weight" else "bias",
            shape=(parameter.numel(), 1),
            rule_for=lambda projector, rule=rule: rule,  # type: ignore[misc]
        )
    return found


def other_rules(module: nn.Module) -> dict[str, TensorRule]:
    """Rules of a module of unknown kind that holds nothing but parameters: leading dimensions are folded into out."""
    found = {}
    for name, parameter in module.named_parameters(recurse=False):
        matrix = parameter.dim() > 1
        vector: Category = "bias" if "bias" in name else "norm"
        found[name] = TensorRule(
            category="matrix" if matrix else vector,
            shape=canonical(parameter, folded=True).shape,  # type: ignore[arg-type]
            rule_for=lambda projector: OneByOne(),
        )
    return found


def canonical(tensor: Tensor, *, transposed: bool = False, folded: bool = False) -> Float[Tensor, "O I"]:
    """A parameter, or its gradient, as the canonical matrix [O, I] (see `gradstore.groups.Parameter`).

    Parameters
    ----------
    tensor
        As its module stores it.
    transposed
        Whether that is [in, out].
    folded
        Whether leading dimensions belong to O, as in a stack of experts; otherwise trailing ones belong to I.
    """
    if tensor.dim() < 2:
        return tensor.reshape(-1, 1)
    if folded:
        return tensor.reshape(-1, tensor.shape[-1])
    matrix = tensor.flatten(1)
    return matrix.T if transposed else matrix


def _with_bias(
    module: nn.Module,
    shape: tuple[int, int],
    rule_for: Callable[[Projector], Rule],
    positions: Callable[[nn.Module, Tensor, int], Tensor],
) -> dict[str, TensorRule]:
    def gradient(module: nn.Module, call: Call, gradient: Tensor, examples: int) -> Tensor:
        return _sums(positions(module, gradient, examples))

    found = {"weight": TensorRule(category="matrix", shape=shape, rule_for=rule_for)}
    if isinstance(getattr(module, "bias", None), nn.Parameter):
        bias = Whole(needs_input=False, gradient=gradient)
        found["bias"] = TensorRule(category="bias", shape=(shape[0], 1), rule_for=lambda projector: bias)
    return found


def _rows(module: nn.Module, value: Tensor, examples: int) -> Float[Tensor, "B T F"]:
    """[B, ..., features] as [B, T, features], with T = 1 for a layer that has no positions."""
    return value.reshape(examples, -1, value.shape[-1])


def _channels_last(module: nn.Module, value: Tensor, examples: int) -> Float[Tensor, "B T F"]:
    """[B m, channels, ...] as [B, m x positions, channels]."""
    spread = value.reshape(len(value), value.shape[1], -1).transpose(1, 2)
    return spread.reshape(examples, -1, value.shape[1])


def _trailing(module: nn.Module, value: Tensor, examples: int) -> Float[Tensor, "B T F"]:
    """[B, ..., a, b] as [B, T, a b] for a scale of shape [a, b]."""
    scale = next(module.parameters(recurse=False))
    return value.reshape(examples, -1, scale.numel())


def _tokens(module: nn.Module, value: Tensor, examples: int) -> Shaped[Tensor, "B T"]:
    return value.reshape(examples, -1)


def _token_gradients(module: nn.Module, tokens: Tensor | None, gradient: Tensor, examples: int) -> Tensor:
    """The output gradient at every position, zero at pads, whose row of the embedding is never trained."""
    assert isinstance(module, nn.Embedding)
    assert tokens is not None
    if module.padding_idx is not None:
        gradient = gradient.masked_fill((tokens == module.padding_idx)[..., None], 0)
    return _rows(module, gradient, examples)


def _sums(value_BTF: Float[Tensor, "B T F"]) -> Float[Tensor, "B F 1"]:
    return value_BTF.sum(1)[:, :, None]


def _normalised(module: nn.Module, call: Call) -> Tensor:
    """What a normalisation's scale is multiplied with; by name, since some scale by 1 + weight."""
    value, rest, named = call
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    parameters = dict(module.named_parameters(recurse=False))
    nothing = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    ones = {**nothing, "weight": torch.ones_like(parameters["weight"])}
    scaled, unscaled = (torch.func.functional_call(module, values, (wide, *rest), named) for values in (ones, nothing))
    difference: Tensor = scaled - unscaled
    return difference


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, value: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padding: list[int] = module._reversed_padding_repeated_twice
    return functional.pad(value, padding, mode=mode) if any(padding) else value


def _convolved(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, value: Tensor, examples: int, projector: TwoSided
) -> Float[Tensor, "B T S"]:
    """P_i x_t at every position: the input convolved with the rows of P_i."""
    window = module.weight.shape[1:]
    matrix = projector.input
    filters = torch.eye(window.numel(), device=value.device) if matrix is None else matrix
    convolved = CONVOLUTIONS[len(window) - 1](
        _padded(module, value),
        filters.to(value.dtype).reshape(-1, *window),
        stride=module.stride,
        dilation=module.dilation,
    )
    return _channels_last(module, convolved, examples)


def _convolution_gradient(module: nn.Module, call: Call, gradient: Tensor, examples: int) -> Tensor:
    """The weight's gradient of every example, which autograd's own function sums over the m rows of one example."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    padded = _padded(module, call[0].to(gradient.dtype))
    weight = module.weight.to(gradient.dtype)
    dimensions = weight.dim() - 2
    rows = len(padded) // examples
    found = [
        torch.ops.aten.convolution_backward(
            gradient[example * rows : (example + 1) * rows].contiguous(),
            padded[example * rows : (example + 1) * rows],
            weight,
            None,
            module.stride,
            [0] * dimensions,
            module.dilation,
            False,
            [0] * dimensions,
            module.groups,
            [False, True, False],
        )[1].flatten(1)
        for example in range(examples)
    ]
    return torch.stack(found)
