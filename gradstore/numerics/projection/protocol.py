"""What a projection is: from a parameter's per-example gradient to the features that are stored.

The gradient of a part of a group is a sum of outer products over positions, G = sum_t left_t right_t^T (for a linear layer
y = W x, left_t = df/dy_t and right_t = x_t: arXiv 2506.05647, eq. 19), or is given whole. A projection that does not need the
sum itself never forms it: a projector is shown the one factor in the forward pass, keeps of it what it needs, and makes
the features when the other arrives in the backward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from gradstore.groups import ParameterGroup, Part

Matrices = Mapping[str, tuple[Tensor, Tensor]]
"""By `Part.key`: (P_o [r_o, O], P_i [r_i, I]), of a projection whose matrices come from data."""


@runtime_checkable
class Projector(Protocol):
    """A projection made ready for one part [O, I] of a group on one device.

    A factor is floating [B, T, O] (or I), or integer [B, T]: the places of the ones of one-hot rows, as an embedding has.
    """

    def left(self, values: Shaped[Tensor, "B T *O"]) -> Tensor:
        """What is kept of the left factor."""
        ...

    def right(self, values: Shaped[Tensor, "B T *I"]) -> Tensor:
        """What is kept of the right factor."""
        ...

    def combine(self, left: Tensor, right: Tensor) -> Float[Tensor, "B K"]:
        """Features [B, k] of sum_t left_t right_t^T, in float32 or better."""
        ...

    def whole(self, gradient_BOI: Float[Tensor, "B O I"]) -> Float[Tensor, "B K"]:
        """Features [B, k] of a gradient that is given whole, in float32 or better."""
        ...


@runtime_checkable
class TwoSided(Projector, Protocol):
    """A projector that multiplies both factors with matrices of its own."""

    @property
    def input(self) -> Tensor | None:
        """P_i [r_i, I] without its scale; None where the right factor is kept as it is."""
        ...

    @property
    def scales(self) -> tuple[float, float]:
        """What P_o and P_i, and so ``left`` and ``right``, are to be multiplied with."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A part's projector, and its place [start, start + width) among its group's features; parts of one place are added."""

    projector: Projector
    start: int
    width: int


@runtime_checkable
class Projection(Protocol):
    """A kind of projection with its options, as run.toml names it."""

    kind: ClassVar[str]

    @property
    def needs_matrices(self) -> bool:
        """Whether its matrices come from a pre-pass over the training data."""
        ...

    def width(self, group: ParameterGroup) -> int:
        """Number of features k_j of a group."""
        ...

    def shape(self, part: Part) -> tuple[int, int] | None:
        """(r_o, r_i) where a part's features stand for a matrix, side by side with those of other parts; else None."""
        ...

    def projectors(
        self, group: ParameterGroup, *, seed: int, device: torch.device, matrices: Matrices | None = None
    ) -> tuple[Placed, ...]:
        """One projector per part of the group; equal seeds and parts give equal features.

        Raises
        ------
        SpecError
            If the projection needs matrices and has none, or not of the part's shape.
        """
        ...


@runtime_checkable
class Finishing(Projection, Protocol):
    """A projection whose features are factors, no linear function of the gradient: sums first, which are then finished."""

    def factors_of(self, part: Part) -> int:
        """c: the features of a part are rank-c factors of its matrix."""
        ...

    def summed_width(self, group: ParameterGroup) -> int:
        """Features of its projectors."""
        ...

    def finished(self, group: ParameterGroup, summed_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """The group's features, of those that its projectors make summed over all uses of its parameters."""
        ...


class WholeGradient:
    """The first half of a projector that needs the gradient itself: keeps both factors and multiplies them."""

    def left(self, values: Shaped[Tensor, "B T *O"]) -> Tensor:
        """The factor itself."""
        return values

    def right(self, values: Shaped[Tensor, "B T *I"]) -> Tensor:
        """The factor itself."""
        return values


def outer_sum(left: Tensor, right: Tensor, shape: tuple[int, int]) -> Float[Tensor, "B O I"]:
    """sum_t left_t right_t^T [B, O, I] in float32 or better; integer factors stand for one-hot rows.

    Parameters
    ----------
    left, right
        [B, T, O] and [B, T, I]; integer [B, T] for one of them at most.
    shape
        (O, I).
    """
    if not left.is_floating_point():
        return outer_sum(right, left, (shape[1], shape[0])).transpose(1, 2)
    dtype = torch.promote_types(left.dtype, torch.float32)
    if right.is_floating_point():
        return torch.bmm(left.to(dtype).transpose(1, 2), right.to(dtype))
    sums_BIO = left.new_zeros(len(left), shape[1], shape[0], dtype=dtype)
    places_BTO = right.long()[:, :, None].expand(-1, -1, shape[0])
    return sums_BIO.scatter_add_(1, places_BTO, left.to(dtype)).transpose(1, 2)


def side_by_side(projectors: list[Projector], widths: list[int]) -> tuple[Placed, ...]:
    """Place the features of each part behind those of the one before."""
    placed, start = [], 0
    for projector, width in zip(projectors, widths, strict=True):
        placed.append(Placed(projector=projector, start=start, width=width))
        start += width
    return tuple(placed)
