"""The output function of language models."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# 16 MiB of float32: small enough for a cache, large enough that a GPU is not kept waiting for the next piece.
SCORES_PER_PIECE = 2**22


def token_cross_entropy(
    logits_BTV: Float[Tensor, "B T V"], tokens_BT: Int[Tensor, "B T"], mask_BT: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    r"""Sum of the cross-entropies (in nats) of each example's tokens given those before them.

    .. math:: f(x) = -\sum_{t=1}^{T-1} m_t \log p(x_t \mid x_{<t})

    Parameters
    ----------
    logits_BTV
        Scores of the next token at every position, as a causal language model returns them.
    tokens_BT
        The tokens that were read.
    mask_BT
        True at the tokens that count as predicted: False at pads, and at prompt tokens where only a completion is to be
        explained (the prompt's positions still carry gradient through the tokens after them). A sequence's first token
        is never predicted, whatever its mask.

    Returns
    -------
    Tensor
        [B], at least float32 whatever the precision of the logits; 0 for an example that predicts no token. It can be
        differentiated once.
    """
    # The targets are shifted, not the logits: slicing the logits would copy the largest tensor of the whole pass, twice.
    targets_BT = torch.roll(tokens_BT, -1, dims=1)
    counted_BT = torch.roll(mask_BT, -1, dims=1)
    counted_BT[:, -1] = False
    rows = logits_BTV.flatten(0, 1), targets_BT.flatten(), counted_BT.flatten()
    losses_N = _CrossEntropy.apply(*rows)  # type: ignore[no-untyped-call]
    result_B: Tensor = losses_N.view_as(tokens_BT).sum(1)
    return result_B


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row of scores that counts; 0 of the others.

    With a vocabulary of 50,000 the scores are the largest tensor of a pass, and torch's own function makes three more
    of that size in float32. This one makes its gradient only, in the precision of the scores, piece by piece.
    """

    @staticmethod
    def forward(ctx: Any, scores_NV: Tensor, targets_N: Tensor, counted_N: Tensor) -> Tensor:
        dtype = torch.promote_types(scores_NV.dtype, torch.float32)
        log_total_N = torch.empty_like(targets_N, dtype=dtype)
        for piece in _pieces(scores_NV):
            log_total_N[piece] = torch.logsumexp(scores_NV[piece].to(dtype), 1)
        ctx.save_for_backward(scores_NV, targets_N, counted_N, log_total_N)
        target_score_N = scores_NV.gather(1, targets_N[:, None])[:, 0].to(dtype)
        return torch.where(counted_N, log_total_N - target_score_N, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None]:
        scores_NV, targets_N, counted_N, log_total_N = ctx.saved_tensors
        weight_N1 = torch.where(counted_N, gradient_N, 0)[:, None]
        result_NV = torch.empty_like(scores_NV)
        for piece in _pieces(scores_NV):
            probability_PV = (scores_NV[piece].to(log_total_N.dtype) - log_total_N[piece, None]).exp_()
            probability_PV.mul_(weight_N1[piece]).scatter_add_(1, targets_N[piece, None], -weight_N1[piece])
            result_NV[piece] = probability_PV
        return result_NV, None, None


def _pieces(scores_NV: Tensor) -> Iterator[slice]:
    rows = max(1, SCORES_PER_PIECE // scores_NV.shape[1])
    return (slice(start, start + rows) for start in range(0, len(scores_NV), rows))
