"""No projection: the gradient itself."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.groups import ParameterGroup, Part
from gradstore.numerics.projection.protocol import Matrices, Placed, WholeGradient, outer_sum, side_by_side


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The raw gradient of the group, flattened row by row, part after part: right for LoRA factors and small groups."""

    kind: ClassVar[str] = "identity"
    needs_matrices: ClassVar[bool] = False

    def width(self, group: ParameterGroup) -> int:
        """Number of parameters of the group."""
        return group.parameters

    def shape(self, part: Part) -> None:
        """None: of a gradient that is stored whole no smaller covariances exist."""

    def projectors(
        self, group: ParameterGroup, *, seed: int, device: torch.device, matrices: Matrices | None = None
    ) -> tuple[Placed, ...]:
        """One projector per part; nothing is drawn."""
        return side_by_side(
            [IdentityProjector((part.out_features, part.in_features)) for part in group.parts],
            [part.size for part in group.parts],
        )


class IdentityProjector(WholeGradient):
    """`Identity` for one part."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape

    def combine(self, left: Tensor, right: Tensor) -> Float[Tensor, "B K"]:
        """sum_t left_t right_t^T, flattened row by row."""
        return self.whole(outer_sum(left, right, self._shape))

    def whole(self, gradient_BOI: Float[Tensor, "B O I"]) -> Float[Tensor, "B O*I"]:
        """The gradient, flattened row by row."""
        return gradient_BOI.to(torch.promote_types(gradient_BOI.dtype, torch.float32)).flatten(1)
