"""Subset-ranking accuracy: how often scores say rightly which of two subsets a query is better off with."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Final

import numpy as np
from jaxtyping import Float, Float64, Int64

from gradstore.errors import DataError
from gradstore.numerics.metrics.intervals import Comparison, comparisons, resamples

# Q queries, S subsets, W ways to score, V values: the outcomes, then the predictions of each way; r resamples, q queries and
# p pairs of subsets of a tile.

# What a tile holds at most: resamples, queries times values, and pairs.
_RESAMPLES: Final = 256
_ROWS: Final = 512
_PAIRS: Final = 2048


def ranking_accuracy(
    predicted_QS: Float[np.ndarray, "Q S"], outcomes_QS: Float[np.ndarray, "Q S"]
) -> Float64[np.ndarray, " Q"]:
    r"""Share of two subsets with different outcomes that predictions order likewise; equal predictions count half.

    .. math:: A_q = \frac{\sum_{i, j: \, o_{qi} > o_{qj}} \big([f_{qi} > f_{qj}] + \tfrac12 [f_{qi} = f_{qj}]\big)}
        {\sum_{i, j} [o_{qi} > o_{qj}]}

    It is to `gradstore.numerics.representation.ranking_loss` what accuracy is to a cross-entropy, without weights.

    Parameters
    ----------
    predicted_QS
        What scores predict of every subset.
    outcomes_QS
        What the model retrained on each subset outputs for every query, larger is better.

    Returns
    -------
    ndarray
        [Q], in [0, 1]: 0.5 is chance; NaN for a query whose outcomes do not vary.

    Raises
    ------
    DataError
        If a prediction or an outcome is not finite.
    """
    for name, values_QS in (("predictions", predicted_QS), ("outcomes", outcomes_QS)):
        refuse_not_finite(name, int(np.count_nonzero(~np.isfinite(values_QS))), values_QS.size)
    found_Q = np.full(len(predicted_QS), np.nan)
    # A query at a time, as [Q, S, S] may be large.
    for query, (predicted_S, outcomes_S) in enumerate(zip(predicted_QS, outcomes_QS, strict=True)):
        better_SS = np.greater.outer(outcomes_S, outcomes_S)
        if better_SS.any():
            above = np.count_nonzero(better_SS & np.greater.outer(predicted_S, predicted_S))
            not_below = np.count_nonzero(better_SS & np.greater_equal.outer(predicted_S, predicted_S))
            found_Q[query] = (above + not_below) / (2 * np.count_nonzero(better_SS))
    return found_Q


def compare_ranking(
    predicted: Mapping[str, Float[np.ndarray, "Q S"]],
    actual_SQ: Float[np.ndarray, "S Q"],
    *,
    against: str | None = None,
    seed: int,
) -> dict[str, Comparison]:
    r"""Mean ranking accuracy of several ways to score, with 95 % intervals by the resamples of `compare_datamodeling`.

    Both the queries and the subsets are resampled, and the same resamples are taken for all, so that differences are paired. In
    one where subset i is drawn c_i times the accuracy of a query is

    .. math:: A_q = \frac{\sum_{i, j: \, o_{qi} > o_{qj}} c_i c_j \big([f_{qi} > f_{qj}] + \tfrac12 [f_{qi} = f_{qj}]\big)}
        {\sum_{i, j} c_i c_j [o_{qi} > o_{qj}]}

    and a query of which all that was drawn has the same outcome is left out of it. A query of which a way to score says
    nothing, as all its predictions are equal, counts as 0.5 for it.

    Parameters
    ----------
    predicted
        By name, see `ranking_accuracy`.
    actual_SQ
        What retrained models output, larger is better.
    against
        The name that the others' differences are to; None for no differences.
    seed
        Of the bootstrap.

    Raises
    ------
    DataError
        If there is no query, there are fewer than two subsets, the outcomes of a query do not vary, or an outcome or a
        prediction is not finite.
    """
    subsets, queries = actual_SQ.shape
    if subsets < 2 or queries < 1:
        raise DataError(
            f"ranking: found {subsets} subsets and {queries} queries; it needs at least 2 subsets and a query."
        )
    if strange := np.flatnonzero((actual_SQ == actual_SQ[0]).all(0)).tolist():
        raise DataError(f"ranking: the outcomes of the queries {strange} do not vary. Leave them out.")
    own = {name: float(ranking_accuracy(of_QS, actual_SQ.T).mean()) for name, of_QS in predicted.items()}
    # As whole numbers in the same order, whose differences neither overflow nor vanish.
    order_VQS = np.stack([_order(values_QS) for values_QS in (actual_SQ.T, *predicted.values())])
    drawn = zip(
        resamples(subsets, what="subsets", seed=seed), resamples(queries, what="queries", seed=seed), strict=True
    )
    means = []
    while tile := [*islice(drawn, _RESAMPLES)]:
        subsets_rS = np.stack([np.bincount(of_subsets, minlength=subsets) for of_subsets, _ in tile])
        queries_rQ = np.stack([np.bincount(of_queries, minlength=queries) for _, of_queries in tile])
        means.append(_means(order_VQS, subsets_rS, queries_rQ))
    return comparisons(own, dict(zip(predicted, np.concatenate(means).T, strict=True)), against)


def refuse_not_finite(name: str, strange: int, values: int) -> None:
    """Refuse values of which some are not finite.

    Raises
    ------
    DataError
        If there are ``strange`` ones.
    """
    if strange:
        raise DataError(
            f"ranking: {strange:,} of {values:,} {name} are not finite. Leave out their queries, or the training examples and "
            "models they come from."
        )


def _order(values_QS: Float[np.ndarray, "Q S"]) -> Int64[np.ndarray, "Q S"]:
    """Places of values among the different ones of their row."""
    found = [np.unique(row, return_inverse=True)[1] for row in values_QS]
    return np.array(found, np.int64).reshape(values_QS.shape)


def _means(
    order_VQS: Int64[np.ndarray, "V Q S"], subsets_rS: Int64[np.ndarray, "r S"], queries_rQ: Int64[np.ndarray, "r Q"]
) -> Float64[np.ndarray, "r W"]:
    """Mean accuracy of every way to score in some resamples, given by how often each has the subsets and the queries."""
    values, queries, _ = order_VQS.shape
    totals_rW, kept_r1 = np.zeros((len(subsets_rS), values - 1)), np.zeros((len(subsets_rS), 1))
    size = max(1, _ROWS // values)
    for first in range(0, queries, size):
        some = slice(first, first + size)
        sums_rVq = _sums(order_VQS[:, some], subsets_rS)
        differ_rq, balance_rWq = sums_rVq[:, 0], sums_rVq[:, 1:]
        # Pairs in the right order less those in the wrong one, over all that differ, go from -1 to 1.
        accuracies_rWq = (1 + balance_rWq / np.where(differ_rq > 0, differ_rq, 1)[:, None]) / 2
        # A resample may be of one subset many times, or of subsets that gave a query the same output.
        counts_rq = np.where(differ_rq > 0, queries_rQ[:, some], 0)
        totals_rW += (accuracies_rWq * counts_rq[:, None]).sum(2)
        kept_r1 += counts_rq.sum(1, keepdims=True)
    return np.where(kept_r1 > 0, totals_rW / np.maximum(kept_r1, 1), np.nan)


def _sums(order_Vqs: Int64[np.ndarray, "V q S"], subsets_rS: Int64[np.ndarray, "r S"]) -> Float64[np.ndarray, "r V q"]:
    """How many pairs of subsets, as often as they are drawn, values order like the outcomes, less those that they order otherwise."""
    sums_rVq = np.zeros((len(subsets_rS), *order_Vqs.shape[:2]))
    for one_p, other_p in _pairs(order_Vqs.shape[2]):
        signs_Vqp = np.sign(order_Vqs[:, :, one_p] - order_Vqs[:, :, other_p])
        # Whole numbers in float64: sums are exact in whatever tiles they are taken.
        agree_Vqp = (signs_Vqp[:1] * signs_Vqp).astype(np.float64)
        counts_rp = (subsets_rS[:, one_p] * subsets_rS[:, other_p]).astype(np.float64)
        sums_rVq += np.tensordot(counts_rp, agree_Vqp, axes=(1, 2))
    return sums_rVq


def _pairs(subsets: int) -> Iterator[tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]]:
    """Yield every two subsets once, the lower first, so many at a time."""
    # Pairs are numbered by the higher of the two: j has j of them, from j (j - 1) / 2 on.
    starts_S = np.arange(subsets) * np.arange(-1, subsets - 1) // 2
    total = subsets * (subsets - 1) // 2
    for first in range(0, total, _PAIRS):
        numbers_p = np.arange(first, min(first + _PAIRS, total))
        higher_p = np.searchsorted(starts_S, numbers_p, side="right") - 1
        yield numbers_p - starts_S[higher_p], higher_p
