"""The linear datamodeling score (LDS): how well scores predict the outputs of models trained on subsets."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from gradstore.errors import DataError
from gradstore.numerics.generator import derive_key, permutation, words
from gradstore.numerics.metrics.intervals import Comparison, comparisons, resamples
from gradstore.numerics.metrics.ranks import Ranks, correlations

# How many ranks are worked on at once: they fit in a core's cache.
_TILE: Final = 2**15


class DatamodelingScore(NamedTuple):
    """The linear datamodeling score of every query, and their mean."""

    mean: float
    """NaN where that of a query is."""
    correlations: Float64[np.ndarray, " Q"]
    """In [-1, 1]; NaN of a query without a rank correlation."""


def subset_mask(subset: int, rows: int, *, share: float, seed: int) -> Bool[np.ndarray, " N"]:
    """Draw a subset of the train examples: ``share`` of them, rounded down, uniformly.

    The draw is of (seed, subset) alone, whatever other subsets there are.

    Raises
    ------
    DataError
        If it would hold no example, or all of them.
    """
    size = int(share * rows)
    if not 0 < size < rows:
        raise DataError(
            f"LDS: a share of {share} of {rows:,} examples is {size:,}; a subset has some of them, not all."
        )
    return permutation(words(derive_key(seed, "lds", f"subset {subset}"), rows)) < size


class SubsetSums:
    r"""What scores predict of models that were trained on subsets, added up as scores stream by.

    .. math:: P[q, s] = \sum_{n \in s} S[q, n]

    Parameters
    ----------
    masks_SN
        True where an example is in a subset. What is added of no example counts in none.
    num_queries
        Q.
    """

    def __init__(self, masks_SN: Bool[np.ndarray, "S N"], num_queries: int) -> None:
        self._masks_SN = masks_SN
        self._sums_QS = np.zeros((num_queries, len(masks_SN)))
        self._sizes_Q = np.zeros(num_queries)

    def add(self, scores_qn: Float[np.ndarray, "q n"], rows_n: Int64[np.ndarray, " n"], first: int = 0) -> None:
        """Take in the scores of some examples, given by their numbers, for some queries from the ``first`` on.

        Raises
        ------
        DataError
            If a score is not finite.
        """
        _refuse_not_finite("scores", scores_qn)
        queries = slice(first, first + len(scores_qn))
        wide_qn = scores_qn.astype(np.float64)
        self._sums_QS[queries] += wide_qn @ self._masks_SN[:, rows_n].T.astype(np.float64)
        self._sizes_Q[queries] += np.abs(wide_qn).sum(1)

    def total(self) -> Float64[np.ndarray, "Q S"]:
        """P; zero for a query whose sums differ by no more than rounding."""
        # Sums of equal scores in another order differ in their last bits, which must not become ranks.
        rounding_Q = self._masks_SN.shape[1] * np.finfo(np.float64).eps * self._sizes_Q
        return np.where((np.ptp(self._sums_QS, axis=1) <= rounding_Q)[:, None], 0.0, self._sums_QS)


def linear_datamodeling_score(
    predicted_QS: Float64[np.ndarray, "Q S"], actual_SQ: Float[np.ndarray, "S Q"]
) -> DatamodelingScore:
    r"""How well scores predict what models output that were trained on subsets of the training examples (LDS).

    .. math:: \mathrm{LDS}_q = \rho_s \Big(f(q; \theta_s), \; \sum_{n \in s} S[q, n]\Big)

    with rho_s Spearman's rank correlation over the subsets s (arXiv 2506.05647, eq. 8-9). Ranks of equal values are
    averaged. Where the outputs of a query do not vary, or the predictions do not but for rounding, there is no
    correlation: that is NaN, and so is the mean. A query left out of the mean in silence would favour a method that
    scores nothing for hard queries, so that is for the caller to do and to tell.

    Parameters
    ----------
    predicted_QS
        Sums of the scores in each subset, as `SubsetSums` makes them.
    actual_SQ
        What the model retrained on each subset outputs for every query, larger is better: minus a loss; margins and
        log-probabilities as they are.

    Raises
    ------
    DataError
        If there is no query, there are fewer than two subsets, or an output is not finite.
    """
    _refuse_too_few(predicted_QS)
    _refuse_not_finite("actual outputs", actual_SQ)
    once_1S = np.ones((1, predicted_QS.shape[1]), np.int64)
    (found_Q,) = correlations(Ranks(predicted_QS).centred(once_1S), Ranks(actual_SQ.T).centred(once_1S), once_1S)
    return DatamodelingScore(float(found_Q.mean()), found_Q)


def compare_datamodeling(
    predicted: Mapping[str, Float64[np.ndarray, "Q S"]],
    actual_SQ: Float[np.ndarray, "S Q"],
    *,
    against: str | None = None,
    seed: int,
) -> dict[str, Comparison]:
    """Mean LDS of several ways to score, with 95 % intervals by a two-way bootstrap: of the queries and of the subsets.

    Retrained subsets are shared by all queries, so that a bootstrap of the queries alone would be too sure. Every resample is
    the same for all, so that differences are paired. A query of which a way to score says nothing, as all its predictions are
    equal, counts as 0 for it: left out it would favour what scores nothing for hard queries.

    Parameters
    ----------
    predicted
        By name, see `linear_datamodeling_score`.
    actual_SQ
        What retrained models output.
    against
        The name that the others' differences are to; None for no differences.
    seed
        Of the bootstrap.

    Raises
    ------
    DataError
        If the outputs of a query do not vary.
    """
    if strange := np.flatnonzero(np.ptp(actual_SQ, axis=0) == 0).tolist():
        raise DataError(f"LDS: the outputs of the queries {strange} do not vary. Leave them out.")
    own = {
        name: float(np.nan_to_num(linear_datamodeling_score(of_QS, actual_SQ).correlations).mean())
        for name, of_QS in predicted.items()
    }
    resampled = dict(zip(predicted, _resampled_means([*predicted.values()], actual_SQ, seed).T, strict=True))
    return comparisons(own, resampled, against)


def _resampled_means(
    predicted: Sequence[Float64[np.ndarray, "Q S"]], actual_SQ: Float[np.ndarray, "S Q"], seed: int
) -> Float64[np.ndarray, "resamples V"]:
    """Mean LDS of each of V predictions in every resample of the queries and the subsets."""
    actual, ranks = Ranks(actual_SQ.T), Ranks(np.concatenate(predicted))
    subsets, queries = actual_SQ.shape
    drawn = zip(
        resamples(subsets, what="subsets", seed=seed), resamples(queries, what="queries", seed=seed), strict=True
    )
    at_once = max(1, _TILE // (len(predicted) * queries * subsets))
    means = []
    while tile := [*islice(drawn, at_once)]:
        counts_rS = np.stack([np.bincount(places_S, minlength=subsets) for places_S, _ in tile])
        outputs_rQS = actual.centred(counts_rS)
        found_rQ = correlations(ranks.centred(counts_rS), np.tile(outputs_rQS, (1, len(predicted), 1)), counts_rS)
        found_rVQ = np.nan_to_num(found_rQ).reshape(len(tile), len(predicted), queries)
        # A resample may be of one subset many times, or of subsets that gave a query the same output.
        varies_rQ = ((outputs_rQS != 0) & (counts_rS[:, None] > 0)).any(2)
        for (_, draw_Q), varies_Q, found_VQ in zip(tile, varies_rQ, found_rVQ, strict=True):
            kept = draw_Q[varies_Q[draw_Q]]
            means.append(found_VQ[:, kept].mean(1) if len(kept) else np.full(len(predicted), np.nan))
    return np.array(means)


def _refuse_too_few(predicted_QS: Float64[np.ndarray, "Q S"]) -> None:
    queries, subsets = predicted_QS.shape
    if subsets < 2 or queries < 1:
        raise DataError(f"LDS: found {subsets} subsets and {queries} queries; it needs at least 2 subsets and a query.")


def _refuse_not_finite(name: str, values: Float[np.ndarray, "..."]) -> None:
    if strange := int(np.count_nonzero(~np.isfinite(values))):
        raise DataError(
            f"LDS: {strange:,} of {values.size:,} {name} are not finite. Leave out their queries, or the training examples "
            "and models they come from."
        )
