"""The kernel that knows each feature's scale, and not how features go together."""

from dataclasses import dataclass
from typing import ClassVar

from gradstore.numerics.kernel.damping import DampedKernel
from gradstore.numerics.kernel.protocol import BasisName


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagonal(DampedKernel):
    r"""Inverse of the damped diagonal of the Gram matrix, per group.

    .. math:: K_j = \mathrm{diag}\left(\sum_n \phi_{n,d}^2 + \lambda_j\right)^{-1}

    It takes d numbers a group where `Block` takes d^2, and one pass without products.
    """

    needs_spectra: ClassVar[bool] = True
    across_groups: ClassVar[bool] = False
    basis: ClassVar[BasisName | None] = "standard"
