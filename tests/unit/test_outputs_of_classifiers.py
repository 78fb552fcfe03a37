"""The losses of classifiers hold where probabilities round to 0 or 1, and their gradients do."""

from __future__ import annotations

import math

import pytest
import torch

from gradstore.numerics.outputs import cross_entropy, margin
from tests import oracle


def test_the_margin_is_exact_where_the_probability_rounds_to_one_or_to_zero() -> None:
    logits = torch.tensor([[100.0, 0.0, 0.0], [-100.0, 0.0, 0.0]], requires_grad=True)
    classes = torch.tensor([0, 0])

    found = margin(logits, classes)
    (gradient,) = torch.autograd.grad(found.sum(), logits)

    assert found.tolist() == pytest.approx([100 - math.log(2), -100 - math.log(2)])
    # log(p / (1 - p)) of p = 1 is infinite, and its gradient is not a number.
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -0.5, -0.5], [1.0, -0.5, -0.5]]))


def test_the_probability_of_the_class_is_the_sigmoid_of_the_margin() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 2, 3, 0])

    found = torch.sigmoid(margin(logits, classes))

    expected = [oracle.class_probability(row, int(y)) for row, y in zip(logits.numpy(), classes, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_better_model_has_a_lower_cross_entropy_and_a_larger_margin() -> None:
    worse, better = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])

    assert cross_entropy(better, torch.tensor([0])) < cross_entropy(worse, torch.tensor([0]))
    assert margin(better, torch.tensor([0])) > margin(worse, torch.tensor([0]))


def test_classes_may_be_integers_of_any_width() -> None:
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    for output in (cross_entropy, margin):
        torch.testing.assert_close(
            output(logits, torch.tensor([2, 1], dtype=torch.int32)), output(logits, torch.tensor([2, 1]))
        )
