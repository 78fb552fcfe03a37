"""Principal components of a layer's inputs and output gradients: the matrices of a two-sided projection from data."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from gradstore.groups import ParameterGroup, Part
from gradstore.numerics.projection.protocol import Matrices, Placed, WholeGradient


class SecondMoments:
    """A projection to no features, whose projectors sum what principal components are found from.

    Given to a `FeatureExtractor` in the place of a projection, it takes in every batch that the extractor is called with.
    """

    kind: ClassVar[str] = "second-moments"
    needs_matrices: ClassVar[bool] = False

    def __init__(self) -> None:
        self._moments: dict[str, MomentProjector] = {}

    def width(self, group: ParameterGroup) -> int:
        """No features."""
        return 0

    def shape(self, part: Part) -> None:
        """None: there are no features."""

    def projectors(
        self, group: ParameterGroup, *, seed: int, device: torch.device, matrices: Matrices | None = None
    ) -> tuple[Placed, ...]:
        """One projector per part, which is kept."""
        made = {part.key: MomentProjector(part, device) for part in group.parts}
        self._moments |= made
        return tuple(Placed(projector=projector, start=0, width=0) for projector in made.values())

    def components(
        self, ranks: Mapping[str, tuple[int, int]]
    ) -> dict[str, tuple[Float32[Tensor, "R O"], Float32[Tensor, "S I"]]]:
        r"""(P_o [r_o, O], P_i [r_i, I]) of every part: the top eigenvectors of the two sums, in rows, largest first.

        .. math:: \sum_t D_t D_t^T, \qquad \sum_t x_t x_t^T

        over all positions with an output gradient; of a gradient G that is given whole, sum G G^T and sum G^T G. The sign of
        an eigenvector is chosen so that its largest entry is positive. A part that no output depends on has unit vectors.
        """
        found = {}
        for part, moments in self._moments.items():
            sides = zip((moments.left_OO, moments.right_II), ranks[part], moments.sides, strict=True)
            output_RO, input_SI = (
                _top_eigenvectors(moment, rank) if moment.numel() else torch.eye(rank, size)
                for moment, rank, size in sides
            )
            found[part] = output_RO, input_SI
        return found


class MomentProjector(WholeGradient):
    """Sums the second moments of one part's factors; of one-hot factors they are counts, kept as a vector."""

    def __init__(self, part: Part, device: torch.device) -> None:
        self.sides = part.out_features, part.in_features
        self._device = device
        self.left_OO: Tensor = torch.zeros(0)
        self.right_II: Tensor = torch.zeros(0)

    def combine(self, left: Tensor, right: Tensor) -> Float[Tensor, "B 0"]:
        """Take in a batch's factors; no features."""
        counted_BT = torch.ones(left.shape[:2], dtype=torch.bool, device=self._device)
        for factor in (left, right):
            if factor.is_floating_point():
                # Where one of both is zero nothing is added to the gradient, as at a pad; an example that is not finite
                # has no gradient.
                counted_BT &= (factor != 0).any(-1) & factor.isfinite().all(-1)
        self.left_OO = _added(self.left_OO, left[counted_BT], self.sides[0])
        self.right_II = _added(self.right_II, right[counted_BT], self.sides[1])
        return torch.zeros(len(left), 0, device=self._device)

    def whole(self, gradient_BOI: Float[Tensor, "B O I"]) -> Float[Tensor, "B 0"]:
        """Take in a batch's gradients, of examples that are finite; no features."""
        examples = len(gradient_BOI)
        gradient_BOI = gradient_BOI[gradient_BOI.isfinite().all(-1).all(-1)]
        self.left_OO = _added(self.left_OO, gradient_BOI.transpose(1, 2).flatten(0, 1), self.sides[0])
        self.right_II = _added(self.right_II, gradient_BOI.flatten(0, 1), self.sides[1])
        return torch.zeros(examples, 0, device=self._device)


def _added(moment: Tensor, rows: Tensor, size: int) -> Tensor:
    """A moment with those of rows [n, size] added, or of integer rows [n], each a place of a one, the counts."""
    if rows.is_floating_point():
        # A batch in float32, their sum in float64: as `kernel.update_gram` has it.
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        found = (wide.T @ wide).double()
    else:
        found = torch.bincount(rows.long(), minlength=size).double()
    return found if moment.numel() == 0 else moment + found


def _top_eigenvectors(moment: Float64[Tensor, "..."], rank: int) -> Float32[Tensor, "R D"]:
    if moment.dim() == 1:
        places = torch.argsort(moment, descending=True, stable=True)[:rank]
        rows_RD: Tensor = torch.nn.functional.one_hot(places, len(moment)).float()
        return rows_RD.cpu()
    vectors_RD: Tensor = torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :rank].T
    largest_R1 = vectors_RD.gather(1, vectors_RD.abs().argmax(1, keepdim=True))
    signed_RD: Tensor = vectors_RD * largest_R1.sign()
    return signed_RD.float().cpu().contiguous()
