"""The area under the ROC curve (AUC): how surely a score is higher for what is to be found than for what is not."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from gradstore.errors import DataError
from gradstore.numerics.metrics.intervals import Comparison, comparisons, resamples
from gradstore.numerics.metrics.ranks import Ranks


def area_under_curve(scores_N: Float[np.ndarray, " N"], wanted_N: Bool[np.ndarray, " N"]) -> float:
    r"""Probability that an example that is wanted scores higher than one that is not; equal scores count half.

    .. math:: \mathrm{AUC} = P(s_+ > s_-) + \tfrac{1}{2} P(s_+ = s_-)

    Parameters
    ----------
    scores_N
        Score of every example.
    wanted_N
        True where an example is to be found.

    Raises
    ------
    DataError
        If all examples are wanted, or none, or a score is not finite.
    """
    _refuse_hopeless(scores_N, wanted_N)
    return float(_areas(Ranks(scores_N[None].astype(np.float64)), wanted_N, np.ones(len(wanted_N), np.int64))[0])


def compare_detection(
    scores: Mapping[str, Float[np.ndarray, " N"]],
    wanted_N: Bool[np.ndarray, " N"],
    *,
    against: str | None = None,
    seed: int,
) -> dict[str, Comparison]:
    """AUC of several scores with 95 % intervals, by a bootstrap of those that are wanted and of those that are not.

    Every resample is the same for all scores, so that differences are paired.

    Parameters
    ----------
    scores
        By name, see `area_under_curve`.
    wanted_N
        True where an example is to be found.
    against
        The name that the others' differences are to; None for no differences.
    seed
        Of the bootstrap.

    Raises
    ------
    DataError
        If all examples are wanted, or none, or a score is not finite.
    """
    for scores_N in scores.values():
        _refuse_hopeless(scores_N, wanted_N)
    names, ranks = [*scores], Ranks(np.stack([np.asarray(scores[name], np.float64) for name in scores]))
    own_V = _areas(ranks, wanted_N, np.ones(len(wanted_N), np.int64))
    sides = np.flatnonzero(wanted_N), np.flatnonzero(~wanted_N)
    draws = zip(
        *(resamples(len(side), what=what, seed=seed) for side, what in zip(sides, ("wanted", "others"), strict=True)),
        strict=True,
    )
    found = []
    for places in draws:
        drawn = np.concatenate([side[of] for side, of in zip(sides, places, strict=True)])
        found.append(_areas(ranks, wanted_N, np.bincount(drawn, minlength=len(wanted_N))))
    resampled = dict(zip(names, np.array(found).T, strict=True))
    own = dict(zip(names, own_V.tolist(), strict=True))
    return comparisons(own, resampled, against)


def _areas(
    ranks: Ranks, wanted_N: Bool[np.ndarray, " N"], counts_N: Int64[np.ndarray, " N"]
) -> Float64[np.ndarray, " V"]:
    r"""Areas by the ranks of what is wanted (Mann and Whitney), each example counted so many times.

    Ranks less their mean sum to n_+ n_- (AUC - 1/2) over the wanted ones.
    """
    wanted = int(counts_N[wanted_N].sum())
    others = int(counts_N.sum()) - wanted
    (centred_VN,) = ranks.centred(counts_N[None])
    sums_V = centred_VN[:, wanted_N] @ counts_N[wanted_N].astype(np.float64)
    return np.asarray(sums_V / (wanted * others) + 0.5)


def _refuse_hopeless(scores_N: Float[np.ndarray, " N"], wanted_N: Bool[np.ndarray, " N"]) -> None:
    wanted = int(np.count_nonzero(wanted_N))
    if not 0 < wanted < len(wanted_N):
        raise DataError(f"AUC: {wanted:,} of {len(wanted_N):,} examples are to be found; it needs some of both.")
    if strange := int(np.count_nonzero(~np.isfinite(scores_N))):
        raise DataError(f"AUC: {strange:,} of {len(scores_N):,} scores are not finite. Leave out their examples.")
