"""Damping: what is added to eigenvalues before they are inverted, whenever a spectrum is applied."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64

from gradstore.errors import SpecError

Mode = Literal["relative", "absolute"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Damping:
    r"""What makes an inverse of eigenvalues, some of which are zero.

    .. math:: \frac{1}{s + \lambda}

    Attributes
    ----------
    value
        lambda itself, or its ratio to the mean eigenvalue of the spectrum.
    mode
        ``relative`` or ``absolute``: which of the two ``value`` is.

    Raises
    ------
    SpecError
        If the value is not a finite number above 0.
    """

    value: float
    mode: Mode = "relative"

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise SpecError(
                f"kernel.damping: found {self.value}; accepted: a finite number above 0, or a list of them. Features need "
                "not span their space, and without damping the kernel has no inverse."
            )

    def shift(self, eigenvalues_D: Float64[np.ndarray, " D"], mean: float | None = None) -> float:
        """Return lambda for a spectrum; ``mean`` is its mean eigenvalue where these are not all of them."""
        if self.mode == "absolute":
            return self.value
        return self.value * (float(eigenvalues_D.mean()) if mean is None else mean)

    def inverse(self, eigenvalues_D: Float64[np.ndarray, " D"], mean: float | None = None) -> Float64[np.ndarray, " D"]:
        """Return 1 / (s + lambda) of every eigenvalue s, of which none is negative.

        Where relative damping meets a group whose training features are all zero, lambda is 0 and so is the result: such a
        group contributes nothing, whatever its kernel.
        """
        damped_D = eigenvalues_D + self.shift(eigenvalues_D, mean)
        return np.divide(1, damped_D, out=np.zeros_like(damped_D), where=damped_D > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DampedKernel:
    """The options of every kernel that inverts a spectrum.

    Attributes
    ----------
    damping
        lambda itself, or its ratio to the mean eigenvalue.
    mode
        ``relative`` or ``absolute``: which of the two ``damping`` is.
    """

    damping: float = 0.1
    mode: Mode = "relative"

    def __post_init__(self) -> None:
        self.damped_by  # noqa: B018 - refuses what Damping refuses

    @property
    def damped_by(self) -> Damping:
        """How its eigenvalues are damped."""
        return Damping(value=self.damping, mode=self.mode)
