"""What the rows and columns of C are divided by, and what DAS multiplies them by: all from self-influence.

The norm of an example under a kernel is sqrt(tau), with its self-influence tau(x, x) = sum_j <(K g(x))_j, g_j(x)> over all
groups. It is global: a norm of each group by itself would make groups alike that weights are to tell apart (ADR 0017).
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float64

# N training examples or Q queries; V dampings; D features of a group.

Normalize = Literal["none", "cosine", "relatif"]


def query_factors(normalize: Normalize, self_Q: Float[np.ndarray, " Q"]) -> Float64[np.ndarray, " Q"]:
    r"""What the contributions of every query are multiplied by.

    .. math:: \text{cosine: } \tau(q, q)^{-1/2}, \qquad \text{none, relatif: } 1

    Parameters
    ----------
    normalize
        Which normalisation.
    self_Q
        tau(q, q): self-contributions over all groups, and members with their eta.
    """
    return inverse_roots(self_Q) if normalize == "cosine" else np.ones(len(self_Q))


def row_factors(normalize: Normalize, self_N: Float[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    r"""What the contributions of every training example are multiplied by.

    .. math:: \text{cosine, relatif: } \tau(n, n)^{-1/2}, \qquad \text{none: } 1

    relatif takes influence relative to how much the example changes losses at large (l-RelatIF, arXiv 2003.11630);
    cosine, with `query_factors`, makes every example contribute 1 to itself.

    Parameters
    ----------
    normalize
        Which normalisation.
    self_N
        tau(n, n): self-influence over all groups, and members with their eta.
    """
    return np.ones(len(self_N)) if normalize == "none" else inverse_roots(self_N)


def inverse_roots(self_X: Float[np.ndarray, " X"]) -> Float64[np.ndarray, " X"]:
    """1 / sqrt(tau) of every example; 0 where tau is 0, because a zero gradient contributes nothing; NaN where it is NaN.

    Of a kernel across groups tau is a sum that cancels, so that rounding may leave less than 0 of nothing.
    """
    root_X = np.sqrt(np.maximum(self_X.astype(np.float64), 0))
    result_X: np.ndarray = np.divide(1, root_X, out=np.zeros_like(root_X), where=root_X != 0)
    return result_X


def left_out_factors(
    residual_N: Float[np.ndarray, " N"], leverage_N: Float[np.ndarray, " N"]
) -> Float64[np.ndarray, " N"]:
    r"""What DAS multiplies the contributions of every training example by.

    .. math:: \frac{r_n}{1 - h_n}, \quad h_n = g(n)^T K g(n)

    (arXiv 2506.05647, eq. 16): one Newton step of leaving example n out. Every leverage must be below 1: see `beyond`.

    Parameters
    ----------
    residual_N
        r_n, the residual of every example (eq. 18).
    leverage_N
        h_n, its self-influence over all groups.
    """
    assert not beyond(leverage_N).any(), "a leverage of 1 or more is refused before"
    return np.asarray(residual_N.astype(np.float64) / (1 - leverage_N.astype(np.float64)))


def beyond(leverage_N: Float[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Rows whose leverage is 1 or more. The inverse of a damped Gram matrix over all features gives none.

    Sums over groups can, and so can a low-rank kernel that leaves out part of the trace: what it does not capture of a row
    counts |phi|^2 / lambda, which has no bound.
    """
    return np.asarray(leverage_N >= 1)
