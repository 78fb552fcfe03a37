"""Sparse projections of the flattened gradient: SJLT, and FactGraSS, which masks and multiplies before it."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor

from gradstore.groups import ParameterGroup, Part
from gradstore.numerics.generator import derive_key, permutation, words
from gradstore.numerics.projection.logra import refuse_below_one
from gradstore.numerics.projection.protocol import Matrices, Placed, WholeGradient, outer_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Sjlt:
    r"""Sparse Johnson-Lindenstrauss transform of the group's whole gradient to k features.

    .. math:: \phi_a = s^{-1/2} \sum_c \sum_{u=1}^{s} [h_u(c) = a] \, \sigma_u(c) \, \mathrm{vec}(\nabla W)_c

    Every coordinate c is added to s features, chosen by h with signs sigma, both drawn by a counter-based generator: the
    same bits on every device. Inner products are unbiased in every shape.

    Attributes
    ----------
    features
        k.
    nonzeros
        s, the features that a coordinate goes to.
    """

    kind: ClassVar[str] = "sjlt"
    needs_matrices: ClassVar[bool] = False
    features: int
    nonzeros: int = 1

    def __post_init__(self) -> None:
        refuse_below_one("features", self.features)
        refuse_below_one("nonzeros", self.nonzeros)

    def width(self, group: ParameterGroup) -> int:
        """The same for every group: k."""
        return self.features

    def shape(self, part: Part) -> None:
        """None: the features are no matrix."""

    def projectors(
        self, group: ParameterGroup, *, seed: int, device: torch.device, matrices: Matrices | None = None
    ) -> tuple[Placed, ...]:
        """One projector per part; their features are added."""
        return tuple(
            Placed(projector=SjltProjector(part, self, seed=seed, device=device), start=0, width=self.features)
            for part in group.parts
        )


class SjltProjector(WholeGradient):
    """`Sjlt` for one part; it holds five bytes s times for each parameter."""

    def __init__(self, part: Part, projection: Sjlt, *, seed: int, device: torch.device) -> None:
        self._shape = (part.out_features, part.in_features)
        self._buckets = Buckets(part.key, part.size, projection, seed=seed, device=device)

    def combine(self, left: Tensor, right: Tensor) -> Float[Tensor, "B K"]:
        """The features of sum_t left_t right_t^T."""
        return self.whole(outer_sum(left, right, self._shape))

    def whole(self, gradient_BOI: Float[Tensor, "B O I"]) -> Float[Tensor, "B K"]:
        """The features of a gradient."""
        dtype = torch.promote_types(gradient_BOI.dtype, torch.float32)
        return self._buckets.sums(gradient_BOI.to(dtype).flatten(1))


class Buckets:
    """h and sigma of one part's coordinates."""

    def __init__(self, key: str, size: int, projection: Sjlt, *, seed: int, device: torch.device) -> None:
        self._features = projection.features
        draws = [
            words(derive_key(seed, key, f"bucket {nonzero}"), math.ceil(size / 2))
            .astype("<u8", copy=False)
            .view("<u4")[:size]
            for nonzero in range(projection.nonzeros)
        ]
        # The highest bit is the sign; the 31 others, as a fraction of 2^31, choose the feature.
        self._places = [
            torch.from_numpy(((draw & 0x7FFFFFFF).astype(np.uint64) * self._features >> 31).astype(np.int32)).to(device)
            for draw in draws
        ]
        self._signs = [torch.from_numpy((draw >> 31).astype(np.int8) * 2 - 1).to(device) for draw in draws]

    def sums(self, values_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """The features of every row."""
        features_KB = values_BD.new_zeros(self._features, len(values_BD))
        for place_D, sign_D in zip(self._places, self._signs, strict=True):
            features_KB.index_add_(0, place_D, (values_BD * sign_D).T)
        return features_KB.T / math.sqrt(len(self._places))


@dataclass(frozen=True, slots=True, kw_only=True)
class FactSjlt:
    r"""FactGraSS: mask both factors, multiply, then SJLT; the gradient is never formed.

    .. math:: F = \mathrm{SJLT}\Big(\sqrt{\tfrac{O I}{m_o m_i}} \sum_t (M_o D_t) \otimes (M_i x_t)\Big)

    M_o and M_i choose ``mask`` coordinates of each side at random, all where a side has no more; the factor before the sum
    keeps inner products unbiased in every shape.

    Attributes
    ----------
    features
        k.
    mask
        Coordinates that are kept of each side.
    nonzeros
        s of `Sjlt`.
    """

    kind: ClassVar[str] = "fact-sjlt"
    needs_matrices: ClassVar[bool] = False
    features: int
    mask: int
    nonzeros: int = 1

    def __post_init__(self) -> None:
        refuse_below_one("features", self.features)
        refuse_below_one("mask", self.mask)
        refuse_below_one("nonzeros", self.nonzeros)

    def width(self, group: ParameterGroup) -> int:
        """The same for every group: k."""
        return self.features

    def shape(self, part: Part) -> None:
        """None: the features are no matrix."""

    def projectors(
        self, group: ParameterGroup, *, seed: int, device: torch.device, matrices: Matrices | None = None
    ) -> tuple[Placed, ...]:
        """One projector per part; their features are added."""
        return tuple(
            Placed(projector=FactSjltProjector(part, self, seed=seed, device=device), start=0, width=self.features)
            for part in group.parts
        )

    def kept(self, part: Part, *, seed: int) -> tuple[Int64[Tensor, " O"], Int64[Tensor, " I"]]:
        """The coordinates of each side that are kept, ascending."""
        outputs_O = self._kept(part.key, "output", part.out_features, seed)
        return outputs_O, self._kept(part.key, "input", part.in_features, seed)

    def _kept(self, key: str, side: str, size: int, seed: int) -> Int64[Tensor, " S"]:
        order = permutation(words(derive_key(seed, key, f"mask of {side}"), size))
        return torch.from_numpy(np.sort(order[: self.mask]))


class FactSjltProjector:
    """`FactSjlt` for one part."""

    def __init__(self, part: Part, projection: FactSjlt, *, seed: int, device: torch.device) -> None:
        self._sides = (part.out_features, part.in_features)
        self._kept = tuple(places.to(device) for places in projection.kept(part, seed=seed))
        kept = len(self._kept[0]) * len(self._kept[1])
        self._scale = math.sqrt(part.size / kept)
        sparse = Sjlt(features=projection.features, nonzeros=projection.nonzeros)
        self._buckets = Buckets(part.key, kept, sparse, seed=seed, device=device)

    def left(self, values: Shaped[Tensor, "B T *O"]) -> Shaped[Tensor, "B T *S"]:
        """The coordinates that are kept; of one-hot rows as rows."""
        return self._masked(values, 0)

    def right(self, values: Shaped[Tensor, "B T *I"]) -> Shaped[Tensor, "B T *S"]:
        """The coordinates that are kept; of one-hot rows as rows."""
        return self._masked(values, 1)

    def combine(self, left: Tensor, right: Tensor) -> Float[Tensor, "B K"]:
        """The features of the product of both masked factors."""
        product = outer_sum(left, right, (len(self._kept[0]), len(self._kept[1])))
        return self._buckets.sums(product.flatten(1).mul_(self._scale))

    def whole(self, gradient_BOI: Float[Tensor, "B O I"]) -> Float[Tensor, "B K"]:
        """The features of a gradient that is given whole."""
        dtype = torch.promote_types(gradient_BOI.dtype, torch.float32)
        masked = gradient_BOI.index_select(1, self._kept[0]).index_select(2, self._kept[1])
        return self._buckets.sums(masked.to(dtype).flatten(1) * self._scale)

    def _masked(self, values: Tensor, side: int) -> Tensor:
        kept: Int[Tensor, " S"] = self._kept[side]
        if values.is_floating_point():
            return values if len(kept) == self._sides[side] else values.index_select(-1, kept)
        # A one-hot row is all zero where its one is masked.
        return (values[..., None] == kept).float()
