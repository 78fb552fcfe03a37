"""Every output function is the oracle's, in the precision it promises, and a row depends on itself alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gradstore.numerics.outputs import OUTPUTS
from tests import oracle

# Inputs of 4 examples, and f of each by the oracle.
Case = tuple[tuple[Tensor, ...], np.ndarray]


def tokens_case() -> Case:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (4, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([6, 2, 5, 9])[:, None]
    mask[3, :4] = False  # a prompt, whose tokens are not to be predicted
    logits = torch.randn(4, 9, 300, generator=generator)
    return (logits, tokens, mask), oracle.token_cross_entropy(logits.numpy(), tokens.numpy(), mask.numpy())


def classes_case(f: Callable[[float], float]) -> Case:
    logits = 2 * torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 3, 6, 3])
    probabilities = [
        oracle.class_probability(row, int(number)) for row, number in zip(logits.numpy(), classes, strict=True)
    ]
    return (logits, classes), np.array([f(p) for p in probabilities])


def predictions_case(kind: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    predicted = 0.5 + torch.randn(4, 3, 2, 4, 4, generator=generator)
    noise = torch.randn(1, 3, 2, 4, 4, generator=generator).expand(4, -1, -1, -1, -1)
    compared = noise if kind == "ddpm_simple" else None
    expected = [
        oracle.diffusion_output(predicted[row].numpy(), None if compared is None else compared[row].numpy(), kind)
        for row in range(4)
    ]
    return (predicted, *(() if compared is None else (compared,))), np.array(expected)


CASES: dict[str, Callable[[], Case]] = {
    "token_cross_entropy": tokens_case,
    "cross_entropy": lambda: classes_case(lambda p: -math.log(p)),
    "margin": lambda: classes_case(lambda p: math.log(p / (1 - p))),
    "ddpm_simple": lambda: predictions_case("ddpm_simple"),
    "square": lambda: predictions_case("square"),
    "das": lambda: predictions_case("das"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_function_is_the_oracles_and_a_row_depends_on_itself_alone(kind: str) -> None:
    assert kind in CASES, f"give {kind} its oracle here"
    inputs, expected = CASES[kind]()

    found = OUTPUTS[kind](*inputs)

    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    for row in range(4):
        torch.testing.assert_close(OUTPUTS[kind](*(values[[row]] for values in inputs)), found[[row]])


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_sums_are_in_float32_at_least(kind: str, given: torch.dtype, returned: torch.dtype) -> None:
    (logits, *others), _ = CASES[kind]()

    found = OUTPUTS[kind](logits.to(given), *others)

    assert found.dtype == returned
    torch.testing.assert_close(found, OUTPUTS[kind](logits.to(given).double(), *others).to(returned))


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_row_without_a_number_is_nan_and_leaves_the_others_alone(kind: str) -> None:
    (logits, *others), expected = CASES[kind]()
    logits[0] = math.nan

    found = OUTPUTS[kind](logits, *others)

    assert found[0].isnan()
    np.testing.assert_allclose(found[1:].numpy(), expected[1:], rtol=1e-5)
