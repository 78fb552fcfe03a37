"""On a CUDA device the numbers are those of the CPU, up to rounding."""

from __future__ import annotations

import pytest
import torch

from gradstore.numerics.gradients import FeatureExtractor
from gradstore.numerics.projection import Dense, FactSjlt, Logra, Projection, Sjlt
from tests.networks import CASES
from tests.projections import projections

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "projection", [Logra(rank=4), Dense(features=7), Sjlt(features=9), FactSjlt(features=9, mask=5)]
)
def test_features_are_those_of_the_cpu(name: str, projection: Projection) -> None:
    case = CASES[name]()
    rows = list(range(case.size))
    on_cpu = FeatureExtractor(case.model, case.groups, projection, seed=3)
    wanted = on_cpu(lambda: case.outputs(case.model, rows), examples=case.size)

    case.model.cuda()
    on_gpu = FeatureExtractor(case.model, case.groups, projection, seed=3)
    found = on_gpu(lambda: case.outputs(case.model, rows), examples=case.size)

    for group, features in wanted.features.items():
        norm = float(features.norm(dim=1).max())
        assert float((found.features[group].cpu() - features).norm(dim=1).max()) <= 1e-4 * norm, group


@pytest.mark.parametrize("projection", projections(), ids=str)
def test_draws_are_the_same_bits(projection: Projection) -> None:
    group = CASES["without positions, in place"]().groups[0]
    gradient = torch.zeros(1, group.parts[0].out_features, group.parts[0].in_features)
    # Of one entry the features are its column of the matrix.
    gradient[0, 1, 2] = 1

    columns = [
        placed.projector.whole(gradient.to(device)).cpu()
        for device in ("cpu", "cuda")
        for placed in projection.projectors(group, seed=3, device=torch.device(device))
    ]

    torch.testing.assert_close(columns[0], columns[1], rtol=1e-6, atol=0)
