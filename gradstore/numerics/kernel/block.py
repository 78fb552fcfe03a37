"""The kernel of each group's whole Gram matrix."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from gradstore.numerics.kernel.damping import DampedKernel
from gradstore.numerics.kernel.protocol import BasisName


@dataclass(frozen=True, slots=True, kw_only=True)
class Block(DampedKernel):
    r"""Inverse of the damped Gram matrix, per group.

    .. math:: K_j = (\Phi_j^T \Phi_j + \lambda_j I)^{-1}

    Attributes
    ----------
    spectra
        Stored type of the eigenvectors, and precision of the products that they come from; eigenvalues are float64.
    """

    needs_spectra: ClassVar[bool] = True
    across_groups: ClassVar[bool] = False
    basis: ClassVar[BasisName | None] = "vectors"
    spectra: Literal["float32", "float64"] = "float32"
