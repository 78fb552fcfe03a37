r"""Weights by a formula: of every group its signal over its noise, as the model behind Algorithm 1 suggests.

arXiv 2506.05647 (A.1) takes C_q[n, j] for alpha_j I(q, n) + noise of variance sigma_j^2, independent across groups. Then the
signal-to-noise ratio of S, (sum_j w_j alpha_j)^2 / sum_j w_j^2 sigma_j^2, is largest at w_j proportional to
alpha_j / sigma_j^2 (Cauchy-Schwarz). The same follows from the loss, if the top k are those under uniform weights u and what
A_q = C_q^T C_q has off its diagonal is left out:

.. math:: -L_q(w) = \frac{a_q \cdot w}{\sqrt{w^T A_q w}} \approx \frac{a_q \cdot w}{\sqrt{\sum_j w_j^2 A_q[j, j]}},

with a_q the mean of the k rows of C_q. L_q is the same for any multiple of C_q, so that C_q may be divided by ||C_q u||: the
scale of a query then has no say, as in the loss, and where all queries have one a and one diagonal, w_j = a_j / A[j, j] is
the minimum. So alpha and sigma^2 are the means of a_q and of A_q's diagonal over queries that are divided so.
"""

import numpy as np
from jaxtyping import Float64

from gradstore.numerics.learner.algorithm import placing_scores, refuse_k_above, refuse_no_query
from gradstore.numerics.learner.kept import KeptRows, top_rows
from gradstore.numerics.scores import Transform

# Q queries, M groups, K rows kept of a query.


def closed_form_weights(
    second_moments_QMM: Float64[np.ndarray, "Q M M"],
    kept: KeptRows,
    *,
    k: int,
    num_rows: int,
    transform: Transform,
) -> Float64[np.ndarray, " M"]:
    r"""Signal over noise of every group: w [M], which sums to 1 and may hold zeros.

    .. math:: w_j \propto \frac{\max(0, \alpha_j)}{\sigma_j^2},
              \quad \alpha_j = \sum_q \frac{\sum_{n \in \text{top-}k} C_q[n, j]}{\lVert C_q u \rVert},
              \quad \sigma_j^2 = \sum_q \frac{A_q[j, j]}{\lVert C_q u \rVert^2}

    The top k are those under uniform weights u = 1 / M; of scores that are squared in the end they are those of the largest
    abs(S), and rows count sign(S) times. Numbers of queries and rows scale all w alike. A query of zero norm is left out. Where
    no group has a signal above 0, w is uniform.

    Parameters
    ----------
    second_moments_QMM
        A_q.
    kept
        Rows that hold the top k under uniform weights of every query: `gradstore.numerics.moments.read_best_rows` finds them.
    k
        Number of rows whose mean is the signal.
    num_rows
        N, which k may not exceed.
    transform
        What becomes of the scores when rows are ranked in the end.

    Raises
    ------
    SpecError
        If there is no query, or k is above the number of rows.
    """
    num_queries, num_groups, _ = second_moments_QMM.shape
    refuse_no_query(num_queries)
    refuse_k_above(num_rows, k)
    uniform_M = np.full(num_groups, 1 / num_groups)
    signal_M, noise_M = np.zeros(num_groups), np.zeros(num_groups)
    for query, second_moments_MM in enumerate(second_moments_QMM):
        squared_norm = float(uniform_M @ second_moments_MM @ uniform_M)
        if squared_norm <= 0:
            continue
        c_KM = kept.c(query).astype(np.float64)
        score_K = c_KM @ uniform_M
        top_K = top_rows(placing_scores(score_K, transform)[:, None], k)[:, 0]
        assert top_K.sum() == k, f"query {query}: {len(c_KM)} rows are kept, less than the top {k}"
        signs_K = np.where(top_K, np.sign(score_K) if transform == "square" else 1.0, 0.0)
        signal_M += signs_K @ c_KM / np.sqrt(squared_norm)
        noise_M += second_moments_MM.diagonal() / squared_norm
    weights_M = np.divide(np.maximum(signal_M, 0), noise_M, out=np.zeros(num_groups), where=noise_M > 0)
    return np.asarray(weights_M / weights_M.sum()) if weights_M.any() else uniform_M
