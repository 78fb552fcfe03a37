"""Contributions C[q, n, j]: what parameter group j adds to the attribution of query q to training example n.

Products of a tile of rows are written as [Q, G, N], the way matrix products give them, and then turned into [Q, N, M] while
they are in the processor's cache.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

# Q queries, N rows of a tile, G groups of a portion, M groups in all.


def group_products(
    queries: Sequence[Float32[np.ndarray, "Q _"]],
    rows: Sequence[Float32[np.ndarray, "N _"]],
    out_QGN: Float32[np.ndarray, "Q G N"],
) -> None:
    r"""Write the contributions of some groups, which a kernel that acts inside a group gives each by itself.

    .. math:: C[q, n, j] = \langle K_j \psi_{q,j}, \phi_{n,j} \rangle

    Parameters
    ----------
    queries
        Preconditioned query features K psi_q [Q, k_j] of every group.
    rows
        Features phi_n [N, k_j] of training examples.
    out_QGN
        Where to.
    """
    for index, (query_QK, row_NK) in enumerate(zip(queries, rows, strict=True)):
        np.matmul(query_QK, row_NK.T, out=out_QGN[:, index])


def summed_products(
    queries: Sequence[Float32[np.ndarray, "Q _"]],
    rows: Sequence[Float32[np.ndarray, "N _"]],
    out_QN: Float32[np.ndarray, "Q N"],
) -> None:
    r"""Write the sum of contributions over some groups, whose weights are in the queries: a part of scores.

    .. math:: S[q, n] = \sum_j \langle w_j K_j \psi_{q,j}, \phi_{n,j} \rangle
    """
    # Rows first: many rows and few queries are multiplied a tenth faster so, and turned once for all groups.
    total_NQ, product_NQ = np.empty((2, *out_QN.T.shape), np.float32)
    np.matmul(rows[0], queries[0].T, out=total_NQ)
    for query_QK, row_NK in zip(queries[1:], rows[1:], strict=True):
        total_NQ += np.matmul(row_NK, query_QK.T, out=product_NQ)
    np.copyto(out_QN, total_NQ.T)


def accumulate(
    portion_QGN: Float32[np.ndarray, "Q G N"],
    factor_N: Float32[np.ndarray, " N"] | None,
    c_QNG: Float32[np.ndarray, "Q N G"],
    *,
    first: bool,
) -> None:
    """Add a portion, times a factor of every row, to C: or put it there, if it is the first of its groups and rows.

    ``portion_QGN`` is overwritten.
    """
    if factor_N is not None:
        np.multiply(portion_QGN, factor_N, out=portion_QGN)
    portion_QNG = portion_QGN.transpose(0, 2, 1)
    if first:
        np.copyto(c_QNG, portion_QNG)
    else:
        np.add(c_QNG, portion_QNG, out=c_QNG)
