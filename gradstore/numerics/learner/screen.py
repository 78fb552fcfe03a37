r"""Which rows of C may reach given scores: a float32 product, with a margin that no rounding can exceed.

With u = 2^-24 and M terms, in whatever order they are summed, with or without fused operations,

.. math:: |\mathrm{fl}(\textstyle\sum_j w_j C_j) - \sum_j w_j C_j| \le \gamma \sum_j w_j |C_j| + 2^{-125} (M + \sum_j w_j),
          \quad \gamma = \frac{(M + 5) u}{1 - (M + 5) u}

(Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1): M u of the products and sums, u of rounding w to
float32, and the rest for second order terms and the slack of ties (TIE is far below u). The absolute term is of numbers that
underflow, and are flushed to zero on some processors.
"""

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

# N rows of a slice, H of them that the first margin lets through, M groups, V visits, B visits of the C blocks of some rows.

UNIT_ROUNDING = 2.0**-24
UNDERFLOW = 2.0**-125
# Added to w in margins: a w_j that float32 flushes to zero loses less than gamma times this.
LEAST_WEIGHT = 2.0**-101
# Units of scores are at most 2 to this.
LARGEST_EXPONENT = 100
# A few visits' scores of rows that fit in a core's cache take two thirds of the time of many rows at once.
ROWS_PER_PRODUCT = 256
# As many rows are compared as if they were one, because a comparison of a few visits has more overhead than work.
ROWS_PER_COMPARISON = 64
# Zero norms are equal.
LEAST_NORM = float(np.finfo(np.float64).tiny)
# Group norms come from A_q, whose products are float32.
NORM_ROUNDING = 1e-3


class Screen:
    r"""Finds rows of C_q whose placing scores may reach a least one at some visit.

    Scores are in units of a power of two near ||S||, so that their squares keep within float32's range. A first margin takes
    |C_nj| <= ||C_q[:, j]||, the root of A_q's diagonal: it costs nothing. A second one takes the |C_nj| of the row itself, for
    the rows that are left. NaN and infinite numbers in C are not found by either, but by `is_finite`.

    Parameters
    ----------
    weights_VM
        w of every visit.
    norms_V
        ||S|| of every visit.
    group_norms_M
        ||C_q[:, j]||.
    square_V
        Whether rows are placed by |S|.
    """

    def __init__(
        self,
        weights_VM: Float64[np.ndarray, "V M"],
        *,
        norms_V: Float64[np.ndarray, " V"],
        group_norms_M: Float64[np.ndarray, " M"],
        square_V: Bool[np.ndarray, " V"],
    ) -> None:
        num_groups = weights_VM.shape[1]
        # Where the norm is zero, the least unit: should C not be zero there, its squares are not either.
        exponents_V = np.where(norms_V > 0, np.frexp(norms_V)[1], -LARGEST_EXPONENT)
        self._unit_V = np.ldexp(1.0, np.clip(exponents_V, -LARGEST_EXPONENT, LARGEST_EXPONENT))
        scaled_VM = weights_VM / self._unit_V[:, None]
        self._weights_MV = np.ascontiguousarray(scaled_VM.T, dtype=np.float32)
        self._most_M = (scaled_VM.max(0, initial=0) + LEAST_WEIGHT).astype(np.float32)
        terms = (num_groups + 5) * UNIT_ROUNDING
        self._gamma = terms / (1 - terms)
        self._underflow = UNDERFLOW * (num_groups + float(scaled_VM.max(0, initial=0).sum()))
        bound_V = (scaled_VM + LEAST_WEIGHT) @ group_norms_M * (1 + NORM_ROUNDING)
        self._margin_V = self._gamma * bound_V + self._underflow
        self._square_V = square_V
        self._norms_V = norms_V / self._unit_V
        self._squares_V = np.zeros(len(weights_VM))

    def is_finite(self) -> bool:
        """Whether all scores so far are finite."""
        return bool(np.isfinite(self._squares_V).all())

    def norm_errors(self) -> Float64[np.ndarray, " V"]:
        r"""Relative differences between the norms given and those of all scores so far, beyond what float32 may lose of these.

        That is gamma sum_j w_j ||C_q[:, j]||, because a norm of sums is at most the sum of norms.
        """
        streamed_V, given_V = np.sqrt(self._squares_V), self._norms_V
        # A norm is zero only if all of C is: then float32 loses nothing.
        lost_V = np.where(given_V > 0, self._margin_V, 0)
        beyond_V = np.maximum(0, np.abs(given_V - streamed_V) - lost_V)
        # Where squares pass float32's range, the difference is all of them.
        with np.errstate(invalid="ignore"):
            error_V = beyond_V / np.maximum(np.maximum(given_V, streamed_V), LEAST_NORM)
        return np.asarray(np.where(np.isnan(error_V), 1.0, error_V))

    def require(self, least_V: Float64[np.ndarray, " V"]) -> None:
        """Set the placing scores to be reached, each less than its slack for ties."""
        self._least_V = least_V / self._unit_V
        with np.errstate(over="ignore"):
            low_V = (self._least_V - self._margin_V).astype(np.float32)
        self._low_V = np.nextafter(low_V, np.float32(-np.inf))
        self._low_B = np.tile(self._low_V, ROWS_PER_COMPARISON)

    def scores(self, c_NM: Float32[np.ndarray, "N M"]) -> Float32[np.ndarray, "N V"]:
        """The placing scores of a slice, in units of the visit's; their squares are summed."""
        with np.errstate(over="ignore", invalid="ignore"):
            score_NV = np.empty((len(c_NM), self._weights_MV.shape[1]), np.float32)
            for start in range(0, len(c_NM), ROWS_PER_PRODUCT):
                rows = slice(start, start + ROWS_PER_PRODUCT)
                np.matmul(c_NM[rows], self._weights_MV, out=score_NV[rows])
            self._squares_V += np.einsum("nv,nv->v", score_NV, score_NV)
        if self._square_V.any():
            np.abs(score_NV, out=score_NV, where=self._square_V)
        return score_NV

    def near(self, score_NV: Float32[np.ndarray, "N V"]) -> Int64[np.ndarray, " H"]:
        """Places of the rows that reach a least score at some visit, less the first margin."""
        visits = len(self._low_V)
        whole = len(score_NV) // ROWS_PER_COMPARISON * ROWS_PER_COMPARISON
        block_CB = score_NV[:whole].reshape(-1, len(self._low_B))
        near = np.flatnonzero(block_CB >= self._low_B), np.flatnonzero(score_NV[whole:] >= self._low_V) + whole * visits
        return np.asarray(np.unique(np.concatenate(near) // visits))

    def nearer(self, score_HV: Float32[np.ndarray, "H V"], c_HM: Float32[np.ndarray, "H M"]) -> Bool[np.ndarray, " H"]:
        """Which rows reach a least score at some visit, less the second margin."""
        with np.errstate(over="ignore"):
            bound_H = (np.abs(c_HM) @ self._most_M).astype(np.float64)
        # The bound is rounded itself.
        margin_H = self._gamma * (1 + 4 * self._gamma) * bound_H + 2 * self._underflow
        return np.asarray((score_HV + margin_H[:, None] >= self._least_V).any(1))
