"""Self-influence tau(n, n) = <K phi_n, phi_n>: what an example contributes to itself, under several dampings at once."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64

from gradstore.numerics.kernel import Damping, Spectrum
from gradstore.numerics.kernel.spectra import squared_coordinates

# V dampings, N rows, D features of a group.


def self_influences(
    rows_ND: Float[np.ndarray, "N D"], spectrum: Spectrum, dampings: Sequence[Damping]
) -> Float64[np.ndarray, "V N"]:
    r"""Self-influence of rows in one group, under every damping; NaN of a row that is not finite.

    .. math:: \tau(n, n) = \sum_d \frac{(V^T \phi_n)_d^2}{s_d + \lambda}

    Rows are rotated into the basis of the spectrum once, which is all the work.
    """
    inverse_DV = np.stack([damping.inverse(spectrum.eigenvalues) for damping in dampings], 1)
    tau_VN, start = np.empty((len(dampings), len(rows_ND))), 0
    for squares_ND in squared_coordinates(spectrum.basis, rows_ND):
        tau_VN[:, start : start + len(squares_ND)] = (squares_ND @ inverse_DV).T
        start += len(squares_ND)
    return tau_VN
