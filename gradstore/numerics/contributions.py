"""Contributions C[q, n, j]: what parameter group j adds to the attribution of query q to training example n.

Products of a tile of rows are written as [N, G, Q], rows first, since many rows and few queries are multiplied a fifth faster
so; and then turned into [Q, N, M] while they are near the processor.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

# Q queries, N rows of a tile, G groups of a portion, M groups in all.


def group_products(
    queries: Sequence[Float32[np.ndarray, "Q _"]],
    rows: Sequence[Float32[np.ndarray, "N _"]],
    out_NGQ: Float32[np.ndarray, "N G Q"],
) -> None:
    r"""Write the contributions of some groups, which a kernel that acts inside a group gives each by itself.

    .. math:: C[q, n, j] = \langle K_j \psi_{q,j}, \phi_{n,j} \rangle

    Parameters
    ----------
    queries
        Preconditioned query features K psi_q [Q, k_j] of every group.
    rows
        Features phi_n [N, k_j] of training examples.
    out_NGQ
        Where to.
    """
    for index, (query_QK, row_NK) in enumerate(zip(queries, rows, strict=True)):
        np.matmul(row_NK, query_QK.T, out=out_NGQ[:, index])


def summed_products(
    queries: Sequence[Float32[np.ndarray, "Q _"]],
    rows: Sequence[Float32[np.ndarray, "N _"]],
    out_NQ: Float32[np.ndarray, "N Q"],
) -> None:
    r"""Write the sum of contributions over some groups, whose weights are in the queries: a part of scores.

    .. math:: S[q, n] = \sum_j \langle w_j K_j \psi_{q,j}, \phi_{n,j} \rangle
    """
    np.matmul(rows[0], queries[0].T, out=out_NQ)
    product_NQ = np.empty(out_NQ.shape, np.float32)
    for query_QK, row_NK in zip(queries[1:], rows[1:], strict=True):
        out_NQ += np.matmul(row_NK, query_QK.T, out=product_NQ)


def accumulate(
    portion_NGQ: Float32[np.ndarray, "N G Q"],
    factor_N: Float32[np.ndarray, " N"] | None,
    c_QNG: Float32[np.ndarray, "Q N G"],
    *,
    first: bool,
) -> None:
    """Add a portion, times a factor of every row, to C: or put it there, if it is the first of its groups and rows.

    ``portion_NGQ`` is overwritten.
    """
    if factor_N is not None:
        portion_NGQ *= factor_N[:, None, None]
    portion_QNG = portion_NGQ.transpose(2, 0, 1)
    if first:
        np.copyto(c_QNG, portion_QNG)
    else:
        np.add(c_QNG, portion_QNG, out=c_QNG)
