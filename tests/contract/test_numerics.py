"""Everything that stands in a dict of numerics keeps its family's promise, against the dense float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradstore.numerics.contributions import group_products
from gradstore.numerics.gradients import FeatureExtractor
from gradstore.numerics.kernel import (
    KERNELS,
    Basis,
    GramSum,
    Kernel,
    Kronecker,
    Spectrum,
    SquareSum,
    Standard,
    Vectors,
    kronecker_basis,
    spectrum,
)
from gradstore.numerics.projection import Identity, Logra, Lorif, Projection
from gradstore.spec import resolve_kind
from tests import oracle
from tests.networks import CASES, Case
from tests.projections import expanded, expected, projections

SEED = 5
KERNEL_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "identity": [{}],
    "diagonal": [{}, {"damping": 0.3, "mode": "absolute"}],
    "block": [{}, {"damping": 1.0}, {"damping": 0.3, "mode": "absolute"}],
    "ekfac": [{}, {"damping": 1.0}, {"damping": 0.3, "mode": "absolute"}],
}


@cache
def case_of(name: str) -> Case:
    return CASES[name]()


@cache
def dense_gradients(name: str) -> list[dict[str, np.ndarray]]:
    case = case_of(name)

    def output_of(row: int) -> Callable[[nn.Module], Tensor]:
        return lambda model: case.outputs(model, [row])

    return [oracle.gradient(case.model, output_of(row)) for row in range(case.size)]


def expected_features(name: str, projection: Projection) -> dict[str, np.ndarray]:
    return {
        group.name: np.stack([expected(group, row, projection, SEED) for row in dense_gradients(name)])
        for group in case_of(name).groups
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("projection", projections(), ids=str)
def test_features_are_the_projected_gradients_of_autograd(name: str, projection: Projection) -> None:
    case = case_of(name)
    extractor = FeatureExtractor(case.model, case.groups, projection, seed=SEED)

    found = extractor(lambda: case.outputs(case.model, list(range(case.size))), examples=case.size)

    wanted = expected_features(name, projection)
    assert list(found.features) == [group.name for group in case.groups]
    for group in case.groups:
        features = found.features[group.name]
        assert features.dtype == torch.float32
        assert features.shape == (case.size, projection.width(group))
        ours = expanded(features.double().numpy(), group, projection)
        norm = np.linalg.norm(wanted[group.name], axis=1)
        error = np.linalg.norm(ours - wanted[group.name], axis=1)
        if isinstance(projection, Lorif):
            # Where two singular values are close the best factors may differ; how near they come may not.
            logra = Logra(rank=projection.rank, matrices=projection.matrices)
            whole = np.stack([expected(group, row, logra, SEED) for row in dense_gradients(name)])
            best = np.linalg.norm(wanted[group.name] - whole, axis=1)
            error = np.abs(np.linalg.norm(ours - whole, axis=1) - best)
        # A sequence of two tokens has no gradient in q_proj and k_proj: there, only rounding is left to compare.
        assert (error <= 1e-5 * np.maximum(norm, 0.1 * norm.max())).all(), group.name
    alone = [float(case.outputs(case.model, [row]).detach()) for row in range(case.size)]
    assert found.outputs.tolist() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("projection", [Logra(rank=4), Identity()], ids=str)
def test_batch_mates_and_a_single_example_leave_features_as_they_are(name: str, projection: Projection) -> None:
    case = case_of(name)
    extractor = FeatureExtractor(case.model, case.groups, projection, seed=SEED)
    together = extractor(lambda: case.outputs(case.model, list(range(case.size))), examples=case.size).features

    for rows in ([2], [4, 2]):
        found = extractor(lambda rows=rows: case.outputs(case.model, rows), examples=len(rows)).features  # type: ignore[misc]
        for group, features in found.items():
            norm = float(together[group].norm(dim=1).max())
            assert float((features[-1] - together[group][2]).norm()) <= 1e-4 * norm, group


@pytest.mark.parametrize("name", CASES)
def test_features_of_a_float64_model_leave_no_error_but_rounding(name: str) -> None:
    case, projection = CASES[name](), Logra(rank=4)
    case.model.double()
    extractor = FeatureExtractor(case.model, case.groups, projection, seed=SEED)

    found = extractor(lambda: case.outputs(case.model, list(range(case.size))), examples=case.size)

    for group, wanted in expected_features(name, projection).items():
        np.testing.assert_allclose(
            found.features[group].numpy(), wanted, atol=1e-6 * np.abs(wanted).max(), rtol=0, err_msg=group
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-6), (np.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("kind", "options"), [(kind, options) for kind in KERNEL_OPTIONS for options in KERNEL_OPTIONS[kind]], ids=str
)
def test_a_kernel_gives_the_oracles_contributions(
    kind: str, options: dict[str, Any], dtype: type[np.floating[Any]], tolerance: float
) -> None:
    kernel = resolve_kind(KERNELS, kind, options, "kernel")
    draw = np.random.default_rng(0)
    shapes = {"wide": [(3, 3)], "more features than rows": [(4, 5), (2, 10)], "all zero": [(2, 2)]}
    widths = {group: sum(r * s for r, s in parts) for group, parts in shapes.items()}
    train = {group: draw.standard_normal((30, width)).astype(np.float32) for group, width in widths.items()}
    train["all zero"][:] = 0
    queries = {group: draw.standard_normal((5, width)).astype(np.float32) for group, width in widths.items()}
    factors = {
        group: [(_covariance(draw, r), _covariance(draw, s)) for r, s in parts] for group, parts in shapes.items()
    }

    preconditioned = dict(queries)
    for group in widths:
        if kernel.damped_by is not None:
            found = _spectrum(kernel, train[group], factors[group], dtype)
            preconditioned[group] = found.precondition(queries[group], kernel.damped_by)
    found_c = np.empty((30, len(widths), 5), np.float32)
    group_products([*preconditioned.values()], [*train.values()], found_c)

    settings = {"kind": kind, "damping": options.get("damping", 0.1), "mode": options.get("mode", "relative")}
    dense = {
        group: oracle.precondition(train[group], queries[group], **settings, factors=factors[group]) for group in widths
    }
    expected = oracle.contributions(dense, train, list(widths))
    # Queries are float32 once they are preconditioned: where what they are long in meets no row, C is rounded by that much.
    rounded = [6e-8 * np.abs(dense[group]).max() * np.abs(train[group]).sum(1).max() for group in widths]
    scale = tolerance * np.abs(expected).max(axis=(0, 1)) + rounded
    assert (np.abs(found_c.transpose(2, 0, 1) - expected) <= scale).all()


def test_every_kernel_inside_a_group_is_tried() -> None:
    assert {*KERNEL_OPTIONS} == {name for name, kind in KERNELS.items() if not kind.across_groups}


def _covariance(draw: np.random.Generator, size: int) -> np.ndarray:
    factor = draw.standard_normal((2 * size, size))
    return np.asarray(factor.T @ factor)


def _spectrum(
    kernel: Kernel, rows: np.ndarray, factors: list[tuple[np.ndarray, np.ndarray]], dtype: type[np.floating[Any]]
) -> Spectrum:
    """The spectrum of two pieces of rows, as an artifact keeps it whose vectors are of a type."""
    if kernel.basis == "vectors":
        gram = GramSum(rows.shape[1], dtype)
        gram.add(rows[:11])
        gram.add(rows[11:])
        exact = spectrum(gram.total())
        assert isinstance(exact.basis, Vectors)
        return Spectrum(eigenvalues=exact.eigenvalues, basis=Vectors(exact.basis.vectors.astype(dtype)))
    basis: Basis = Standard()
    if kernel.basis == "kronecker":
        parts = kronecker_basis(factors).parts
        basis = Kronecker(tuple((left.astype(dtype), right.astype(dtype)) for left, right in parts))
    squares = SquareSum(basis, rows.shape[1])
    squares.add(rows[:11])
    squares.add(rows[11:])
    total = squares.total()
    return Spectrum(eigenvalues=total / len(rows) if kernel.basis == "kronecker" else total, basis=basis)
