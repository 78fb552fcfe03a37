"""Per-example gradients of every parameter group, already projected, from one forward and one backward pass.

Nobody needs weight gradients: every parameter is frozen, so the backward pass computes input gradients only, and of
each layer's input only the projected part is kept. This is the floor of what the work costs (measurements.md: 0.73 of
an ordinary forward and backward pass).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradstore.errors import DataError, SpecError
from gradstore.groups import Layer, ParameterGroup
from gradstore.numerics.projection import Projection, Projector


def supported_layers(model: nn.Module) -> list[Layer]:
    """The modules whose weight gradients can be taken, in the order of the model; works on the meta device.

    These are every ``nn.Linear`` and transformers' ``Conv1D``, with their canonical [out, in] shapes. Of modules that
    share one weight the first is listed: its group takes the gradients of all of them.

    Raises
    ------
    SpecError
        If the model itself is such a layer, so that the layer has no name.
    """
    layers, weights = [], set()
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None or id(_weight(module)) in weights:
            continue
        if not name:
            raise SpecError(
                f"model: it is a bare {kind}, so its layer has no name. Wrap it, for instance in torch.nn.Sequential."
            )
        weights.add(id(_weight(module)))
        out_features, in_features = _canonical_shape(module)
        layers.append(Layer(name=name, kind=kind, out_features=out_features, in_features=in_features))
    return layers


class FeatureExtractor:
    r"""Features of a batch: per-example gradients of an output function, projected, for every parameter group.

    For a group's layer y = W x the feature of example b is the projection of sum_t D_bt x_bt^T, where D_bt is the
    gradient of b's output with respect to y_bt (arXiv 2506.05647, eq. 19). Modules that are called several times, and
    modules that share a weight, add up. Biases are not taken.

    Parameters
    ----------
    model
        In evaluation mode. It is left as it was found: parameters are frozen, and hooks installed, during a call only.
    groups
        Parameter groups of that model (see `supported_layers` and `gradstore.groups.partition`).
    projection
        What becomes of each gradient.
    seed
        The run's seed, from which the projection's matrices are drawn.

    Raises
    ------
    SpecError
        If the model is in training mode, a group names no supported layer of the model or one of another shape, or a
        group's weight is also used by a module whose gradient is not taken.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[ParameterGroup], projection: Projection, *, seed: int
    ) -> None:
        _refuse_training_mode(model)
        self._model = model
        self._modules = _modules_of_groups(model, groups)
        self._widths = {group.name: projection.width(group) for group in groups}
        self._projectors = {
            group.name: projection.projector(group, seed=seed, device=_weight(self._modules[group.name][0]).device)
            for group in groups
        }

    def __call__(
        self, output: Callable[[], Float[Tensor, " B"]]
    ) -> tuple[Float[Tensor, " B"], dict[str, Float[Tensor, "B _"]]]:
        """Run the model once forward and once backward.

        Parameters
        ----------
        output
            Calls the model on a batch and returns one number per example. The examples are the first dimension of
            every layer's input. Half precision is the caller's choice, by ``torch.autocast`` around this call; products
            over positions are accumulated in float32 all the same.

        Returns
        -------
        outputs
            [B], detached, at least float32.
        features
            [B, k_j] by group name, float32 (float64 of a float64 model); zeros where the output does not depend on the
            group.

        Raises
        ------
        SpecError
            If the model is in training mode, or the output is not one number per example.
        DataError
            If a group's module took no part in the forward pass, or was given its input without a batch dimension.
        """
        _refuse_training_mode(self._model)
        recording = _Recording()
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_frozen(self._model))
            for name, modules in self._modules.items():
                hook = recording.hook(name, self._projectors[name])
                for module in modules:
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            output_B = output()
            recording.check(output_B, self._modules)
            # Tensor hooks run inside the backward pass and would inherit autocast, which rounds their float32 sums.
            with torch.autocast(output_B.device.type, enabled=False):
                torch.autograd.backward(output_B.sum())
        output_B = output_B.detach().to(torch.promote_types(output_B.dtype, torch.float32))
        features = {
            name: recording.features.get(name, output_B.new_zeros(len(output_B), self._widths[name]))
            for name in self._modules
        }
        return output_B, features


class _Recording:
    """What the hooks see during one forward and backward pass."""

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}
        self._input_shapes: dict[str, torch.Size] = {}

    def hook(self, name: str, projector: Projector) -> Callable[..., Tensor | None]:
        """A forward hook that keeps a group's input and waits for its output gradient."""

        def keep_input(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            value = args[0] if args else kwargs["input" if isinstance(module, nn.Linear) else "x"]
            self._input_shapes[name] = value.shape
            if value.dim() < 2:
                return None  # refused by `check`, where the number of examples is known
            # The output's precision is the layer's own, whether the caller chose it by autocast or by the weights.
            dtype = _working_dtype(output.dtype)
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                kept = projector.keep(_with_positions(value).to(dtype))

            def add_features(gradient: Tensor) -> None:
                found = projector.project(_with_positions(gradient).to(dtype), kept)
                earlier = self.features.get(name)
                self.features[name] = found if earlier is None else earlier + found

            # Every parameter is frozen, so the graph starts at the first of the groups' layers, and nothing before it
            # is differentiated. The clone, no leaf, allows what follows to work in place.
            tapped = output if output.requires_grad else output.detach().requires_grad_().clone()
            tapped.register_hook(add_features)  # type: ignore[no-untyped-call]
            return tapped

        return keep_input

    def check(self, output_B: Tensor, modules: Mapping[str, Sequence[nn.Module]]) -> None:
        """Refuse what would give wrong features."""
        if output_B.dim() != 1 or not output_B.is_floating_point():
            raise SpecError(
                f"output function: found {output_B.dtype} of shape {tuple(output_B.shape)}; it must return one "
                "floating-point number per example, shape (examples,)."
            )
        if unseen := [name for name in modules if name not in self._input_shapes]:
            raise DataError(
                f"{_listed(unseen)}: took part in no forward pass of this batch, so there is no gradient to take. "
                "Leave out what the model does not use with features.groups.exclude."
            )
        for name, shape in self._input_shapes.items():
            if len(shape) < 2 or shape[0] != len(output_B):
                raise DataError(
                    f"{name}: its input has shape {tuple(shape)}, but there are {len(output_B)} examples. The examples "
                    "must be its first dimension; a module that mixes them has no per-example gradient. "
                    "Leave it out with features.groups.exclude."
                )
        if not output_B.requires_grad:
            raise SpecError("output function: its result does not depend on any parameter group. Was it detached?")


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "Linear"
    # By name, so that transformers need not be imported, nor installed, for models that are not its own.
    names = {(cls.__module__, cls.__name__) for cls in type(module).__mro__}
    return "Conv1D" if ("transformers.pytorch_utils", "Conv1D") in names else None


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor), f"{type(module).__name__} is no supported layer"
    return weight


def _canonical_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a supported module; Conv1D stores its weight as [in, out]."""
    rows, columns = _weight(module).shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _modules_of_groups(model: nn.Module, groups: Sequence[ParameterGroup]) -> dict[str, list[nn.Module]]:
    """For each group the modules that use its weight: one, unless weights are tied."""
    modules = dict(model.named_modules())
    users: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    found = {}
    for group in groups:
        assert len(group.layers) == 1, f"{group.name}: groups of several layers are not made by any rule yet"
        module = modules.get(group.layers[0])
        if module is None or _kind(module) is None:
            raise SpecError(f"{group.name}: the model has no supported layer of that name. Make the groups from it.")
        if _canonical_shape(module) != (group.out_features, group.in_features):
            raise SpecError(
                f"{group.name}: the model's layer is {_canonical_shape(module)}, the group's "
                f"{(group.out_features, group.in_features)} [out, in]. Make the groups from this model."
            )
        tied = users[id(_weight(module))]
        if others := [name for name in tied if _kind(modules[name]) != _kind(module)]:
            raise SpecError(
                f"{group.name}: its weight is also that of {_listed(others)} "
                f"({type(modules[others[0]]).__name__}), whose gradient is not taken in this version, so the group's "
                "would be a part only. Leave it out (features.groups.output_head = false, or exclude)."
            )
        found[group.name] = [modules[name] for name in tied]
    return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Freeze every parameter, and afterwards those that were not frozen before, thaw."""
    thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in thawed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


def _refuse_training_mode(model: nn.Module) -> None:
    training = [name or type(model).__name__ for name, module in model.named_modules() if module.training]
    if training:
        raise SpecError(
            f"{_listed(training)}: in training mode, where dropout and batch statistics change every gradient. "
            "Call model.eval() first."
        )


def _with_positions(value: Tensor) -> Float[Tensor, "B T F"]:
    """[B, ..., features] as [B, T, features], with T = 1 for a layer that has no positions."""
    return value.reshape(value.shape[0], -1, value.shape[-1])


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 stays, for its speed and range; float16 would overflow in the products, so it becomes float32."""
    return torch.float32 if dtype == torch.float16 else dtype


def _listed(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
