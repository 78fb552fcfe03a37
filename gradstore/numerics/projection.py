"""Projections: from a layer's per-example gradient to the features that are stored.

A linear layer y = W x has grad W = sum_t D_t x_t^T over positions t, D_t = df/dy_t (arXiv 2506.05647, eq. 19). A
projection never needs that product whole: a projector is shown the layer's input in the forward pass, keeps of it what
it needs, and makes the features when the output gradient arrives in the backward pass.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from gradstore.errors import SpecError
from gradstore.groups import ParameterGroup
from gradstore.numerics.generator import derive_key, normal, rademacher


@runtime_checkable
class Projector(Protocol):
    """A projection made ready for one parameter group on one device."""

    def keep(self, input_BTI: Float[Tensor, "B T I"]) -> Tensor:
        """What is kept of the layer's input until its output gradient is known."""
        ...

    def project(self, gradient_BTO: Float[Tensor, "B T O"], kept: Tensor) -> Float[Tensor, "B K"]:
        """Features [B, k] of the gradient sum_t D_t x_t^T, in float32 or better."""
        ...


@runtime_checkable
class Projection(Protocol):
    """A kind of projection with its options, as run.toml names it."""

    kind: ClassVar[str]

    def width(self, group: ParameterGroup) -> int:
        """Number of features k_j of a group."""
        ...

    def projector(self, group: ParameterGroup, *, seed: int, device: torch.device) -> Projector:
        """The projector of a group; equal seeds and group names give equal features."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Logra:
    r"""Two-sided random projection of the gradient matrix (LoGRA).

    .. math:: F = \sum_t (P_o D_t)(P_i x_t)^T = P_o \, \nabla W \, P_i^T

    stored row-major like grad W (arXiv 2506.05647, eq. 20, transposed). Entries of P_o and P_i are independent with
    mean 0 and variance 1/r, so that E[<F, F'>] = <grad W, grad W'> in every layer, whatever its shape.

    Attributes
    ----------
    rank
        r, the rows of both matrices; a group has r * r features.
    distribution
        Of the entries: ``rademacher`` (+-1/sqrt(r)) or ``normal``.
    """

    kind: ClassVar[str] = "logra"
    rank: int
    distribution: Literal["rademacher", "normal"] = "rademacher"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise SpecError(f"features.projection.rank: found {self.rank}; accepted: an integer of at least 1.")

    def width(self, group: ParameterGroup) -> int:
        """The same for every group: r * r."""
        return self.rank * self.rank

    def matrices(self, group: ParameterGroup, *, seed: int) -> tuple[Float32[Tensor, "R O"], Float32[Tensor, "R I"]]:
        """(P_o [r, d_out], P_i [r, d_in]) on the CPU, keyed by (seed, group name, side).

        Before the scale 1/sqrt(r), the first r' rows are the matrices of rank r'.
        """
        output_RO, input_RI = self._unscaled(group, seed)
        return output_RO / math.sqrt(self.rank), input_RI / math.sqrt(self.rank)

    def projector(self, group: ParameterGroup, *, seed: int, device: torch.device) -> "LograProjector":
        """The projector of one group, with its matrices on ``device``."""
        output_RO, input_RI = self._unscaled(group, seed)
        return LograProjector(output=output_RO.to(device), input=input_RI.to(device))

    def _unscaled(self, group: ParameterGroup, seed: int) -> tuple[Tensor, Tensor]:
        draw = rademacher if self.distribution == "rademacher" else normal
        sides = {"output": group.out_features, "input": group.in_features}
        output_RO, input_RI = (
            torch.from_numpy(draw(derive_key(seed, group.name, side), self.rank, size).astype(np.float32))
            for side, size in sides.items()
        )
        return output_RO, input_RI


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LograProjector:
    """`Logra` for one group. The matrices are kept unscaled: +-1 is exact in bfloat16, +-1/sqrt(r) is not."""

    output: Float32[Tensor, "R O"]
    input: Float32[Tensor, "R I"]

    def keep(self, input_BTI: Float[Tensor, "B T I"]) -> Float[Tensor, "B T R"]:
        """P_i x_t at every position, in the precision of the input."""
        return functional.linear(input_BTI, self.input.to(input_BTI.dtype))

    def project(self, gradient_BTO: Float[Tensor, "B T O"], kept: Float[Tensor, "B T R"]) -> Float[Tensor, "B R*R"]:
        """sum_t (P_o D_t)(P_i x_t)^T / r, flattened row-major; the products over positions are at least float32."""
        gradient_BTR = functional.linear(gradient_BTO, self.output.to(gradient_BTO.dtype))
        dtype = torch.promote_types(gradient_BTR.dtype, torch.float32)
        features_BRR = torch.bmm(gradient_BTR.to(dtype).transpose(1, 2), kept.to(dtype))
        return features_BRR.flatten(1).div_(len(self.output))


PROJECTIONS: dict[str, type[Projection]] = {"logra": Logra}
