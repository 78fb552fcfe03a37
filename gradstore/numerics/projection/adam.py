"""Adam's direction: the gradient divided, entry by entry, by the root of its running second moment."""

import torch
from jaxtyping import Float
from torch import Tensor

from gradstore.numerics.projection.protocol import Projector, WholeGradient, outer_sum


class AdamProjector(WholeGradient):
    r"""A projector shown the direction of Adam's step instead of the gradient.

    .. math:: \Gamma = \nabla W \oslash \big(\sqrt{v / (1 - \beta_2^t)} + \epsilon\big)

    The second moment v is that of the optimizer after its t steps, corrected for its start at zero; epsilon is added to
    the root, as torch's Adam and AdamW do. The first moment is left out: it does not depend on the example.

    Parameters
    ----------
    projector
        What makes the features.
    divisor
        The root plus epsilon [O, I] of the part, on its device.
    """

    def __init__(self, projector: Projector, divisor: Float[Tensor, "O I"]) -> None:
        self._projector = projector
        self._divisor_OI = divisor

    def combine(self, left: Tensor, right: Tensor) -> Float[Tensor, "B K"]:
        """The features of the direction of sum_t left_t right_t^T."""
        shape = self._divisor_OI.shape[0], self._divisor_OI.shape[1]
        return self.whole(outer_sum(left, right, shape))

    def whole(self, gradient_BOI: Float[Tensor, "B O I"]) -> Float[Tensor, "B K"]:
        """The features of the direction of a gradient."""
        dtype = torch.promote_types(gradient_BOI.dtype, torch.float32)
        return self._projector.whole(gradient_BOI.to(dtype) / self._divisor_OI)
