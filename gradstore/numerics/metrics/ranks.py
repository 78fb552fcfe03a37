"""Ranks of values that may be drawn more than once, which is what a bootstrap resample of them is."""

import numpy as np
from jaxtyping import Float, Float64, Int64

# Q rows of S values, and r resamples of their places.


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

    def centred(self, counts_rS: Int64[np.ndarray, "r S"]) -> Float64[np.ndarray, "r Q S"]:
        """Ranks less their mean, where place s is there counts_rS[r, s] times; of places that are not, where they would be."""
        shape = len(counts_rS), *self._shape
        tiled = np.broadcast_to(counts_rS[:, None], shape).reshape(-1)
        places = (np.arange(len(counts_rS))[:, None] * self._flat.size + self._flat).reshape(-1)
        weights = np.bincount(places, weights=tiled, minlength=tiled.size).reshape(shape)
        # Before the values of a rank lie all smaller ones, and of these themselves half.
        middle = np.cumsum(weights, axis=2) - weights / 2 - counts_rS.sum(1)[:, None, None] / 2
        return np.take_along_axis(middle, self._order_QS[None], axis=2)


def correlations(
    first_rQS: Float64[np.ndarray, "r Q S"],
    second_rQS: Float64[np.ndarray, "r Q S"],
    counts_rS: Int64[np.ndarray, "r S"],
) -> Float64[np.ndarray, "r Q"]:
    """Pearson's correlations of rows of centred ranks, each place counted so many times; NaN where a side does not vary."""
    products_rQ = _summed(first_rQS * second_rQS, counts_rS)
    squares_rQ = _summed(first_rQS**2, counts_rS) * _summed(second_rQS**2, counts_rS)
    with np.errstate(invalid="ignore"):
        return np.where(squares_rQ > 0, products_rQ / np.sqrt(squares_rQ), np.nan)


def _summed(
    values_rQS: Float64[np.ndarray, "r Q S"], counts_rS: Int64[np.ndarray, "r S"]
) -> Float64[np.ndarray, "r Q"]:
    # Quarters of whole numbers: their sums are exact in whichever order.
    return (values_rQS @ counts_rS[:, :, None].astype(np.float64))[:, :, 0]
