"""Projections keep inner products, in every shape alike, and their smaller ranks inside their larger ones."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch

from gradstore.errors import SpecError
from gradstore.groups import ParameterGroup
from gradstore.numerics.projection import PROJECTIONS, Logra
from gradstore.spec import resolve_kind


def group(name: str = "h.0.mlp", out_features: int = 12, in_features: int = 20) -> ParameterGroup:
    return ParameterGroup(
        name=name, layers=(name,), out_features=out_features, in_features=in_features, depth=0, function="mlp"
    )


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
def test_the_matrices_of_a_smaller_rank_are_the_first_rows_before_the_scale(
    distribution: Literal["rademacher", "normal"],
) -> None:
    large = Logra(rank=16, distribution=distribution).matrices(group(), seed=3)
    small = Logra(rank=4, distribution=distribution).matrices(group(), seed=3)

    for wide, narrow in zip(large, small, strict=True):
        torch.testing.assert_close(wide[:4] * math.sqrt(16), narrow * math.sqrt(4), rtol=1e-6, atol=0)


def test_matrices_depend_on_seed_group_and_side_alone() -> None:
    projection = Logra(rank=4)
    output, inputs = projection.matrices(group(in_features=12), seed=3)

    assert not torch.equal(output, inputs)
    for matrices in (projection.matrices(group(), seed=4), projection.matrices(group("h.1.mlp"), seed=3)):
        assert not torch.equal(output, matrices[0])
    again = Logra(rank=4).matrices(group(in_features=12), seed=3)
    assert all(torch.equal(*pair) for pair in zip(again, (output, inputs), strict=True))


@pytest.mark.parametrize("distribution", ["rademacher", "normal"])
@pytest.mark.parametrize("shape", [(4, 96), (96, 4), (24, 24), (60, 7)])
def test_inner_products_are_unbiased_with_the_same_constant_in_every_shape(
    distribution: Literal["rademacher", "normal"], shape: tuple[int, int]
) -> None:
    draw = np.random.default_rng(0)
    common = draw.standard_normal(shape)
    first, second = common + 0.5 * draw.standard_normal(shape), common + 0.5 * draw.standard_normal(shape)
    exact = (first * second).sum()
    projection = Logra(rank=8, distribution=distribution)

    ratios = []
    for seed in range(400):
        sides = projection.matrices(group(out_features=shape[0], in_features=shape[1]), seed=seed)
        output, inputs = (side.double().numpy() for side in sides)
        ratios.append(((output @ first @ inputs.T) * (output @ second @ inputs.T)).sum() / exact)

    # Five standard errors of the mean, which are about 0.1 here; the seeds are fixed, so this cannot flicker.
    error = np.std(ratios) / math.sqrt(len(ratios))
    assert error < 0.025
    assert abs(np.mean(ratios) - 1) < 5 * error


def test_products_over_positions_are_float32_when_the_layer_is_bfloat16() -> None:
    projection = Logra(rank=8)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 500, 20, generator=draw).bfloat16()
    gradient = torch.randn(2, 500, 12, generator=draw).bfloat16()
    projector = projection.projector(group(), seed=0, device=torch.device("cpu"))

    found = projector.project(gradient, projector.keep(inputs))

    assert found.dtype == torch.float32
    output_matrix, input_matrix = projection.matrices(group(), seed=0)
    dense = torch.einsum("bto,bti->boi", gradient.float(), inputs.float())
    exact = (output_matrix @ dense @ input_matrix.T).flatten(1)
    # P_o D and P_i x are rounded to bfloat16 at each position; sums in bfloat16 would be wrong by 3 % and more.
    assert (found - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "features.projection.rank: found 0; accepted: an integer of at least 1"),
        ({"rank": "8"}, "features.projection.rank: found '8'"),
        ({"rank": 8, "distribution": "gauss"}, "features.projection.distribution: found 'gauss'"),
        ({"rank": 8, "width": 3}, "features.projection.width: unknown key; accepted for logra: rank, distribution"),
        ({}, "features.projection.rank: is missing"),
    ],
)
def test_options_that_are_not_accepted_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve_kind(PROJECTIONS, "logra", options, "features.projection")
