"""Output functions f(x; theta): the one number per example whose gradient is taken.

Each is a SUM over the example's own positions, never a mean over the batch, so that an example's gradient cannot depend
on its batch mates. All return at least float32, whatever the precision of the model's outputs. A number that is no
number (NaN, infinite) is returned as it is: the row that it belongs to is marked invalid where it is stored.
"""

from collections.abc import Callable

from torch import Tensor

from gradstore.numerics.outputs.classification import cross_entropy, margin
from gradstore.numerics.outputs.diffusion import das, ddpm_simple, square
from gradstore.numerics.outputs.tokens import token_cross_entropy

OUTPUTS: dict[str, Callable[..., Tensor]] = {
    "token_cross_entropy": token_cross_entropy,
    "cross_entropy": cross_entropy,
    "margin": margin,
    "ddpm_simple": ddpm_simple,
    "square": square,
    "das": das,
}

__all__ = ["OUTPUTS", "cross_entropy", "das", "ddpm_simple", "margin", "square", "token_cross_entropy"]
