"""Contributions C[q, n, j]: what parameter group j adds to the attribution of query q to training example n."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float32


def contributions(
    queries: Mapping[str, Float32[np.ndarray, "Q _"]],
    rows: Mapping[str, Float32[np.ndarray, "N _"]],
    groups: Sequence[str],
) -> Float32[np.ndarray, "Q N M"]:
    r"""The contributions of one piece of training rows.

    .. math:: C[q, n, j] = \langle K_j \psi_{q,j}, \phi_{n,j} \rangle

    Parameters
    ----------
    queries
        Preconditioned query features K psi_q [Q, k_j] by group name.
    rows
        Features phi_n [N, k_j] of training examples by group name.
    groups
        Names of the M groups, at least one, in the order of the result's last axis.
    """
    shape = len(queries[groups[0]]), len(rows[groups[0]]), len(groups)
    result_QNM = np.empty(shape, np.float32)
    for index, name in enumerate(groups):
        result_QNM[:, :, index] = queries[name] @ rows[name].T
    return result_QNM
