"""Two-sided projections of the gradient matrix: LoGRA, with random matrices or with principal components."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor
from torch.nn import functional

from gradstore.errors import SpecError
from gradstore.groups import ParameterGroup, Part
from gradstore.numerics.generator import derive_key, normal, rademacher
from gradstore.numerics.projection.protocol import Matrices, Placed, side_by_side


@dataclass(frozen=True, slots=True, kw_only=True)
class Logra:
    r"""Two-sided projection of the gradient matrix (LoGRA).

    .. math:: F = \sum_t (P_o D_t)(P_i x_t)^T = P_o \, \nabla W \, P_i^T

    stored row-major like grad W (arXiv 2506.05647, eq. 20, transposed). Entries of random P_o and P_i are independent with
    mean 0 and variance 1/r, so that E[<F, F'>] = <grad W, grad W'> in every layer, whatever its shape. A side that is no
    longer than r is kept as it is (P = I): nothing would be gained by a projection of it. The parts of a group stand side by
    side, so that its inner products are the sums of theirs.

    Principal components keep the most of the inputs and of the output gradients that a matrix of rank r can; inner
    products are then too small by what is cut off (`gradstore doctor` reports how much).

    Attributes
    ----------
    rank
        r, the rows of both matrices; a part [O, I] has min(r, O) min(r, I) features.
    matrices
        ``rademacher`` (+-1/sqrt(r)), ``normal``, or ``pca``: the top eigenvectors of sum D D^T and sum x x^T over the
        positions of the first ``pca_rows`` training examples.
    pca_rows
        Examples of that pre-pass; it needs ``pca``.
    """

    kind: ClassVar[str] = "logra"
    rank: int
    matrices: Literal["rademacher", "normal", "pca"] = "rademacher"
    pca_rows: int = 256

    def __post_init__(self) -> None:
        refuse_below_one("rank", self.rank)
        refuse_below_one("pca_rows", self.pca_rows)

    @property
    def needs_matrices(self) -> bool:
        """Whether they come from a pre-pass over the training data."""
        return self.matrices == "pca"

    def width(self, group: ParameterGroup) -> int:
        """The sum over its parts of r_o r_i."""
        return sum(math.prod(self.shape(part)) for part in group.parts)

    def shape(self, part: Part) -> tuple[int, int]:
        """(r_o, r_i): r, or less where a side is shorter."""
        return min(self.rank, part.out_features), min(self.rank, part.in_features)

    def part_matrices(
        self, part: Part, *, seed: int, matrices: Matrices | None = None
    ) -> tuple[Float32[Tensor, "R O"], Float32[Tensor, "S I"]]:
        """(P_o [r_o, O], P_i [r_i, I]) on the CPU, keyed by (seed, part, side) or as given, with their scale.

        Before the scale 1/sqrt(r), the first r' rows are the matrices of rank r'.
        """
        return self.projector(part, seed=seed, device=torch.device("cpu"), matrices=matrices).dense()

    def projectors(
        self, group: ParameterGroup, *, seed: int, device: torch.device, matrices: Matrices | None = None
    ) -> tuple[Placed, ...]:
        """One projector per part, with its matrices on ``device``."""
        return side_by_side(
            [self.projector(part, seed=seed, device=device, matrices=matrices) for part in group.parts],
            [math.prod(self.shape(part)) for part in group.parts],
        )

    def projector(
        self, part: Part, *, seed: int, device: torch.device, matrices: Matrices | None = None
    ) -> "LograProjector":
        """The projector of one part.

        Raises
        ------
        SpecError
            If ``pca`` is asked for without matrices of the part's shape.
        """
        sizes = {"output": part.out_features, "input": part.in_features}
        if self.needs_matrices:
            given = _given(part, self.shape(part), matrices)
            drawn: dict[str, Tensor | None] = dict(zip(sizes, given, strict=True))
        else:
            drawn = {side: self._drawn(part.key, side, size, seed) for side, size in sizes.items()}
        kept = {side: None if sizes[side] <= self.rank else matrix for side, matrix in drawn.items()}
        random_scale = 1.0 if self.needs_matrices else self.rank**-0.5
        output_scale, input_scale = (1.0 if matrix is None else random_scale for matrix in kept.values())
        output_RO, input_RI = (None if matrix is None else matrix.to(device) for matrix in kept.values())
        return LograProjector(
            output=output_RO,
            input=input_RI,
            scales=(output_scale, input_scale),
            sides=(part.out_features, part.in_features),
        )

    def _drawn(self, key: str, side: str, size: int, seed: int) -> Tensor | None:
        if size <= self.rank:
            return None
        draw = rademacher if self.matrices == "rademacher" else normal
        return torch.from_numpy(draw(derive_key(seed, key, side), self.rank, size).astype(np.float32))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LograProjector:
    """`Logra` for one part.

    Random matrices are kept unscaled, since +-1 is exact in bfloat16 and +-1/sqrt(r) is not; ``scales`` are those of both
    sides. A side without a matrix is kept as it is; ``sides`` are (O, I).
    """

    output: Float32[Tensor, "R O"] | None
    input: Float32[Tensor, "S I"] | None
    scales: tuple[float, float]
    sides: tuple[int, int]

    def left(self, values: Shaped[Tensor, "B T *O"]) -> Float[Tensor, "B T R"]:
        """P_o D_t at every position, in the precision of the factor."""
        return _projected(values, self.output, self.sides[0])

    def right(self, values: Shaped[Tensor, "B T *I"]) -> Float[Tensor, "B T S"]:
        """P_i x_t at every position, in the precision of the factor."""
        return _projected(values, self.input, self.sides[1])

    def combine(self, left: Float[Tensor, "B T _"], right: Float[Tensor, "B T _"]) -> Float[Tensor, "B K"]:
        """sum_t (P_o D_t)(P_i x_t)^T, flattened row-major; the products over positions are at least float32."""
        # A side that is one-hot, of a vocabulary no longer than r, has no precision of its own.
        dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
        features_BRS = torch.bmm(left.to(dtype).transpose(1, 2), right.to(dtype))
        return features_BRS.flatten(1).mul_(math.prod(self.scales))

    def whole(self, gradient_BOI: Float[Tensor, "B O I"]) -> Float[Tensor, "B K"]:
        """P_o G P_i^T, flattened row-major."""
        dtype = torch.promote_types(gradient_BOI.dtype, torch.float32)
        features = gradient_BOI.to(dtype)
        if self.input is not None:
            features = features @ self.input.to(dtype).T
        if self.output is not None:
            features = self.output.to(dtype) @ features
        return (features * math.prod(self.scales)).flatten(1)

    def dense(self) -> tuple[Float32[Tensor, "R O"], Float32[Tensor, "S I"]]:
        """(P_o, P_i) on the CPU with their scale, as matrices even where a side is kept as it is."""
        output_RO, input_SI = (
            torch.eye(size) if matrix is None else matrix.cpu() * scale
            for matrix, scale, size in zip((self.output, self.input), self.scales, self.sides, strict=True)
        )
        return output_RO, input_SI


def _projected(values: Shaped[Tensor, "B T *F"], matrix_RF: Tensor | None, size: int) -> Tensor:
    if values.is_floating_point():
        return values if matrix_RF is None else functional.linear(values, matrix_RF.to(values.dtype))
    if matrix_RF is None:
        return functional.one_hot(values.long(), size).float()
    return functional.embedding(values.long(), matrix_RF.T)


def _given(part: Part, ranks: tuple[int, int], matrices: Matrices | None) -> tuple[Tensor, Tensor]:
    wanted = (ranks[0], part.out_features), (ranks[1], part.in_features)
    if matrices is None or part.key not in matrices:
        raise SpecError(
            f'features.projection: {part.key} has no principal components. matrices = "pca" takes them from the training '
            "data; `gradstore featurize` does so before anything else."
        )
    found = matrices[part.key]
    if tuple(tuple(matrix.shape) for matrix in found) != wanted:
        raise SpecError(
            f"features.projection: the principal components of {part.key} are {[list(item.shape) for item in found]}, the run "
            f"asks for {[list(shape) for shape in wanted]}. Restore features.projection.rank or choose another run.store."
        )
    return found


def refuse_below_one(option: str, value: int) -> None:
    """Refuse a count that is not at least 1."""
    if value < 1:
        raise SpecError(f"features.projection.{option}: found {value}; accepted: an integer of at least 1.")
