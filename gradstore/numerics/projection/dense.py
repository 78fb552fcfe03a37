"""One-sided dense random projections of the flattened gradient (TRAK), from one tile of entries and random signs."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor
from torch.nn import functional

from gradstore.groups import ParameterGroup, Part
from gradstore.numerics.generator import derive_key, normal, rademacher
from gradstore.numerics.projection.logra import refuse_below_one
from gradstore.numerics.projection.protocol import Matrices, Placed, WholeGradient, outer_sum

# Columns of the tile: with 2,048 features it takes 16 MiB, which a last-level cache holds beside a batch of gradients.
TILE_COLUMNS = 2048
TILE = "tile of every part"
ROWS_PER_PRODUCT = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    r"""A dense random projection of the group's whole gradient to k features (TRAK, arXiv 2303.14186).

    .. math:: \phi_a = k^{-1/2} \sum_c P_{ac} \, \mathrm{vec}(\nabla W)_c

    Drawing k random numbers for every parameter in every batch would take longer than the gradients, and holding them is
    out of the question. Instead one tile B [k, 2048] is drawn, and columns t of the matrix are

    .. math:: P_t = \mathrm{diag}(r_t) \, B \, \mathrm{diag}(s_t)

    with random signs r_t [k] for each tile and s [d] for each column (ADR 0008). Every entry has mean 0 and variance 1 and
    any two of them are independent, so inner products are unbiased in every shape; products of four entries that decide
    their variance have the means that they have for independent entries.

    Attributes
    ----------
    features
        k.
    entries
        Of B: ``rademacher`` (+-1) or ``normal``.
    """

    kind: ClassVar[str] = "dense"
    needs_matrices: ClassVar[bool] = False
    features: int
    entries: Literal["rademacher", "normal"] = "rademacher"

    def __post_init__(self) -> None:
        refuse_below_one("features", self.features)

    def width(self, group: ParameterGroup) -> int:
        """The same for every group: k."""
        return self.features

    def shape(self, part: Part) -> None:
        """None: the features are no matrix."""

    def projectors(
        self, group: ParameterGroup, *, seed: int, device: torch.device, matrices: Matrices | None = None
    ) -> tuple[Placed, ...]:
        """One projector per part; their features are added."""
        tile_KC = _tile(seed, self.features, self.entries).to(device)
        return tuple(
            Placed(
                projector=DenseProjector(part, tile_KC=tile_KC, seed=seed, device=device),
                start=0,
                width=self.features,
            )
            for part in group.parts
        )

    def matrix(self, part: Part, *, seed: int) -> Float32[Tensor, "K D"]:
        """The matrix of a part, whole and with its scale; for tests and small parts."""
        projector = DenseProjector(
            part, tile_KC=_tile(seed, self.features, self.entries), seed=seed, device=torch.device("cpu")
        )
        return projector.whole(torch.eye(part.size).view(part.size, part.out_features, part.in_features)).T


class DenseProjector(WholeGradient):
    """`Dense` for one part: beside the tile that all share, a byte for each parameter and k bytes for each tile."""

    def __init__(self, part: Part, *, tile_KC: Float32[Tensor, "K C"], seed: int, device: torch.device) -> None:
        self._shape = (part.out_features, part.in_features)
        self._tile_KC = tile_KC
        tiles = math.ceil(part.size / TILE_COLUMNS)
        self._row_signs_KT = _signs(derive_key(seed, part.key, "rows"), len(tile_KC), tiles).to(device)
        self._column_signs_1D = _signs(derive_key(seed, part.key, "columns"), 1, part.size).to(device)

    def combine(self, left: Tensor, right: Tensor) -> Float[Tensor, "B K"]:
        """The features of sum_t left_t right_t^T."""
        return self.whole(outer_sum(left, right, self._shape))

    def whole(self, gradient_BOI: Float[Tensor, "B O I"]) -> Float[Tensor, "B K"]:
        """The features of a gradient, tile by tile."""
        dtype = torch.promote_types(gradient_BOI.dtype, torch.float32)
        flat_BD = gradient_BOI.to(dtype).flatten(1)
        tile_CK = self._tile_KC.to(dtype).T
        features_BK = flat_BD.new_zeros(len(flat_BD), tile_CK.shape[1])
        # All tiles are one, so that many of them make one product of many rows: a few rows would leave the processor waiting.
        at_once = max(1, ROWS_PER_PRODUCT // len(flat_BD))
        for first in range(0, self._row_signs_KT.shape[1], at_once):
            columns = slice(first * TILE_COLUMNS, (first + at_once) * TILE_COLUMNS)
            piece_BC = flat_BD[:, columns] * self._column_signs_1D[:, columns]
            rest = -piece_BC.shape[1] % TILE_COLUMNS
            tiles_BTC = functional.pad(piece_BC, (0, rest)).view(len(piece_BC), -1, TILE_COLUMNS)
            signs_TK = self._row_signs_KT[:, first : first + at_once].T.to(dtype)
            features_BK += ((tiles_BTC @ tile_CK) * signs_TK).sum(1)
        return features_BK.div_(math.sqrt(len(self._tile_KC)))


@lru_cache(maxsize=2)
def _tile(seed: int, features: int, entries: str) -> Float32[Tensor, "K C"]:
    draw = rademacher if entries == "rademacher" else normal
    return torch.from_numpy(draw(derive_key(seed, TILE, entries), features, TILE_COLUMNS).astype(np.float32))


def _signs(key: int, rows: int, columns: int) -> Int8[Tensor, "R C"]:
    return torch.from_numpy(rademacher(key, rows, columns))
