"""Ranks of values that may be drawn more than once, which is what a bootstrap resample of them is."""

import numpy as np
from jaxtyping import Float, Float64, Int64


class Ranks:
    """Rows of values, of which the ranks within any resample of their places are known without sorting again.

    Parameters
    ----------
    values_QS
        The values; equal ones share the mean of their ranks.
    """

    def __init__(self, values_QS: Float[np.ndarray, "Q S"]) -> None:
        self._shape = values_QS.shape
        found = [np.unique(row, return_inverse=True)[1] for row in values_QS]
        self._order_QS = np.array(found, np.int64).reshape(self._shape)
        offsets = np.arange(self._shape[0])[:, None] * self._shape[1]
        self._flat = (self._order_QS + offsets).reshape(-1)

    def centred(self, counts_S: Int64[np.ndarray, " S"]) -> Float64[np.ndarray, "Q S"]:
        """Ranks less their mean, where place s is there counts_S[s] times; of places that are not, where they would be."""
        tiled = np.broadcast_to(counts_S, self._shape).reshape(-1)
        weights = np.bincount(self._flat, weights=tiled, minlength=tiled.size).reshape(self._shape)
        # Before the values of a rank lie all smaller ones, and of these themselves half.
        middle = np.cumsum(weights, axis=1) - weights / 2 - counts_S.sum() / 2
        return np.take_along_axis(middle, self._order_QS, axis=1)


def correlations(
    first_QS: Float64[np.ndarray, "Q S"], second_QS: Float64[np.ndarray, "Q S"], counts_S: Int64[np.ndarray, " S"]
) -> Float64[np.ndarray, " Q"]:
    """Pearson's correlations of rows of centred ranks, each place counted so many times; NaN where a side does not vary."""
    products_Q = (first_QS * second_QS) @ counts_S
    squares_Q = ((first_QS**2) @ counts_S) * ((second_QS**2) @ counts_S)
    with np.errstate(invalid="ignore"):
        return np.where(squares_Q > 0, products_Q / np.sqrt(squares_Q), np.nan)
