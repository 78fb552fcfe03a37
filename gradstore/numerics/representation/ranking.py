"""Ranking subsets: the loss that an encoder is trained with."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from gradstore.errors import DataError
from gradstore.numerics.metrics.subset_ranking import refuse_not_finite

# Q queries, S subsets; [q, i, j] is of query q and the subsets i and j.


def standardised(outcomes_QS: Float[Tensor, "Q S"]) -> Float64[Tensor, "Q S"]:
    r"""Outcomes of every query with mean 0 and variance 1 over the subsets; zeros where they do not vary.

    .. math:: r_{qs} = \frac{o_{qs} - \bar o_q}{\sqrt{\frac{1}{S} \sum_t (o_{qt} - \bar o_q)^2}}

    Some queries are hard and vary by nats, others by thousandths: thus each has its say. It is float64, so that differences
    that are small beside the outcomes stay what they are. They have no unit.

    Parameters
    ----------
    outcomes_QS
        What the model retrained on each subset outputs for every query, in any unit.

    Raises
    ------
    DataError
        If an outcome is not finite.
    """
    refuse_not_finite("outcomes", int((~torch.isfinite(outcomes_QS)).sum()), outcomes_QS.numel())
    wide_QS = outcomes_QS.double()
    centred_QS = wide_QS - wide_QS.mean(1, keepdim=True)
    deviation_Q1 = centred_QS.square().mean(1, keepdim=True).sqrt()
    # The mean of equal outcomes may differ from them in its last bit.
    constant_Q1 = (wide_QS == wide_QS[:, :1]).all(1, keepdim=True)
    return torch.where(constant_Q1, 0, centred_QS / torch.where(constant_Q1, 1, deviation_Q1))


def ranking_loss(predicted_QS: Float[Tensor, "Q S"], outcomes_QS: Float[Tensor, "Q S"]) -> Float[Tensor, ""]:
    r"""How badly predictions order subsets two by two, weighted by how far their outcomes are apart.

    .. math:: L = -\frac{\sum_q \sum_{i, j: \, r_{qi} > r_{qj}} w_{qij} \log \sigma(f_{qi} - f_{qj})}
        {\sum_q \sum_{i, j: \, r_{qi} > r_{qj}} w_{qij}}, \qquad w_{qij} = |r_{qi} - r_{qj}|

    with predictions f and outcomes r, `standardised`. The sum is AirRep's (arXiv 2505.18513). How the paper sets w is not in
    the sources that this was written from, its abstract and slides, so w is our choice: models that are retrained twice on
    the same subset differ too, and outcomes that are no farther apart than that should weigh little whichever came first.
    Dividing by the sum of w makes it a mean in nats: log 2 where predictions are equal, whatever Q and S are. It is the same
    for outcomes of a query that are shifted, or multiplied by a positive number.

    Parameters
    ----------
    predicted_QS
        What scores predict, as `attention_pool` makes them; the loss is differentiable in it, and holds [Q, S, S] numbers.
    outcomes_QS
        What the model retrained on each subset outputs for every query, larger is better: minus the loss of the held-out
        example. The slides write r for the loss itself.

    Returns
    -------
    Tensor
        One number, at least float32 whatever the precision of the predictions; NaN where one of these is not finite.

    Raises
    ------
    DataError
        If no two outcomes of a query differ, or one is not finite.
    """
    outcomes_QS1 = standardised(outcomes_QS)[:, :, None]
    weights_QSS = torch.relu(outcomes_QS1 - outcomes_QS1.transpose(1, 2))
    total = weights_QSS.sum()
    if not total:
        queries, subsets = outcomes_QS.shape
        raise DataError(
            f"ranking loss: found no pairs of subsets whose outcomes differ, among {subsets} subsets and {queries} queries. "
            "Leave out queries whose outcomes are equal, and take at least 2 subsets."
        )
    wide_QS1 = predicted_QS.to(torch.promote_types(predicted_QS.dtype, torch.float32))[:, :, None]
    log_likelihood_QSS = torch.nn.functional.logsigmoid(wide_QS1 - wide_QS1.transpose(1, 2))
    return -((weights_QSS / total).to(wide_QS1.dtype) * log_likelihood_QSS).sum()
