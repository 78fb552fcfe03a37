"""Gradients of single examples by plain autograd, beside the features that are made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from gradstore.numerics.gradients import Extracted
    from gradstore.numerics.projection import Matrices, Projection
    from gradstore.stages.loading import Loaded
    from gradstore.store.examples import Example

# A group that has less than this part of the whole gradient is measured against that part: its rounding is that of what
# cancels in it, as in the bias of attention's keys.
LEAST_PART: Final = 1e-2
ADAM: Final = " (Adam's direction)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """One example, in float32 and on the CPU.

    Attributes
    ----------
    gradient
        By parameter, autograd's gradient as the canonical matrix [O, I].
    features
        By group, what the extractor gives [k], as a vector of ordinary inner products.
    errors
        By group, the distance of its features from the projection of ``gradient``, relative to its norm.
    """

    gradient: Mapping[str, Tensor]
    features: Mapping[str, np.ndarray]
    errors: Mapping[str, float]

    def exact_product(self, other: Comparison) -> float:
        """<gradient, gradient'>, summed over parameters."""
        return sum(float(value.flatten() @ other.gradient[name].flatten()) for name, value in self.gradient.items())

    def feature_product(self, other: Comparison) -> float:
        """<feature, feature'>, summed over groups."""
        return sum(float(value @ other.features[name]) for name, value in self.features.items())


class ExactGradients:
    """Gradients of the parameters of some groups, by ``torch.autograd.grad`` of one example's output in float32.

    Nothing of the extractor takes part in them but the names and shapes of parameters.
    """

    def __init__(self, loaded: Loaded, projection: Projection, *, seed: int, matrices: Matrices | None) -> None:
        from gradstore.numerics.gradients import model_parameters

        self._loaded = loaded
        self._groups = loaded.groups
        self._projection = projection
        device = next(loaded.model.parameters()).device
        self._placed = {
            group.name: projection.projectors(group, seed=seed, device=device, matrices=matrices)
            for group in loaded.groups
        }
        wanted = {part.parameter for group in loaded.groups for part in group.parts}
        self._parameters = [item for item in model_parameters(loaded.model).supported if item.name in wanted]

    @property
    def bytes(self) -> int:
        """What one gradient takes."""
        return 4 * sum(item.size for item in self._parameters)

    def compare(self, example: Example) -> Comparison:
        """Take the gradient and the features of one example."""
        loaded = self._loaded
        gradient = self._gradient(example)
        found = self._found(loaded.extractor, example)
        errors = _errors(_in_numpy(found), _in_numpy(self._expected(gradient)))
        if loaded.divisors is not None:
            # The features of training examples are then of other vectors than those of queries.
            steps = {name: value / loaded.divisors[name].to(value.device) for name, value in gradient.items()}
            of_steps = self._found(loaded.training_extractor, example), self._expected(steps)
            errors |= {name + ADAM: error for name, error in _errors(*map(_in_numpy, of_steps)).items()}
        return Comparison(
            gradient={name: value.cpu() for name, value in gradient.items()},
            features=self._stored(found),
            errors=errors,
        )

    def _gradient(self, example: Example) -> dict[str, Tensor]:
        import torch

        model = self._loaded.model
        named = dict(model.named_parameters())
        tensors = [named[item.name] for item in self._parameters]
        with torch.enable_grad(), thawed(tensors):
            output = self._loaded.outputs(model, [example], exactly=True)
            found = torch.autograd.grad(output.sum(), tensors, allow_unused=True)
        gradient = {}
        for value, tensor, item in zip(found, tensors, self._parameters, strict=True):
            dense = torch.zeros_like(tensor) if value is None else value
            # Only transformers' Conv1D stores [in, out]; every other canonical matrix is the same numbers in their order.
            transposed = type(model.get_submodule(item.module)).__name__ == "Conv1D" and dense.dim() == 2
            gradient[item.name] = (dense.T if transposed else dense).reshape(item.out_features, item.in_features)
        return gradient

    def _found(self, extractor: Callable[..., Extracted], example: Example) -> Mapping[str, Tensor]:
        """Features of one example before they are factorised, in float32: the rounding of others is another matter."""
        loaded = self._loaded
        return extractor(
            lambda: loaded.outputs(loaded.model, [example], exactly=True), examples=1, finished=False
        ).features

    def _expected(self, gradient: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same of a gradient, each part of a group projected whole."""
        found = {}
        for group in self._groups:
            placed = self._placed[group.name]
            width = max(place.start + place.width for place in placed)
            features_1K = gradient[group.parts[0].parameter].new_zeros(1, width)
            for part, place in zip(group.parts, placed, strict=True):
                matrix_OI = gradient[part.parameter][slice(*part.rows), slice(*part.columns)]
                features_1K[:, place.start : place.start + place.width] += place.projector.whole(matrix_OI[None])
            found[group.name] = features_1K
        return found

    def _stored(self, features: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """What features stand for as they are stored: of rank-c factors the matrices, which are of a lower rank then."""
        from gradstore.numerics.factors import expand
        from gradstore.numerics.projection import Lorif

        projection = self._projection
        if not isinstance(projection, Lorif):
            return _in_numpy(features)
        found = {}
        for group in self._groups:
            factors_1K = projection.finished(group, features[group.name]).cpu().numpy()
            shapes = [projection.shape(part) for part in group.parts]
            found[group.name] = expand(factors_1K, shapes, [projection.factors_of(part) for part in group.parts])[0]
        return found


def _in_numpy(features: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: rows.cpu().numpy()[0] for name, rows in features.items()}


@contextmanager
def thawed(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Have some parameters take gradients; afterwards they are as they were."""
    before = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor, needed in zip(tensors, before, strict=True):
            tensor.requires_grad_(needed)


def _errors(features: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, float]:
    norms = {name: float(np.linalg.norm(value)) for name, value in expected.items()}
    least = LEAST_PART * math.hypot(*norms.values())
    return {
        name: float(np.linalg.norm(features[name] - value)) / (max(norms[name], least) or 1.0)
        for name, value in expected.items()
    }
