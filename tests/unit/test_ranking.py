"""The ranking loss in cases written out by hand, what leaves them as they are, and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gradstore.errors import DataError
from gradstore.numerics.representation import ranking_loss, standardised


def log_sigmoid(value: float) -> float:
    return -math.log1p(math.exp(-value))


def drawn(seed: int, shape: tuple[int, int] = (3, 7)) -> tuple[Tensor, Tensor]:
    """Predictions and outcomes."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(shape)), torch.from_numpy(rng.standard_normal(shape))


def test_outcomes_are_standardised_query_by_query() -> None:
    outcomes = torch.tensor([[1.0, 2.0, 3.0, 6.0], [-40.0, 0.0, 0.0, 40.0]])

    found = standardised(outcomes)

    deviation = math.sqrt((4 + 1 + 0 + 9) / 4)
    assert found.dtype == torch.float64
    assert found[0].tolist() == pytest.approx([-2 / deviation, -1 / deviation, 0, 3 / deviation])
    assert found[1].tolist() == pytest.approx([-math.sqrt(2), 0, 0, math.sqrt(2)])


def test_small_differences_of_large_outcomes_are_standardised_too() -> None:
    # In float32 the mean of these is off by more than they differ.
    outcomes = torch.tensor([[1000.0, 1000.0, 1000.0, 1000.0 + 2**-14]])

    assert standardised(outcomes)[0].tolist() == pytest.approx([-1 / math.sqrt(3)] * 3 + [math.sqrt(3)], rel=1e-6)


def test_outcomes_that_do_not_vary_are_standardised_to_zeros() -> None:
    outcomes = torch.full((2, 3), 0.1, dtype=torch.float64)
    outcomes[1, 0] = 0.2
    # Their mean is no tenth.
    assert outcomes[0].mean() != 0.1

    found = standardised(outcomes)

    assert found[0].tolist() == [0, 0, 0]
    assert found[1].tolist() == pytest.approx([math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5)])


def test_the_loss_of_three_subsets_is_what_is_written_out_by_hand() -> None:
    predicted = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    outcomes = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64)

    found = ranking_loss(predicted, outcomes)

    # The outcomes of subsets 1 and 0 are 1 apart, of 2 and 0 3, of 2 and 1 2.
    wanted = -(1 * log_sigmoid(-1.0 - 0.5) + 3 * log_sigmoid(2.0 - 0.5) + 2 * log_sigmoid(2.0 + 1.0)) / 6
    assert found.item() == pytest.approx(wanted, rel=1e-14)


def test_the_loss_of_two_queries_weighs_each_by_its_standardised_outcomes() -> None:
    predicted = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -3.0], [7.0, 8.0, 9.0]], dtype=torch.float64)
    outcomes = torch.tensor([[0.0, 1.0, 3.0], [0.0, 50.0, 0.0], [4.0, 4.0, 4.0]], dtype=torch.float64)

    found = ranking_loss(predicted, outcomes)

    # The deviations from the means 4/3 and 50/3; the third query's outcomes are equal, so it has no say.
    first, second = math.sqrt(14 / 9), math.sqrt(5000 / 9)
    above = (1 * log_sigmoid(-1.5) + 3 * log_sigmoid(1.5) + 2 * log_sigmoid(3.0)) / first
    above += (50 * log_sigmoid(-1.0) + 50 * log_sigmoid(3.0)) / second
    below = (1 + 3 + 2) / first + (50 + 50) / second
    assert found.item() == pytest.approx(-above / below, rel=1e-14)


def test_the_loss_of_equal_predictions_is_log_two() -> None:
    _, outcomes = drawn(0)

    assert ranking_loss(torch.ones_like(outcomes), outcomes).item() == pytest.approx(math.log(2), rel=1e-14)


def test_swapping_the_predictions_of_two_subsets_in_the_right_order_raises_the_loss() -> None:
    _, outcomes = drawn(1)
    right = ranking_loss(outcomes, outcomes).item()

    for best, worst in [(0, 1), (2, 5), (3, 6)]:
        swapped = outcomes.clone()
        swapped[:, [best, worst]] = outcomes[:, [worst, best]]
        assert ranking_loss(swapped, outcomes).item() > right
    assert ranking_loss(-outcomes, outcomes).item() > math.log(2) > right


def test_the_loss_is_the_same_for_outcomes_of_a_query_that_are_shifted_or_multiplied() -> None:
    predicted, outcomes = drawn(2)
    before = ranking_loss(predicted, outcomes).item()
    changed = outcomes.clone()
    changed[1] = 37.0 * changed[1] - 5.0
    changed[2] = 0.01 * changed[2] + 3.0

    assert ranking_loss(predicted, changed).item() == pytest.approx(before, rel=1e-12)
    changed[1] *= -1
    assert ranking_loss(predicted, changed).item() != pytest.approx(before, rel=1e-3)


def test_outcomes_that_nearly_agree_weigh_little_whichever_is_larger() -> None:
    predicted, outcomes = torch.tensor([[0.0, 3.0, 5.0]]), torch.tensor([[0.0, 1e-4, 10.0]])
    turned = outcomes[:, [1, 0, 2]]

    first, second = ranking_loss(predicted, outcomes).item(), ranking_loss(predicted, turned).item()

    assert first != second
    assert first == pytest.approx(second, abs=1e-4)


def test_the_gradient_of_the_loss_is_that_of_finite_differences_and_lifts_the_better_subset() -> None:
    predicted, outcomes = drawn(3)
    predicted.requires_grad_()

    assert torch.autograd.gradcheck(lambda of: ranking_loss(of, outcomes), predicted)

    torch.autograd.backward(ranking_loss(predicted, outcomes))
    assert predicted.grad is not None
    assert (predicted.grad[range(3), outcomes.argmax(1)] < 0).all()
    assert (predicted.grad[range(3), outcomes.argmin(1)] > 0).all()


def test_the_loss_of_predictions_that_are_far_apart_is_finite_and_grows_with_their_distance() -> None:
    outcomes = torch.tensor([[0.0, 1.0]])
    predicted = torch.tensor([[1e4, -1e4]], requires_grad=True)

    found = ranking_loss(predicted, outcomes)
    torch.autograd.backward(found)

    assert found.item() == pytest.approx(2e4)
    assert ranking_loss(-predicted.detach(), outcomes).item() == 0
    assert predicted.grad is not None
    assert predicted.grad.tolist() == [[1, -1]]


def test_the_loss_of_half_precision_is_made_in_float32_and_one_of_no_number_is_none() -> None:
    predicted, outcomes = drawn(4)
    half = predicted.to(torch.bfloat16)

    found = ranking_loss(half, outcomes)

    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(ranking_loss(half.double(), outcomes).item(), rel=1e-5)
    half[0, 0] = math.nan
    assert math.isnan(ranking_loss(half, outcomes).item())


def test_a_loss_without_outcomes_that_differ_is_refused() -> None:
    predicted = torch.zeros(2, 3)
    message = (
        "ranking loss: found no pairs of subsets whose outcomes differ, among {} subsets and {} queries. Leave out"
    )

    with pytest.raises(DataError, match=message.format(3, 2)):
        ranking_loss(predicted, torch.tensor([[0.1, 0.1, 0.1], [7.0, 7.0, 7.0]]))
    with pytest.raises(DataError, match=message.format(1, 2)):
        ranking_loss(predicted[:, :1], torch.tensor([[1.0], [2.0]]))
    with pytest.raises(DataError, match=message.format(3, 0)):
        ranking_loss(predicted[:0], predicted[:0])


def test_outcomes_that_are_not_finite_are_refused() -> None:
    outcomes = torch.tensor([[1.0, math.nan, 2.0], [math.inf, 1.0, 2.0]])
    message = r"ranking: 2 of 6 outcomes are not finite\. Leave out their queries"

    with pytest.raises(DataError, match=message):
        standardised(outcomes)
    with pytest.raises(DataError, match=message):
        ranking_loss(torch.zeros(2, 3), outcomes)
