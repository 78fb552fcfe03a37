"""Which parameters of a model have a rule for their gradient, under which names, and why the others have none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import ParametrizationList

from gradstore.errors import SpecError
from gradstore.groups import ModelParameters, Parameter
from gradstore.numerics.gradients.attention import attention_parts
from gradstore.numerics.gradients.rules import (
    OneByOne,
    TensorRule,
    canonical,
    convolution_rules,
    embedding_rules,
    linear_rules,
    norm_rules,
    other_rules,
)

NORMS_OF_CHANNELS = (nn.GroupNorm, _BatchNorm, _InstanceNorm)
WITH_FACTORS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
NORMS = (nn.LayerNorm, nn.RMSNorm)
OF_TORCH = (*WITH_FACTORS, *NORMS, *NORMS_OF_CHANNELS, nn.SyncBatchNorm)
# Norms of model families are classes of their own, with torch's parameters.
NORM_NAMES = ("LayerNorm", "RMSNorm")
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
FUSED = "torch.nn.MultiheadAttention computes with it in one function; use a model whose projections are layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A module that holds a parameter tensor, under one of its names."""

    module_name: str
    module: nn.Module
    attribute: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Supported:
    """A parameter tensor whose gradient can be taken: all modules that use it, and its rule in each."""

    parameter: Parameter
    tensor: nn.Parameter
    uses: tuple[tuple[Use, TensorRule], ...]


def model_parameters(model: nn.Module, heads: Sequence[str] = ()) -> ModelParameters:
    """What a partition needs to know of a model; works on the meta device.

    Parameters
    ----------
    model
        Whose parameters are to be partitioned.
    heads
        Names of the modules that map hidden states to outputs.

    Raises
    ------
    SpecError
        If the model itself is a layer, so that its parameters belong to no named module.
    """
    supported, unsupported = find_parameters(model)
    found = [item.parameter for item in supported]
    tensors = dict(model.named_parameters())
    # What the model has frozen is left out by choice, whatever holds it.
    for name in [name for name in unsupported if not tensors[name].requires_grad]:
        del unsupported[name]
        found.append(_frozen(name, tensors[name]))
    order = {name: place for place, name in enumerate(tensors)}
    found.sort(key=lambda item: order[item.name])
    return ModelParameters(
        supported=tuple(found),
        unsupported=unsupported,
        sizes={name: tensor.numel() for name, tensor in tensors.items()},
        output_heads=tuple(heads),
        attention=attention_parts(model, {item.name: item for item in found}),
    )


def find_parameters(model: nn.Module) -> tuple[list[Supported], dict[str, str]]:
    """Parameters whose gradient can be taken, in the order of the model, and why it cannot be of each of the others.

    Raises
    ------
    SpecError
        If the model itself is a layer.
    """
    if not any(True for _ in model.children()) and any(True for _ in model.parameters()):
        raise SpecError(
            f"model: it is a bare {type(model).__name__}, so its parameters belong to no named layer. Wrap it, for "
            "instance in torch.nn.Sequential."
        )
    rules: dict[nn.Module, Mapping[str, TensorRule] | str] = {}
    uses: dict[int, list[Use]] = {}
    fused = {
        child for module in model.modules() if isinstance(module, nn.MultiheadAttention) for child in module.modules()
    }
    for name, module in model.named_modules():
        own = list(module.named_parameters(recurse=False, remove_duplicate=False))
        for attribute, tensor in own:
            uses.setdefault(id(tensor), []).append(Use(module_name=name, module=module, attribute=attribute))
        if own:
            rules[module] = FUSED if module in fused else module_rules(module)
    supported: list[Supported] = []
    unsupported: dict[str, str] = {}
    for name, tensor in model.named_parameters():
        item = _supported(name, tensor, uses[id(tensor)], rules)
        if isinstance(item, str):
            unsupported[name] = item
        else:
            supported.append(item)
    return supported, unsupported


def module_rules(module: nn.Module) -> Mapping[str, TensorRule] | str:
    """The rules of a module's own parameters by their attributes, or why there are none."""
    reasons = (why for refuses, why in REFUSED if refuses(module))
    reason = next(reasons, None)
    if reason is not None:
        return reason.format(kind=type(module).__name__)
    found = next(rules(module) for fits, rules in RULES if fits(module))
    if not _computes_something_else(module):
        return found
    # Such as a convolution that pads by itself, or a norm of channels: what it computes is known to autograd alone.
    return {
        name: TensorRule(category=rule.category, shape=rule.shape, rule_for=lambda projector: OneByOne())
        for name, rule in found.items()
    }


def canonical_matrices(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the shapes of a model's parameters as canonical matrices [out, in], by the parameters' names."""
    modules = dict(model.named_modules())
    return {name: canonical_of(modules[name.rpartition(".")[0]], tensor) for name, tensor in tensors.items()}


def canonical_of(module: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of the shape of one of a module's parameters as a canonical matrix."""
    if not isinstance(module, NORMS_OF_CHANNELS) and _is_norm(module):
        return tensor.reshape(-1, 1)
    transposed = _is_conv1d_of_transformers(module)
    return canonical(tensor, transposed=transposed, folded=not _is_known(module))


def _conv1d_of_transformers(module: nn.Module) -> type[nn.Module] | None:
    # By name, so that transformers need not be imported, nor installed, for models that are not its own.
    names = ("transformers.pytorch_utils", "Conv1D")
    return next((cls for cls in type(module).__mro__ if (cls.__module__, cls.__name__) == names), None)


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    return _conv1d_of_transformers(module) is not None


def _computes_something_else(module: nn.Module) -> bool:
    """Whether a module computes something else than its base class in torch, or its name, says."""
    kinds: list[type[nn.Module]] = [kind for kind in OF_TORCH if isinstance(module, kind)]
    kinds += filter(None, [_conv1d_of_transformers(module)])
    if not kinds:
        return _is_norm(module) and not _scales_the_last_dimensions(module)
    # Of the object, not of its class: accelerate, for one, gives modules functions of its own.
    forward = getattr(module.forward, "__func__", None)
    return all(forward is not kind.forward for kind in kinds)


def _scales_the_last_dimensions(module: nn.Module) -> bool:
    """Whether a norm by its name multiplies the last dimensions with its weight, and does no more; found by trying."""
    like = next(module.parameters(recurse=False))
    if like.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    # Some take grids otherwise than sequences.
    tried = [_scales_the_last(module, like, places, generator) for places in ((2, 3), (2, 3, 4))]
    return True in tried and False not in tried


def _scales_the_last(module: nn.Module, like: Tensor, places: Sequence[int], generator: torch.Generator) -> bool | None:
    """The same of random numbers at some places; None if the module does not take them."""
    parameters = dict(module.named_parameters(recurse=False))
    values = torch.randn(*places, *like.shape, generator=generator).to(like)
    given = {name: torch.randn(tensor.shape, generator=generator).to(like) for name, tensor in parameters.items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    ones = {name: torch.full_like(tensor, float(name == "weight")) for name, tensor in parameters.items()}
    try:
        with torch.no_grad():
            found, scaled, unscaled = (
                torch.func.functional_call(module, tensors, (values,)).float() for tensors in (given, ones, zeros)
            )
    # Of another number of dimensions, for instance, or called with more than one tensor.
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    expected = unscaled + (scaled - unscaled) * given.get("weight", 0.0) + given.get("bias", 0.0)
    return found.shape == expected.shape and bool((found - expected).norm() <= 1e-2 * expected.norm())


def _is_norm(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_parameters(recurse=False)}
    return isinstance(module, NORMS) or (type(module).__name__.endswith(NORM_NAMES) and names <= {"weight", "bias"})


def _is_quantised(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    shape = module.out_features, module.in_features
    return not module.weight.is_floating_point() or module.weight.shape != shape


def _mixes_rows_of_batches(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq)


def _holds_layers(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.parameters())


def _transposed_shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1], weight.shape[0]


def _is_known(module: nn.Module) -> bool:
    return any(fits(module) for fits, _ in RULES[:-1])


# The first that fits counts; what no other fits is a module of unknown kind.
RULES: tuple[tuple[Callable[[nn.Module], bool], Callable[[nn.Module], Mapping[str, TensorRule]]], ...] = (
    (
        lambda module: isinstance(module, nn.Linear),
        lambda module: linear_rules(module, (module.out_features, module.in_features)),  # type: ignore[arg-type]
    ),
    (_is_conv1d_of_transformers, lambda module: linear_rules(module, _transposed_shape(module))),
    (lambda module: isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d), convolution_rules),
    (lambda module: isinstance(module, nn.Embedding), embedding_rules),
    (lambda module: isinstance(module, NORMS_OF_CHANNELS), lambda module: norm_rules(module, channels_first=True)),
    (_is_norm, lambda module: norm_rules(module, channels_first=False)),
    (lambda module: True, other_rules),
)
REFUSED: tuple[tuple[Callable[[nn.Module], bool], str], ...] = (
    (_is_quantised, "{kind} holds its weight quantised"),
    (_mixes_rows_of_batches, "an Embedding with max_norm or scale_grad_by_freq: no gradient of one example alone"),
    (lambda module: isinstance(module, ParametrizationList), "parametrised (torch.nn.utils.parametrize)"),
    (lambda module: isinstance(module, RECURRENT), "{kind} is recurrent"),
    (
        lambda module: not _is_known(module) and _holds_layers(module),
        "held by {kind} beside layers of its own, not by a layer",
    ),
    (
        lambda module: not _is_known(module) and type(module).forward is nn.Module.forward,
        "held by {kind}, which computes nothing",
    ),
)


def _supported(
    name: str,
    tensor: nn.Parameter,
    uses: Sequence[Use],
    rules: Mapping[nn.Module, Mapping[str, TensorRule] | str],
) -> Supported | str:
    found = []
    for use in uses:
        known = rules[use.module]
        if isinstance(known, str):
            return known if len(uses) == 1 else f"also in {use.module_name}: {known}"
        if use.attribute not in known:
            return f"{type(use.module).__name__} has no rule for its {use.attribute}"
        found.append((use, known[use.attribute]))
    first, rule = found[0]
    turned = _is_conv1d_of_transformers(first.module)
    differing = (
        use for use, another in found if another.shape != rule.shape or _is_conv1d_of_transformers(use.module) != turned
    )
    if other := next(differing, None):
        return f"tied to {other.module_name}, which uses it transposed"
    parameter = Parameter(
        name=name,
        module=name.rpartition(".")[0],
        kind=type(first.module).__name__,
        # The head's weight, where an embedding shares it, is an embedding still.
        category="embedding" if any(other.category == "embedding" for _, other in found) else rule.category,
        out_features=rule.shape[0],
        in_features=rule.shape[1],
        frozen=not tensor.requires_grad,
    )
    return Supported(parameter=parameter, tensor=tensor, uses=tuple(found))


def _frozen(name: str, tensor: Tensor) -> Parameter:
    """A frozen parameter without a rule; its shape does not matter, since no group takes it."""
    return Parameter(
        name=name,
        module=name.rpartition(".")[0],
        kind="frozen",
        category="matrix",
        out_features=tensor.numel(),
        in_features=1,
        frozen=True,
    )
