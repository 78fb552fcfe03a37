"""The token loss counts what it should, in the precision it should."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from gradstore.numerics.outputs import token_cross_entropy
from gradstore.numerics.outputs import tokens as token_outputs


def logits(rows: int, positions: int) -> torch.Tensor:
    return torch.randn(rows, positions, 11, generator=torch.Generator().manual_seed(0))


def test_the_loss_is_the_sum_over_positions_and_not_their_mean() -> None:
    tokens, mask = torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool)

    found = token_cross_entropy(torch.zeros(1, 5, 11), tokens, mask)

    torch.testing.assert_close(found, 4 * torch.log(torch.tensor([11.0])))


def test_pads_and_the_last_position_receive_no_gradient() -> None:
    scores = logits(1, 6).requires_grad_()
    tokens, mask = torch.arange(6)[None], torch.tensor([[True, True, True, True, False, False]])

    torch.autograd.backward(token_cross_entropy(scores, tokens, mask).sum())

    assert scores.grad is not None
    assert scores.grad[0].abs().sum(1).gt(0).tolist() == [True, True, True, False, False, False]


def test_a_sequence_that_predicts_no_token_has_loss_zero() -> None:
    found = token_cross_entropy(logits(2, 3), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.bool))

    assert found.tolist() == [0, 0]


def test_bfloat16_logits_are_summed_in_float32() -> None:
    scores, tokens = logits(2, 200).bfloat16(), torch.zeros(2, 200, dtype=torch.long)
    mask = torch.ones(2, 200, dtype=torch.bool)

    found = token_cross_entropy(scores, tokens, mask)

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, token_cross_entropy(scores.double(), tokens, mask).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_that_of_torchs_own_function_however_rows_are_cut(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) < torch.tensor([7, 4, 2])[:, None]
    weights = torch.tensor([1.0, -2.0, 0.5])
    scores = (3 * logits(3, 7)).to(dtype).requires_grad_()
    targets = tokens[:, 1:].masked_fill(~mask[:, 1:], -100)
    dense = functional.cross_entropy(scores[:, :-1].transpose(1, 2).double(), targets, reduction="none").sum(1)
    (expected,) = torch.autograd.grad((weights * dense).sum(), scores)

    for piece in (1, 4 * 11, 2**22):
        monkeypatch.setattr(token_outputs, "SCORES_PER_PIECE", piece)
        losses = token_cross_entropy(scores, tokens, mask)
        (found,) = torch.autograd.grad((weights * losses).sum(), scores)
        torch.testing.assert_close(losses.double(), dense, rtol=1e-5, atol=0)
        torch.testing.assert_close(found, expected)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    scores, mask = logits(1, 4).requires_grad_(), torch.ones(1, 4, dtype=torch.bool)

    losses = token_cross_entropy(scores, torch.zeros(1, 4, dtype=torch.long), mask)
    (first,) = torch.autograd.grad((losses**2).sum(), scores, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(first.sum())
