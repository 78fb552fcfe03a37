"""The output functions of classifiers."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(logits_BC: Float[Tensor, "B C"], classes_B: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    r"""Cross-entropy (in nats) of each example's class: eq. 2 of arXiv 2506.05647 takes its gradient on both sides.

    .. math:: f(x, y) = -\log p_y = \log \sum_c e^{z_c} - z_y

    It is a loss: training lowers it. Actual outputs (LDS) are oriented so that larger is better, so they are minus this.

    Parameters
    ----------
    logits_BC
        Scores z of every class.
    classes_B
        The class y of every example, in [0, C).

    Returns
    -------
    Tensor
        [B], at least float32 whatever the precision of the scores; NaN where a score is NaN.
    """
    return torch.nn.functional.cross_entropy(_wide(logits_BC), classes_B.long(), reduction="none")


def margin(logits_BC: Float[Tensor, "B C"], classes_B: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    r"""Log-odds of each example's class: TRAK's model output (arXiv 2303.14186, section 3.1).

    .. math:: f(x, y) = \log \frac{p_y}{1 - p_y} = z_y - \log \sum_{c \ne y} e^{z_c}

    The right-hand side has no difference of numbers near 1, so it is exact where p rounds to 0 or to 1. It grows as
    training goes on: larger is better, as actual outputs are oriented. Its sigmoid is p_y, whose complement weighs the
    training side of TRAK's kernel.

    Parameters
    ----------
    logits_BC
        Scores z of every class.
    classes_B
        The class y of every example, in [0, C).

    Returns
    -------
    Tensor
        [B], at least float32 whatever the precision of the scores; NaN where a score is NaN, infinite where there is no
        other class.
    """
    scores_BC = _wide(logits_BC)
    own_BC = torch.arange(scores_BC.shape[1], device=scores_BC.device) == classes_B[:, None]
    others_B = torch.logsumexp(scores_BC.masked_fill(own_BC, float("-inf")), 1)
    return scores_BC.gather(1, classes_B.long()[:, None])[:, 0] - others_B


def _wide(logits_BC: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    return logits_BC.to(torch.promote_types(logits_BC.dtype, torch.float32))
