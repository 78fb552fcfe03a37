"""What a run's names stand for: kinds looked up in the dicts of their layers, devices, and the groups of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradstore.adapters import ADAPTERS, Adapter
from gradstore.errors import SpecError
from gradstore.groups import Partition, partition
from gradstore.spec import RunSpec, resolve_kind

if TYPE_CHECKING:
    from torch import nn

    from gradstore.numerics.kernel import Kernel
    from gradstore.numerics.projection import Projection


def make_adapter(spec: RunSpec) -> Adapter:
    """Make the adapter that [model] names.

    Raises
    ------
    SpecError
        If there is no adapter of that name.
    """
    if spec.model.adapter not in ADAPTERS:
        raise SpecError(f"model.adapter: found {spec.model.adapter!r}; accepted: {', '.join(sorted(ADAPTERS))}.")
    return ADAPTERS[spec.model.adapter](spec.model, spec.data, spec.run.seed)


def resolve_projection(spec: RunSpec) -> Projection:
    """Make the projection that [features] names, with its options checked."""
    from gradstore.numerics.projection import PROJECTIONS

    options = dict(spec.features.projection)
    kind = options.pop("kind", None)
    if kind is None:
        raise SpecError(f"features.projection.kind: is missing; accepted: {', '.join(sorted(PROJECTIONS))}.")
    return resolve_kind(PROJECTIONS, str(kind), options, "features.projection")


def resolve_kernel(spec: RunSpec) -> Kernel:
    """Make the kernel that [kernel] names, with its options checked."""
    from gradstore.numerics.kernel import KERNELS

    return resolve_kind(KERNELS, spec.kernel.kind, spec.kernel.options, "kernel")


def resolve_device(spec: RunSpec) -> str:
    """Return the device that features are computed on: as declared, else CUDA where this process sees it."""
    if spec.cluster.device != "auto":
        return spec.cluster.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Names and shapes of a model.

    Attributes
    ----------
    partition
        Its groups.
    outputs
        Width of its output: the vocabulary of a language model.
    largest_tensor
        Entries of its largest parameter.
    """

    partition: Partition
    outputs: int
    largest_tensor: int


def model_shape(adapter: Adapter, model: nn.Module, spec: RunSpec) -> ModelShape:
    """Partition a model's parameters into groups by the rule of [features.groups]."""
    from gradstore.numerics.gradients import supported_layers

    layers, heads = supported_layers(model), adapter.output_heads(model)
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    rule = spec.features.groups
    groups = partition(
        layers,
        parameters,
        rule=rule.rule,
        include=rule.include,
        exclude=rule.exclude,
        heads=() if rule.output_head else heads,
    )
    outputs = max((layer.out_features for layer in layers if layer.name in heads), default=0)
    return ModelShape(partition=groups, outputs=outputs, largest_tensor=max(parameters.values()))
