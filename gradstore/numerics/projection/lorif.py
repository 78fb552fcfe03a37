"""Rank-c factors of two-sided projections (LoRIF): c (r_o + r_i) numbers are stored instead of r_o r_i."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.errors import SpecError
from gradstore.groups import ParameterGroup, Part
from gradstore.numerics.projection.logra import Logra, refuse_below_one
from gradstore.numerics.projection.protocol import Matrices, Placed


@dataclass(frozen=True, slots=True, kw_only=True)
class Lorif:
    r"""The best rank-c factors of the LoGRA features (LoRIF, arXiv 2601.21929).

    .. math:: F \approx \sum_{a=1}^{c} u_a v_a^T, \qquad
        \langle F, F' \rangle = \sum_{a,b} (u_a \cdot u'_b)(v_a \cdot v'_b)

    A part's features are u [c, r_o], then v [c, r_i]; u_a and v_a each carry the root of the singular value. Inner products
    are biased by what the factors leave out (`gradstore doctor` reports how much).

    Attributes
    ----------
    rank, matrices, pca_rows
        As in `Logra`.
    factors
        c; where a part's matrix has no higher rank its factors are exact.
    """

    kind: ClassVar[str] = "lorif"
    rank: int
    factors: int = 1
    matrices: Literal["rademacher", "normal", "pca"] = "rademacher"
    pca_rows: int = 256

    def __post_init__(self) -> None:
        refuse_below_one("factors", self.factors)
        if self.factors > self.rank:
            raise SpecError(
                f"features.projection.factors: found {self.factors}; accepted: at most the rank, {self.rank}. "
                f'More is what projection = {{ kind = "logra", rank = {self.rank} }} stores whole.'
            )
        self._logra  # noqa: B018 - refuses what Logra refuses

    @property
    def needs_matrices(self) -> bool:
        """Whether they come from a pre-pass over the training data."""
        return self._logra.needs_matrices

    @property
    def _logra(self) -> Logra:
        return Logra(rank=self.rank, matrices=self.matrices, pca_rows=self.pca_rows)

    def width(self, group: ParameterGroup) -> int:
        """The sum over its parts of c (r_o + r_i)."""
        return sum(self.factors_of(part) * sum(self.shape(part)) for part in group.parts)

    def shape(self, part: Part) -> tuple[int, int]:
        """(r_o, r_i) of the matrix that the factors stand for."""
        return self._logra.shape(part)

    def factors_of(self, part: Part) -> int:
        """C of a part: no more than its matrix can have."""
        return min(self.factors, *self.shape(part))

    def projectors(
        self, group: ParameterGroup, *, seed: int, device: torch.device, matrices: Matrices | None = None
    ) -> tuple[Placed, ...]:
        """Those of `Logra`: what they make of single calls and modules is added up before it is factorised."""
        return self._logra.projectors(group, seed=seed, device=device, matrices=matrices)

    def summed_width(self, group: ParameterGroup) -> int:
        """Features of `Logra`."""
        return self._logra.width(group)

    def finished(self, group: ParameterGroup, summed_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """The factors of every part's matrix, part after part."""
        found, start = [], 0
        for part in group.parts:
            rows, columns = self.shape(part)
            matrix_BRS = summed_BD[:, start : start + rows * columns].reshape(-1, rows, columns)
            found.append(factorised(matrix_BRS, self.factors_of(part)))
            start += rows * columns
        return torch.cat(found, 1)


def factorised(features_BRS: Float[Tensor, "B R S"], factors: int) -> Float[Tensor, "B K"]:
    """The best rank-c factors of every matrix: u [c, R] then v [c, S], flattened; NaN of one that is not finite."""
    sound_B = features_BRS.isfinite().flatten(1).all(1)
    left_BRM, values_BM, right_BMS = torch.linalg.svd(
        torch.where(sound_B[:, None, None], features_BRS, 0), full_matrices=False
    )
    root_B1C = values_BM[:, None, :factors].sqrt()
    u_BCR = (left_BRM[:, :, :factors] * root_B1C).transpose(1, 2)
    v_BCS = right_BMS[:, :factors] * root_B1C.transpose(1, 2)
    found_BK = torch.cat([u_BCR.flatten(1), v_BCS.flatten(1)], 1)
    return found_BK.masked_fill_(~sound_B[:, None], math.nan)
