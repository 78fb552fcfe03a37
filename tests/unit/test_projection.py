"""Projections keep inner products, in every shape alike, and their smaller ranks inside their larger ones."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from gradstore.errors import SpecError
from gradstore.groups import ParameterGroup, Part
from gradstore.numerics.projection import (
    PROJECTIONS,
    AdamProjector,
    Dense,
    FactSjlt,
    Identity,
    Logra,
    Lorif,
    Projection,
    Sjlt,
)
from gradstore.spec import resolve_kind

CPU = torch.device("cpu")


def part(name: str = "h.0.mlp.weight", out_features: int = 12, in_features: int = 20) -> Part:
    return Part(parameter=name, rows=(0, out_features), columns=(0, in_features))


def group(*parts: Part) -> ParameterGroup:
    return ParameterGroup(name="h.0.mlp", parts=parts or (part(),), depth=0, function="mlp")


def features(projection: Projection, given: ParameterGroup, *gradients: Tensor, seed: int = 0) -> Tensor:
    """Features of gradients [B, O, I], one for each part of a group."""
    found = torch.zeros(len(gradients[0]), projection.width(given))
    for place, gradient in zip(projection.projectors(given, seed=seed, device=CPU), gradients, strict=True):
        found[:, place.start : place.start + place.width] += place.projector.whole(gradient)
    return found


@pytest.mark.parametrize("matrices", ["rademacher", "normal"])
def test_the_matrices_of_a_smaller_rank_are_the_first_rows_before_the_scale(
    matrices: Literal["rademacher", "normal"],
) -> None:
    large = Logra(rank=10, matrices=matrices).part_matrices(part(), seed=3)
    small = Logra(rank=4, matrices=matrices).part_matrices(part(), seed=3)

    for wide, narrow in zip(large, small, strict=True):
        torch.testing.assert_close(wide[:4] * math.sqrt(10), narrow * math.sqrt(4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("entries", ["rademacher", "normal"])
def test_fewer_dense_features_are_the_first_ones_before_the_scale(entries: Literal["rademacher", "normal"]) -> None:
    large = Dense(features=300, entries=entries).matrix(part(), seed=3)
    small = Dense(features=7, entries=entries).matrix(part(), seed=3)

    torch.testing.assert_close(large[:7] * math.sqrt(300), small * math.sqrt(7), rtol=1e-6, atol=1e-6)


def test_matrices_depend_on_seed_part_and_side_alone() -> None:
    projection = Logra(rank=4)
    square = part(in_features=12)
    output, inputs = projection.part_matrices(square, seed=3)

    assert not torch.equal(output, inputs)
    others = [
        projection.part_matrices(square, seed=4),
        projection.part_matrices(part("h.1.mlp.weight", in_features=12), seed=3),
        projection.part_matrices(Part(parameter=square.parameter, rows=(12, 24), columns=(0, 12)), seed=3),
    ]
    assert not any(torch.equal(output, matrices[0]) for matrices in others)
    again = Logra(rank=4).part_matrices(square, seed=3)
    assert all(torch.equal(*pair) for pair in zip(again, (output, inputs), strict=True))


def test_a_side_that_is_no_longer_than_the_rank_is_kept_as_it_is() -> None:
    gradient = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0))
    short = group(part(out_features=5))

    found = features(Logra(rank=8), short, gradient)

    output, inputs = Logra(rank=8).part_matrices(short.parts[0], seed=0)
    assert torch.equal(output, torch.eye(5))
    torch.testing.assert_close(found, (gradient @ inputs.T).flatten(1))


UNBIASED: list[Projection] = [
    Logra(rank=8),
    Logra(rank=8, matrices="normal"),
    Dense(features=64),
    Dense(features=64, entries="normal"),
    Sjlt(features=64),
    Sjlt(features=64, nonzeros=4),
    FactSjlt(features=64, mask=16),
]
SHAPES = [(4, 96), (96, 4), (24, 24), (60, 7), (1, 30), (80, 1), (70, 90)]


def ratios(projection: Projection, shape: tuple[int, int], seeds: int) -> np.ndarray:
    """The inner product of two features over that of their gradients, for many seeds."""
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(shape, generator=draw)
    first, second = (common + 0.5 * torch.randn(shape, generator=draw) for _ in range(2))
    exact = float((first * second).sum())
    given = group(part(out_features=shape[0], in_features=shape[1]))
    found = []
    for seed in range(seeds):
        projected = features(projection, given, torch.stack([first, second]), seed=seed)
        found.append(float(projected[0] @ projected[1]) / exact)
    return np.array(found)


@pytest.mark.parametrize("projection", UNBIASED, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inner_products_are_unbiased_with_the_same_constant_in_every_shape(
    projection: Projection, shape: tuple[int, int]
) -> None:
    found = ratios(projection, shape, 300)

    # Five standard errors of the mean; the seeds are fixed, so this cannot flicker.
    error = float(np.std(found)) / math.sqrt(len(found))
    assert error < 0.06
    assert abs(np.mean(found) - 1) < max(5 * error, 1e-5)


@pytest.mark.slow
def test_parts_of_a_group_add_up_and_none_of_them_counts_more() -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = [(30, 40), (50, 6), (30, 1)]
    parts = [part(f"p{index}", *shape) for index, shape in enumerate(shapes)]
    gradients = [torch.randn(1, *shape, generator=draw) for shape in shapes]
    # Only one part at a time has a gradient.
    for alone in range(3):
        given = [gradient * (index == alone) for index, gradient in enumerate(gradients)]
        exact = float(sum(gradient.square().sum() for gradient in given))
        for projection in UNBIASED:
            found = [
                float(features(projection, group(*parts), *given, seed=seed).square().sum()) / exact
                for seed in range(200)
            ]
            error = float(np.std(found)) / math.sqrt(len(found))
            assert abs(np.mean(found) - 1) < max(5 * error, 1e-5), f"{projection}, part {alone}"


def test_signed_tiles_vary_no_more_than_independent_entries_over_many_tiles() -> None:
    # Gradients whose tiles are all alike would show any dependence between tiles.
    piece = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0))
    gradient = piece.repeat(1, 4, 1)
    given = group(part(out_features=256, in_features=64))
    projection = Dense(features=32)

    norms = [
        float(features(projection, given, gradient, seed=seed).square().sum() / gradient.square().sum())
        for seed in range(400)
    ]

    # Independent entries have a variance of 2 / k (less a term in the fourth moments, which is small here).
    assert np.var(norms) == pytest.approx(2 / 32, rel=0.25)
    assert np.mean(norms) == pytest.approx(1, abs=5 * math.sqrt(2 / 32 / 400))


def test_products_over_positions_are_float32_when_the_layer_is_bfloat16() -> None:
    projection = Logra(rank=8)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 500, 20, generator=draw).bfloat16()
    gradient = torch.randn(2, 500, 12, generator=draw).bfloat16()
    projector = projection.projector(part(), seed=0, device=CPU)

    found = projector.combine(projector.left(gradient), projector.right(inputs))

    assert found.dtype == torch.float32
    output_matrix, input_matrix = projection.part_matrices(part(), seed=0)
    dense = torch.einsum("bto,bti->boi", gradient.float(), inputs.float())
    exact = (output_matrix @ dense @ input_matrix.T).flatten(1)
    # P_o D and P_i x are rounded to bfloat16 at each position; sums in bfloat16 would be wrong by 3 % and more.
    assert (found - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("projection", [*UNBIASED, Identity()], ids=str)
def test_factors_give_what_the_whole_gradient_gives_also_where_one_is_one_hot(projection: Projection) -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 9, 12, generator=draw), torch.randn(2, 9, 20, generator=draw)
    places = torch.randint(0, 12, (2, 9), generator=draw)
    (placed,) = projection.projectors(group(), seed=0, device=CPU)
    projector = placed.projector

    for factor, dense in ((left, left), (places, torch.nn.functional.one_hot(places, 12).float())):
        found = projector.combine(projector.left(factor), projector.right(right))
        torch.testing.assert_close(found, projector.whole(dense.transpose(1, 2) @ right), rtol=1e-4, atol=1e-4)


def test_factors_of_low_rank_matrices_are_exact_and_others_keep_the_most() -> None:
    draw = torch.Generator().manual_seed(0)
    low = torch.randn(3, 12, 1, generator=draw) @ torch.randn(3, 1, 20, generator=draw)
    projection = Lorif(rank=6)
    logra = Logra(rank=6)
    summed = features(logra, group(), low)

    stored = projection.finished(group(), summed)

    assert stored.shape == (3, 12)
    u, v = stored[:, :6], stored[:, 6:]
    torch.testing.assert_close((u @ u.T) * (v @ v.T), summed @ summed.T, rtol=1e-4, atol=1e-4)


def test_a_row_that_is_not_finite_has_factors_that_are_nan_and_leaves_the_others_alone() -> None:
    summed = torch.randn(3, 36, generator=torch.Generator().manual_seed(0))
    whole = Lorif(rank=6).finished(group(), summed)
    summed[1, 4] = math.inf

    found = Lorif(rank=6).finished(group(), summed)

    assert bool(found[1].isnan().all())
    torch.testing.assert_close(found[[0, 2]], whole[[0, 2]])


def test_principal_components_are_used_as_given_and_refused_where_they_are_missing() -> None:
    projection = Logra(rank=3, matrices="pca")
    gradient = torch.randn(2, 12, 20, generator=torch.Generator().manual_seed(0))
    given = torch.linalg.qr(torch.randn(12, 3))[0].T, torch.linalg.qr(torch.randn(20, 3))[0].T

    (placed,) = projection.projectors(group(), seed=0, device=CPU, matrices={part().key: given})

    torch.testing.assert_close(placed.projector.whole(gradient), (given[0] @ gradient @ given[1].T).flatten(1))
    assert projection.needs_matrices
    with pytest.raises(SpecError, match=r"h.0.mlp.weight\[0:12,0:20\] has no principal components"):
        projection.projectors(group(), seed=0, device=CPU)
    with pytest.raises(SpecError, match=r"are \[\[2, 12\], \[3, 20\]\], the run asks for \[\[3, 12\], \[3, 20\]\]"):
        projection.projectors(group(), seed=0, device=CPU, matrices={part().key: (given[0][:2], given[1])})


def test_the_direction_of_adam_is_projected_as_a_gradient_is() -> None:
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 9, 12, generator=draw), torch.randn(2, 9, 20, generator=draw)
    divisor = 0.1 + torch.rand(12, 20, generator=draw)
    plain = Logra(rank=4).projector(part(), seed=0, device=CPU)
    projector = AdamProjector(plain, divisor)

    found = projector.combine(projector.left(left), projector.right(right))

    torch.testing.assert_close(found, plain.whole((left.transpose(1, 2) @ right) / divisor))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("logra", {"rank": 0}, "features.projection.rank: found 0; accepted: an integer of at least 1"),
        ("logra", {"rank": "8"}, "features.projection.rank: found '8'"),
        ("logra", {"rank": 8, "matrices": "gauss"}, "features.projection.matrices: found 'gauss'"),
        (
            "logra",
            {"rank": 8, "width": 3},
            "features.projection.width: unknown key; accepted for logra: rank, matrices",
        ),
        ("logra", {}, "features.projection.rank: is missing"),
        ("logra", {"rank": 8, "pca_rows": 0}, "features.projection.pca_rows: found 0"),
        ("dense", {"features": 0}, "features.projection.features: found 0; accepted: an integer of at least 1"),
        ("dense", {"features": 8, "entries": "sparse"}, "features.projection.entries: found 'sparse'"),
        ("sjlt", {"features": 8, "nonzeros": 0}, "features.projection.nonzeros: found 0"),
        ("fact-sjlt", {"features": 8}, "features.projection.mask: is missing"),
        ("lorif", {"rank": 4, "factors": 5}, "features.projection.factors: found 5; accepted: at most the rank, 4"),
        ("lorif", {"rank": 0, "factors": 0}, "features.projection.factors: found 0"),
        ("identity", {"rank": 4}, "features.projection.rank: unknown key; identity takes no options"),
    ],
)
def test_options_that_are_not_accepted_are_named(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve_kind(PROJECTIONS, kind, options, "features.projection")
