"""Per-example gradients of every parameter group, already projected, from one forward and one backward pass.

Nobody needs weight gradients: every parameter is frozen, so the backward pass computes input gradients only, and of
each layer's input only the projected part is kept. This is the floor of what the work costs (measurements.md: 0.73 of
an ordinary forward and backward pass).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradstore.errors import SpecError
from gradstore.groups import ParameterGroup, Part
from gradstore.numerics.gradients.layers import Supported, Use, canonical_of, find_parameters
from gradstore.numerics.gradients.recording import Recording, Target, Watched
from gradstore.numerics.gradients.rules import Rule
from gradstore.numerics.projection import AdamProjector, Finishing, Matrices, Projection, Projector


class Covariance(NamedTuple):
    """Sums over the positions of a batch at which a part's output gradient is not zero: what EKFAC needs of it."""

    left: Tensor
    """sum_t (P_o D_t)(P_o D_t)^T [r_o, r_o]."""
    right: Tensor
    """sum_t (P_i x_t)(P_i x_t)^T [r_i, r_i]."""
    positions: int
    """How many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extracted:
    """What a call of `FeatureExtractor` gives.

    Attributes
    ----------
    outputs
        [B], detached, at least float32.
    features
        [B, k_j] by group name, float32 (float64 of a float64 model); zeros where the output does not depend on the group.
    covariances
        By `Part.key`, where asked for and where the projection is two-sided and the gradient has factors.
    """

    outputs: Tensor
    features: Mapping[str, Tensor]
    covariances: Mapping[str, Covariance] = field(default_factory=dict)


class FeatureExtractor:
    r"""Features of a batch: per-example gradients of an output function, projected, for every parameter group.

    For a linear layer y = W x the feature of example b is the projection of sum_t D_bt x_bt^T, where D_bt is the gradient
    of b's output with respect to y_bt (arXiv 2506.05647, eq. 19); `rules` has it for every other kind of layer. Modules
    that are called several times, and modules that share a tensor, add up.

    Parameters
    ----------
    model
        In evaluation mode. It is left as it was found: parameters are frozen, and hooks installed, during a call only.
    groups
        Parameter groups of that model (see `model_parameters` and `gradstore.groups.partition`).
    projection
        What becomes of each gradient.
    seed
        The run's seed, from which the projection's matrices are drawn.
    matrices
        Of a projection whose matrices come from data, those.
    divisors
        By parameter, the root of Adam's second moment plus epsilon as a canonical matrix: features are then of the
        direction of Adam's step (`AdamProjector`).

    Raises
    ------
    SpecError
        If the model is in training mode, a group has a part that is no parameter of the model, or of another shape, or
        one whose gradient cannot be taken.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ParameterGroup],
        projection: Projection,
        *,
        seed: int,
        matrices: Matrices | None = None,
        divisors: Mapping[str, Tensor] | None = None,
    ) -> None:
        _refuse_training_mode(model)
        self._model = model
        self._groups = tuple(groups)
        self._finishing = projection if isinstance(projection, Finishing) else None
        summed = projection.width if self._finishing is None else self._finishing.summed_width
        self._widths = {group.name: summed(group) for group in groups}
        supported, unsupported = find_parameters(model)
        found = {item.parameter.name: item for item in supported}
        watched: dict[nn.Module, Watched] = {}
        self._targets: list[tuple[Supported, Target]] = []
        for group in groups:
            parts = [_parameter_of(part, group.name, found, unsupported) for part in group.parts]
            placed = projection.projectors(group, seed=seed, device=_device(parts), matrices=matrices)
            for part, item, place in zip(group.parts, parts, placed, strict=True):
                projector = place.projector
                if divisors is not None:
                    divisor_OI = divisors[part.parameter][slice(*part.rows), slice(*part.columns)]
                    projector = AdamProjector(projector, divisor_OI.to(_device(parts)))
                target = Target(
                    group=group.name,
                    part=part,
                    projector=projector,
                    columns=slice(place.start, place.start + place.width),
                )
                self._targets.append((item, target))
                for use, rule in _rules(item, projector):
                    watched.setdefault(use.module, Watched(name=use.module_name, module=use.module)).add(
                        use.attribute, item, rule, target
                    )
        self._watched = tuple(watched.values())

    def __call__(
        self,
        output: Callable[[], Float[Tensor, " B"]],
        *,
        examples: int,
        covariances: bool = False,
        finished: bool = True,
    ) -> Extracted:
        """Run the model once forward and once backward.

        Parameters
        ----------
        output
            Calls the model on a batch and returns one number per example. The examples are the first dimension of
            every layer's input, each with as many rows of it as any other, one example after the other. Half precision
            is the caller's choice, by ``torch.autocast`` around this call; products over positions are accumulated in
            float32 all the same.
        examples
            B, the examples of the batch.
        covariances
            Whether the covariances of the projected factors are asked for.
        finished
            Whether features that are factors of matrices are those, or the matrices: factors of nearly equal matrices may
            lie far apart.

        Raises
        ------
        SpecError
            If the model is in training mode, or the output is not one number per example.
        DataError
            If a group's module took no part in the forward pass, or was given its input without a batch dimension.
        """
        _refuse_training_mode(self._model)
        recording = Recording(examples=examples, widths=self._widths, covariances=covariances)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_frozen(self._model))
            for watched in self._watched:
                stack.enter_context(recording.watch(watched))
            try:
                output_B = output()
            except (RuntimeError, ValueError, IndexError) as error:
                recording.explain(error)
                raise
            _refuse_other_outputs(output_B, examples)
            # Tensor hooks run inside the backward pass and would inherit autocast, which rounds their float32 sums.
            with torch.autocast(output_B.device.type, enabled=False):
                torch.autograd.backward(output_B.sum())
        # Only now: a reentrant checkpoint shows its layers in the backward pass.
        recording.refuse_unseen(self._watched)
        output_B = output_B.detach().to(torch.promote_types(output_B.dtype, torch.float32))
        return Extracted(
            outputs=output_B,
            features={
                group.name: self._finished(group, recording.features_of(group.name, output_B), finished=finished)
                for group in self._groups
            },
            covariances={part: Covariance(*sums) for part, sums in recording.covariances.items()},
        )

    def by_autograd(self, output: Callable[[], Float[Tensor, " 1"]]) -> Mapping[str, Float[Tensor, "1 K"]]:
        """The features of one example from the gradient that plain autograd computes, whatever the model's modules are.

        It is what the features are to be, before any are factorised; nothing of the rules takes part in it. Each parameter's gradient is dropped as
        soon as it is projected.
        """
        _refuse_training_mode(self._model)
        summed = {name: torch.zeros(1, width) for name, width in self._widths.items()}

        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            for item, target in self._targets:
                if item.tensor is parameter:
                    first, _ = item.uses[0]
                    gradient_1OI = canonical_of(first.module, parameter.grad)[None]
                    rows, columns = slice(*target.part.rows), slice(*target.part.columns)
                    features = target.projector.whole(gradient_1OI[:, rows, columns])
                    summed[target.group] = summed[target.group].to(features)
                    summed[target.group][:, target.columns] += features
            parameter.grad = None

        tensors = list(dict.fromkeys(item.tensor for item, _ in self._targets))
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(_frozen(self._model))
            for tensor in tensors:
                stack.callback(tensor.requires_grad_, False)
                stack.callback(setattr, tensor, "grad", tensor.grad)
                tensor.grad = None
                tensor.requires_grad_(True)
                stack.callback(tensor.register_post_accumulate_grad_hook(add).remove)  # type: ignore[no-untyped-call]
            output_1 = output()
            _refuse_other_outputs(output_1, 1)
            torch.autograd.backward(output_1.sum())
        return summed

    def _finished(self, group: ParameterGroup, summed_BD: Tensor, *, finished: bool) -> Tensor:
        if self._finishing is None or not finished:
            return summed_BD
        return self._finishing.finished(group, summed_BD)


def _rules(item: Supported, projector: Projector) -> Iterator[tuple[Use, Rule]]:
    return ((use, rule.rule_for(projector)) for use, rule in item.uses)


def _parameter_of(part: Part, group: str, found: Mapping[str, Supported], unsupported: Mapping[str, str]) -> Supported:
    item = found.get(part.parameter)
    if item is None:
        reason = unsupported.get(part.parameter, "the model has no parameter of that name")
        raise SpecError(f"{group}: {part.parameter}: {reason}. Make the groups from this model.")
    shape = item.parameter.out_features, item.parameter.in_features
    if part.rows[1] > shape[0] or part.columns[1] > shape[1]:
        raise SpecError(
            f"{group}: {part.parameter} is {shape} [out, in], the group has its part {part.key}. "
            "Make the groups from this model."
        )
    return item


def _device(parts: Sequence[Supported]) -> torch.device:
    return parts[0].tensor.device


def _refuse_other_outputs(output_B: Tensor, examples: int) -> None:
    """Refuse what is not one number per example that depends on the model."""
    if output_B.shape != (examples,) or not output_B.is_floating_point():
        raise SpecError(
            f"output function: found {output_B.dtype} of shape {tuple(output_B.shape)}; it must return one "
            f"floating-point number per example, shape ({examples},)."
        )
    if not output_B.requires_grad:
        raise SpecError("output function: its result does not depend on any parameter group. Was it detached?")


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
        more = f" and {len(training) - 3} more" if len(training) > 3 else ""
        raise SpecError(
            f"{', '.join(training[:3])}{more}: in training mode, where dropout and batch statistics change every gradient. "
            "Call model.eval() first."
        )
