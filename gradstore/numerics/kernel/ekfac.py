"""EKFAC in the space of the features: bases from the covariances of both factors of a gradient, eigenvalues from rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float64

from gradstore.numerics.kernel.damping import DampedKernel
from gradstore.numerics.kernel.gram import decomposed
from gradstore.numerics.kernel.protocol import BasisName
from gradstore.numerics.kernel.spectra import Kronecker


@dataclass(frozen=True, slots=True, kw_only=True)
class Ekfac(DampedKernel):
    r"""Kronecker-factored eigenbases with corrected eigenvalues (arXiv 2506.05647, eq. 21-22), per part of a group.

    .. math:: A' = \sum x' x'^T = U_A S_A U_A^T, \quad G' = \sum D' D'^T = U_G S_G U_G^T, \quad
        \Lambda = \mathrm{mean}_n (U_G^T F_n U_A)^2, \quad
        K_j = (U_G \otimes U_A) \,\mathrm{diag}\left(\frac{1}{\Lambda + \lambda_j}\right) (U_G \otimes U_A)^T

    where x' = P_i x and D' = P_o D are the projected inputs and output gradients. Relative damping is a ratio to the mean of
    Lambda over all parts of the group. It needs features that are matrices of parts, and never forms d x d numbers.

    Attributes
    ----------
    spectra
        Stored type of U_A and U_G, and precision of the rotations that Lambda comes from; Lambda is float64.
    """

    needs_spectra: ClassVar[bool] = True
    across_groups: ClassVar[bool] = False
    basis: ClassVar[BasisName | None] = "kronecker"
    spectra: Literal["float32", "float64"] = "float32"


def kronecker_basis(
    covariances: Sequence[tuple[Float64[np.ndarray, "_ _"], Float64[np.ndarray, "_ _"]]],
) -> Kronecker:
    """Return the eigenbases of (G' [R, R], A' [S, S]) of every part, in float64.

    Raises
    ------
    DataError
        If one is not finite.
    """
    return Kronecker(
        tuple(
            (decomposed(left_RR, "output covariance")[1], decomposed(right_SS, "input covariance")[1])
            for left_RR, right_SS in covariances
        )
    )
