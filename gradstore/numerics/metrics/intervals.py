"""Means with what the bootstrap says of them: 95 % percentile intervals by 2,000 resamples."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from gradstore.errors import DataError
from gradstore.numerics.generator import derive_key, successive

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean and the interval that holds it with 95 % confidence."""

    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """What one method is worth, and its paired difference to another; both with 95 % intervals."""

    interval: Interval
    difference: Interval | None


def mean_interval(values: Sequence[float], *, seed: int) -> Interval:
    """Mean over queries with its 95 % percentile bootstrap interval (2,000 resamples of the queries).

    Raises
    ------
    DataError
        If there is no value.
    """
    if len(values) == 0:
        raise DataError("confidence interval: found 0 values; it needs at least 1.")
    values_Q = np.asarray(values, dtype=np.float64)
    means = [values_Q[draw_Q].mean() for draw_Q in resamples(len(values_Q), what="bootstrap", seed=seed)]
    return percentiles(float(values_Q.mean()), np.array(means))


def paired_interval(values: Mapping[int, float], others: Mapping[int, float], *, seed: int) -> Interval | None:
    r"""Mean difference of two measurements over the queries that both have, with its interval; None where they share none.

    .. math:: \frac{1}{|Q|} \sum_{q \in Q} (m(q) - m'(q))

    Parameters
    ----------
    values, others
        m and m', by the number of the query.
    seed
        Of the bootstrap.
    """
    differences = [value - others[query] for query, value in values.items() if query in others]
    return mean_interval(differences, seed=seed) if differences else None


def resamples(count: int, *, what: str, seed: int) -> Iterator[Int64[np.ndarray, " count"]]:
    """Yield, 2,000 times, as many places as there are, drawn with replacement; ``what`` keeps draws apart that go together."""
    for drawn in islice(successive(derive_key(seed, "metrics", what), count), RESAMPLES):
        yield (drawn % np.uint64(count)).astype(np.int64)


def percentiles(mean: float, resampled: Float64[np.ndarray, " resamples"]) -> Interval:
    """Return the interval between the 2.5th and the 97.5th percentile of what resamples gave; NaN among them is passed over."""
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def comparisons(
    own: Mapping[str, float], resampled: Mapping[str, Float64[np.ndarray, " resamples"]], against: str | None
) -> dict[str, Comparison]:
    """What methods are worth, by what each is and what it was in the same resamples; differences are to the one ``against``."""
    return {
        name: Comparison(
            interval=percentiles(mean, resampled[name]),
            difference=None
            if against is None or name == against
            else percentiles(mean - own[against], resampled[name] - resampled[against]),
        )
        for name, mean in own.items()
    }
