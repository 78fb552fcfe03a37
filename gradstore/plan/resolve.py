"""What a run's names stand for: kinds looked up in the dicts of their layers, devices, and the groups of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradstore.adapters import ADAPTERS, Adapter
from gradstore.adapters.models.modules import is_function
from gradstore.adapters.own.adapter import OwnAdapter
from gradstore.errors import SpecError
from gradstore.groups import Grouping, Partition, partition
from gradstore.spec import RunSpec, resolve_kind

if TYPE_CHECKING:
    from torch import nn

    from gradstore.numerics.kernel import Kernel
    from gradstore.numerics.projection import Projection
    from gradstore.store.examples import Example


def make_adapter(spec: RunSpec, member: str | None = None) -> Adapter:
    """Make the adapter that [model] names, for one of its members or, if none is named, the last: the final checkpoint.

    Raises
    ------
    SpecError
        If there is no adapter of that name.
    """
    model = spec.model.of_member(member or [*spec.model.etas][-1])
    if is_function(model.adapter):
        return OwnAdapter(model, spec.data, spec.run.seed)
    if model.adapter not in ADAPTERS:
        raise SpecError(
            f"model.adapter: found {model.adapter!r}; accepted: {', '.join(sorted(ADAPTERS))}, or a function of your own, "
            "package.module:function."
        )
    return ADAPTERS[model.adapter](model, spec.data, spec.run.seed)


def resolve_projection(spec: RunSpec) -> Projection:
    """Make the projection that [features] names, with its options checked."""
    from gradstore.numerics.projection import PROJECTIONS

    options = dict(spec.features.projection)
    kind = options.pop("kind", None)
    if kind is None:
        raise SpecError(f"features.projection.kind: is missing; accepted: {', '.join(sorted(PROJECTIONS))}.")
    return resolve_kind(PROJECTIONS, str(kind), options, "features.projection")


def resolve_kernel(spec: RunSpec) -> Kernel:
    """Make the kernel that [kernel] names, with its options checked; of a damping sweep the first.

    All of a sweep have the same spectra; to apply one, ask with one of `RunSpec.sweep`.
    """
    from gradstore.numerics.kernel import KERNELS

    kernels = [resolve_kind(KERNELS, swept.kernel.kind, swept.kernel.options, "kernel") for swept in spec.sweep()]
    return kernels[0]


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
    activations
        Numbers that all of its modules put out for one token of an example, or None where they were not counted.
    """

    partition: Partition
    outputs: int
    largest_tensor: int
    activations: float | None


def model_shape(adapter: Adapter, model: nn.Module, spec: RunSpec, example: Example | None = None) -> ModelShape:
    """Partition a model's parameters into groups by the rule of [features.groups].

    With an example, on the meta device, what its modules put out is counted: a convolution's positions are known to nobody
    else.

    Raises
    ------
    SpecError
        If no group is left, or more is left out than is accepted without being asked for.
    """
    from gradstore.numerics.gradients import model_parameters

    heads = adapter.output_heads(model)
    parameters = model_parameters(model, heads)
    widths = (item.out_features for item in parameters.supported if item.module in heads)
    return ModelShape(
        partition=partition(parameters, Grouping(**spec.features.groups.model_dump())),
        outputs=max(widths, default=0),
        largest_tensor=max(parameters.sizes.values()),
        activations=None if example is None else _count_activations(adapter, model, example),
    )


def _count_activations(adapter: Adapter, model: nn.Module, example: Example) -> float | None:
    """Numbers per token that leaf modules put out in one forward pass of shapes, or None if it takes more than shapes."""
    import torch

    total = 0

    def count(module: nn.Module, args: object, output: object) -> None:
        nonlocal total
        total += output.numel() if isinstance(output, torch.Tensor) else 0

    hooks = [module.register_forward_hook(count) for module in model.modules() if not [*module.children()]]
    try:
        with torch.no_grad():
            adapter.outputs(model, [example])
    # A user's model may look at values, which tensors without storage do not have, and fail in any way.
    except Exception:
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return total / example.size
