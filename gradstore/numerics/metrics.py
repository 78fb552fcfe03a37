"""How good an attribution is: label precision, which is about topics; tail-patch and LDS, which are about effect."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn

from gradstore.errors import DataError, SpecError
from gradstore.numerics.generator import derive_key, words

Example = TypeVar("Example")
RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean and the interval that holds it with 95 % confidence."""

    mean: float
    low: float
    high: float


class DatamodelingScore(NamedTuple):
    """The linear datamodeling score of every query, and their mean."""

    mean: float
    """NaN where that of a query is."""
    correlations: Float64[np.ndarray, " Q"]
    """In [-1, 1]; NaN of a query without a rank correlation."""


def precision_at_k(ranked_labels: Sequence[str | None], label: str, *, k: int) -> float:
    """Share of the first k ranked training examples that carry the query's label.

    Parameters
    ----------
    ranked_labels
        Labels of the training examples, best first; None is the query's label for no query.
    label
        The query's label.
    k
        How many of the first are looked at.

    Raises
    ------
    SpecError
        If fewer than k are ranked.
    """
    if not 1 <= k <= len(ranked_labels):
        raise SpecError(f"precision at {k}: only {len(ranked_labels)} proponents are ranked. Raise score.k or lower k.")
    return sum(ranked == label for ranked in ranked_labels[:k]) / k


def chance_precision(train_labels: Sequence[str | None], query_labels: Sequence[str]) -> float:
    """Expected precision of a random ranking: each query's label's share of the training examples, mean over queries.

    Raises
    ------
    DataError
        If there is no training example or no query.
    """
    if not train_labels or not query_labels:
        raise DataError(f"chance precision of {len(query_labels)} queries among {len(train_labels)} training examples.")
    counts = Counter(train_labels)
    return sum(counts[label] for label in query_labels) / (len(train_labels) * len(query_labels))


def tail_patch(
    model: nn.Module,
    outputs: Callable[[nn.Module, Sequence[Example]], Float[Tensor, " B"]],
    query: Example,
    proponents: Sequence[Example],
    *,
    optimizer: str,
    learning_rate: float,
) -> float:
    r"""Relative change, in percent, of a query's log-probability after one optimizer step on its proponents.

    .. math:: 100 \, (\log p_{after} - \log p_{before}) / |\log p_{before}|

    The step is on the mean over proponents of their summed token losses, over every parameter, by a fresh optimizer
    without weight decay. The model is restored bit by bit, also after an error.

    Parameters
    ----------
    model
        In evaluation mode.
    outputs
        The summed token loss, minus the log-probability, of each of some examples.
    query
        The example whose log-probability is measured.
    proponents
        The examples of the one batch that is trained on.
    optimizer
        A key of `OPTIMIZERS`.
    learning_rate
        Of the one step.

    Raises
    ------
    SpecError
        If the optimizer is unknown.
    DataError
        If there is no proponent, or the query's log-probability is zero or not finite before or after.
    """
    if optimizer not in OPTIMIZERS:
        raise SpecError(f"score.tail_patch.optimizer: found {optimizer!r}; accepted: {', '.join(OPTIMIZERS)}.")
    if not proponents:
        raise DataError("tail-patch: the query has no proponents to train on.")
    before = _log_probability(model, outputs, query)
    with _restored(model) as parameters:
        torch.autograd.backward(outputs(model, proponents).mean())
        for parameter in parameters:
            # One optimizer per tensor, which changes nothing elementwise, holds the moments of one tensor at a time.
            OPTIMIZERS[optimizer]([parameter], learning_rate).step()
            parameter.grad = None
        after = _log_probability(model, outputs, query)
    if before == 0 or not math.isfinite(before) or not math.isfinite(after):
        raise DataError(
            f"tail-patch: the query's log-probability is {before} before the step and {after} after it, so its "
            "relative change has no value. Lower the learning rate, or leave out this query."
        )
    return 100 * (after - before) / abs(before)


def linear_datamodeling_score(
    scores_QN: Float[np.ndarray, "Q N"],
    masks_SN: Bool[np.ndarray, "S N"],
    actual_SQ: Float[np.ndarray, "S Q"],
) -> DatamodelingScore:
    r"""How well scores predict what models output that were trained on subsets of the training examples (LDS).

    .. math:: \mathrm{LDS}_q = \rho_s \Big(f(q; \theta_s), \; \sum_{n \in s} S[q, n]\Big)

    with rho_s Spearman's rank correlation over the subsets s (arXiv 2506.05647, eq. 8-9). Ranks of equal values are
    averaged. Where the outputs of a query do not vary, or the predictions do not but for rounding, there is no
    correlation: that is NaN, and so is the mean. A query left out of the mean in silence would favour a method that
    scores nothing for hard queries, so that is for the caller to do and to tell.

    Parameters
    ----------
    scores_QN
        Score of every training example for every query; positive is a proponent.
    masks_SN
        True where an example is in a subset.
    actual_SQ
        What the model retrained on each subset outputs for every query, larger is better: minus a loss; margins and
        log-probabilities as they are.

    Raises
    ------
    DataError
        If there is no query, there are fewer than two subsets, or a score or an output is not finite.
    """
    if len(masks_SN) < 2 or len(scores_QN) < 1:
        raise DataError(
            f"LDS: found {len(masks_SN)} subsets and {len(scores_QN)} queries; it needs at least 2 subsets and a query."
        )
    for name, values in (("scores", scores_QN), ("actual outputs", actual_SQ)):
        if strange := int(np.count_nonzero(~np.isfinite(values))):
            raise DataError(
                f"LDS: {strange:,} of {values.size:,} {name} are not finite. Leave out their queries, or the training "
                "examples and models they come from."
            )
    wide_QN = scores_QN.astype(np.float64)
    predicted_QS = wide_QN @ masks_SN.T.astype(np.float64)
    # Sums of equal scores in another order differ in their last bits, which must not become ranks.
    rounding_Q = wide_QN.shape[1] * np.finfo(np.float64).eps * np.abs(wide_QN).sum(1)
    predicted_QS[np.ptp(predicted_QS, axis=1) <= rounding_Q] = 0
    correlations_Q = np.array(
        [_rank_correlation(*pair) for pair in zip(predicted_QS, actual_SQ.T, strict=True)], np.float64
    )
    return DatamodelingScore(float(correlations_Q.mean()), correlations_Q)


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
    draws = words(derive_key(seed, "metrics", "bootstrap"), RESAMPLES * len(values_Q))
    resampled = values_Q[(draws % np.uint64(len(values_Q))).astype(np.int64)].reshape(RESAMPLES, -1)
    low, high = np.quantile(resampled.mean(1), [0.025, 0.975])
    return Interval(float(values_Q.mean()), float(low), float(high))


def _rank_correlation(first_S: Float[np.ndarray, " S"], second_S: Float[np.ndarray, " S"]) -> float:
    """Spearman's correlation, with ranks of equal values averaged; NaN where one side does not vary."""
    centred = [_average_ranks(values) - (len(values) + 1) / 2 for values in (first_S, second_S)]
    norm = math.prod(float(np.linalg.norm(ranks)) for ranks in centred)
    return float(centred[0] @ centred[1]) / norm if norm > 0 else math.nan


def _average_ranks(values_S: Float[np.ndarray, " S"]) -> Float64[np.ndarray, " S"]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, places_S, counts = np.unique(values_S, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places_S]


def _log_probability(
    model: nn.Module, outputs: Callable[[nn.Module, Sequence[Example]], Float[Tensor, " B"]], query: Example
) -> float:
    # Where the caller has opened autocast, it keeps rounded weights: those before the step would be used after it, and
    # those made here, without gradient, in the step itself.
    torch.clear_autocast_cache()
    with torch.no_grad():
        log_probability = -float(outputs(model, [query]))
    torch.clear_autocast_cache()
    return log_probability


@contextmanager
def _restored(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Every floating-point parameter, open to training; values, gradients and flags are put back afterwards."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    saved = [(parameter.detach().clone(), parameter.grad, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        yield parameters
    finally:
        with torch.no_grad():
            for parameter, (value, gradient, requires_grad) in zip(parameters, saved, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient


def _adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)


def _sgd(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=learning_rate)


OPTIMIZERS = {"adamw": _adamw, "sgd": _sgd}
METRICS = {"precision": precision_at_k, "tail_patch": tail_patch, "lds": linear_datamodeling_score}
