"""Everything that stands in a dict of numerics keeps its family's promise, against the dense float64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradstore.numerics.contributions import contributions
from gradstore.numerics.gradients import FeatureExtractor
from gradstore.numerics.kernel import KERNELS, spectrum, update_gram
from gradstore.numerics.outputs import OUTPUTS
from gradstore.numerics.projection import PROJECTIONS, Logra, Projection
from gradstore.spec import resolve_kind
from tests import oracle
from tests.networks import CASES, Case, sequences

SEED = 5
PROJECTION_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "logra": [{"rank": 3}, {"rank": 5, "distribution": "normal"}, {"rank": 16}],
}
KERNEL_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "identity": [{}],
    "block": [{}, {"damping": 1.0}, {"damping": 0.3, "mode": "absolute"}],
}


def projections() -> list[Projection]:
    return [
        resolve_kind(PROJECTIONS, kind, options, "features.projection")
        for kind in PROJECTIONS
        for options in PROJECTION_OPTIONS[kind]
    ]


def dense_gradients(case: Case) -> list[dict[str, np.ndarray]]:
    def output_of(row: int) -> Callable[[nn.Module], Tensor]:
        return lambda model: case.outputs(model, [row])

    names = [group.name for group in case.groups]
    return [oracle.gradient(case.model, output_of(row), names) for row in range(case.size)]


def expected_features(case: Case, projection: Projection) -> dict[str, np.ndarray]:
    gradients = dense_gradients(case)
    assert isinstance(projection, Logra), f"give {type(projection).__name__} its dense form here"
    features = {}
    for group in case.groups:
        matrices = [matrix.numpy() for matrix in projection.matrices(group, seed=SEED)]
        features[group.name] = np.stack([oracle.project_two_sided(row[group.name], *matrices) for row in gradients])
    return features


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("projection", projections(), ids=str)
def test_features_are_the_projected_gradients_of_autograd(name: str, projection: Projection) -> None:
    case = CASES[name]()
    extractor = FeatureExtractor(case.model, case.groups, projection, seed=SEED)

    outputs, features = extractor(lambda: case.outputs(case.model, list(range(case.size))))

    expected = expected_features(case, projection)
    assert list(features) == [group.name for group in case.groups]
    for group in case.groups:
        found = features[group.name]
        assert found.dtype == torch.float32
        assert found.shape == (case.size, projection.width(group))
        norm = np.linalg.norm(expected[group.name], axis=1)
        error = np.linalg.norm(found.double().numpy() - expected[group.name], axis=1)
        # A sequence of two tokens has no gradient in q_proj and k_proj: there, only rounding is left to compare.
        assert (error <= 1e-5 * np.maximum(norm, 0.01 * norm.max())).all(), group.name
    with torch.no_grad():
        alone = [float(case.outputs(case.model, [row])) for row in range(case.size)]
    assert outputs.tolist() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_features_of_a_float64_model_leave_no_error_but_rounding(name: str) -> None:
    case, projection = CASES[name](), Logra(rank=4)
    case.model.double()
    extractor = FeatureExtractor(case.model, case.groups, projection, seed=SEED)

    _, features = extractor(lambda: case.outputs(case.model, list(range(case.size))))

    for group, expected in expected_features(case, projection).items():
        np.testing.assert_allclose(features[group].numpy(), expected, atol=1e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_function_is_the_oracles_and_a_row_depends_on_itself_alone(kind: str) -> None:
    assert kind == "token_cross_entropy", f"give {kind} its oracle here"
    tokens, mask = sequences([6, 2, 1, 9])
    mask[3, :4] = False  # a prompt, whose tokens are not to be predicted
    logits = torch.randn(*tokens.shape, 300, generator=torch.Generator().manual_seed(0))

    found = OUTPUTS[kind](logits, tokens, mask)

    expected = oracle.token_cross_entropy(logits.numpy(), tokens.numpy(), mask.numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    for row in range(4):
        torch.testing.assert_close(OUTPUTS[kind](logits[[row]], tokens[[row]], mask[[row]]), found[[row]])


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-5), (np.float32, 1e-4)], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("kind", "options"), [(kind, options) for kind in KERNELS for options in KERNEL_OPTIONS[kind]], ids=str
)
def test_a_kernel_gives_the_oracles_contributions(
    kind: str, options: dict[str, Any], dtype: type[np.floating[Any]], tolerance: float
) -> None:
    kernel = resolve_kind(KERNELS, kind, options, "kernel")
    draw = np.random.default_rng(0)
    widths = {"wide": 9, "more features than rows": 40, "all zero": 4}
    train = {group: draw.standard_normal((30, width)).astype(np.float32) for group, width in widths.items()}
    train["all zero"][:] = 0
    queries = {group: draw.standard_normal((5, width)).astype(np.float32) for group, width in widths.items()}

    preconditioned = {}
    for group, width in widths.items():
        gram = np.zeros((width, width))
        update_gram(gram, train[group][:11])
        update_gram(gram, train[group][11:])
        stored = [part.astype(dtype) for part in spectrum(gram)] if kernel.needs_spectra else []
        preconditioned[group] = kernel.precondition(queries[group], *stored)
    found_c = contributions(preconditioned, train, list(widths))

    settings = {"kind": kind, "damping": options.get("damping", 0.1), "mode": options.get("mode", "relative")}
    dense = {group: oracle.precondition(train[group], queries[group], **settings) for group in widths}
    expected = oracle.contributions(dense, train, list(widths))
    scale = np.abs(expected).max(axis=(0, 1))
    assert (np.abs(found_c - expected) <= tolerance * scale).all()
    assert found_c.dtype == np.float32
