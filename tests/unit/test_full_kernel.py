"""The kernel across groups: three routes to one form, by the dense oracle; and which route is taken."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from gradstore.errors import ResourceError, SpecError
from gradstore.numerics.kernel import KERNELS, Damping, Full, Vectors, spectrum
from gradstore.numerics.kernel.full import (
    Coefficients,
    add_row_gram,
    dual_coefficients,
    hold_rows,
    kernel_matrix,
    low_rank_coefficients,
    low_rank_self_influence,
    mirror,
    primal_coefficients,
    primal_self_influence,
)
from gradstore.numerics.kernel.low_rank import add_power, coordinates, orthonormalize, random_basis, ritz_pairs
from gradstore.plan.routes import check_route, choose_route, num_parts
from gradstore.spec import resolve_kind
from tests import oracle

GROUPS = {"first": 6, "second": 4, "third": 7}
EDGES = [0, 6, 10, 17]
WIDTH = 17
MANY, FEW = 40, 9


def features(rows: int, seed: int = 0) -> np.ndarray:
    """Rows whose features differ a hundredfold in size."""
    return np.random.default_rng(seed).standard_normal((rows, WIDTH)) * np.geomspace(1, 0.01, WIDTH)


def by_group(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {group: rows[:, first:last] for group, (first, last) in zip(GROUPS, pairwise(EDGES), strict=True)}


def squares(rows: np.ndarray) -> np.ndarray:
    return np.stack([(group**2).sum(1) for group in by_group(rows).values()], 1)


def mean(train: np.ndarray) -> float:
    return float((train**2).sum() / WIDTH)


def primal(train: np.ndarray, queries: np.ndarray, damping: Damping) -> tuple[Coefficients, np.ndarray]:
    found = spectrum(train.T @ train)
    assert isinstance(found.basis, Vectors)
    vectors, inverse, shift = found.basis.vectors, damping.inverse(found.eigenvalues), damping.shift(found.eigenvalues)
    first = max(0, WIDTH - len(train)) if hold_rows(found.eigenvalues, min(train.shape), shift) else 0
    matrix = kernel_matrix(vectors[:, first:], inverse[first:])
    return primal_coefficients(queries, EDGES, vectors, inverse, matrix), train


def dual(train: np.ndarray, queries: np.ndarray, damping: Damping) -> tuple[Coefficients, np.ndarray]:
    gram = np.zeros((len(train), len(train)))
    add_row_gram(gram, train, train)
    found = spectrum(gram)
    assert isinstance(found.basis, Vectors)
    vectors = found.basis.vectors
    pairs = zip(by_group(queries).values(), by_group(train).values(), strict=True)
    rotated = np.stack([query @ rows.T @ vectors for query, rows in pairs], 1)
    return dual_coefficients(rotated, squares(queries), found.eigenvalues, mean(train), damping), vectors


def subspace(train: np.ndarray, dimensions: int, rank: int, iterations: int = 2) -> tuple[np.ndarray, Any]:
    basis = random_basis(3, [*GROUPS.items()], dimensions)
    for _ in range(iterations):
        total = np.zeros_like(basis)
        add_power(total, train, basis)
        orthonormalize(total)
        basis = total
    projected = coordinates(train, basis)
    return basis, ritz_pairs(projected.T @ projected, rank)


def low_rank(
    train: np.ndarray, queries: np.ndarray, damping: Damping, rank: int | None = None
) -> tuple[Coefficients, np.ndarray]:
    rank = min(train.shape) if rank is None else rank
    basis, pairs = subspace(train, min(*train.shape, rank + 4), rank)
    vectors = basis @ pairs.rotation
    rotated = np.stack(
        [
            query @ vectors[first:last]
            for query, (first, last) in zip(by_group(queries).values(), pairwise(EDGES), strict=True)
        ],
        1,
    )
    shift = damping.shift(pairs.eigenvalues, mean(train))
    held = min(train.shape) if hold_rows(pairs.eigenvalues, min(train.shape), shift) else None
    made = low_rank_coefficients(rotated, squares(queries), pairs.eigenvalues, shift, held=held)
    return made, train @ vectors


def contributions(made: Coefficients, rows: np.ndarray, queries: np.ndarray, train: np.ndarray) -> np.ndarray:
    pairs = zip(by_group(queries).values(), by_group(train).values(), strict=True)
    inner = np.stack([query @ group.T for query, group in pairs], 2)
    return np.asarray(made.scale * inner + np.einsum("qmp,np->qnm", made.values, rows))


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("damping", [Damping(value=0.1), Damping(value=0.02, mode="absolute"), Damping(value=3.0)])
@pytest.mark.parametrize("rows", [MANY, FEW])
@pytest.mark.parametrize("route", [primal, dual, low_rank])
def test_every_route_at_full_rank_is_the_dense_kernel(route: Any, rows: int, damping: Damping) -> None:
    train, queries = features(rows), features(5, seed=1)
    options: dict[str, Any] = {"damping": damping.value, "mode": damping.mode}

    made, coordinates_of_rows = route(train, queries, damping)

    expected = oracle.full_contributions(by_group(train), by_group(queries), [*GROUPS], **options)
    assert difference(contributions(made, coordinates_of_rows, queries, train), expected) < 1e-6
    selves = oracle.full_self_influence(by_group(train), by_group(queries), [*GROUPS], **options)
    assert difference(made.selves, selves) < 1e-6


@pytest.mark.parametrize("rows", [MANY, FEW])
def test_the_self_influence_of_rows_is_that_of_the_dense_kernel_on_every_route(rows: int) -> None:
    train, damping = features(rows), Damping(value=0.1)
    expected = oracle.full_self_influence(by_group(train), by_group(train), [*GROUPS], damping=0.1)
    found = spectrum(train.T @ train)
    assert isinstance(found.basis, Vectors)
    vectors, inverse = found.basis.vectors, damping.inverse(found.eigenvalues)

    assert difference(primal_self_influence(train, EDGES, vectors, inverse), expected) < 1e-6

    basis, pairs = subspace(train, min(train.shape), min(train.shape))
    vectors, shift = basis @ pairs.rotation, damping.shift(pairs.eigenvalues, mean(train))
    for j, (first, last) in enumerate(pairwise(EDGES)):
        products = (train[:, first:last] @ vectors[first:last]) * (train @ vectors)
        own = low_rank_self_influence(squares(train)[:, j], products, pairs.eigenvalues, shift)
        assert difference(own, expected[:, j]) < 1e-6
    assert not low_rank_self_influence(squares(train)[:, 0], products, pairs.eigenvalues, 0.0).any()


def test_eigenvectors_beyond_the_rows_are_left_out_where_rounding_has_not_mixed_the_last_row_with_them() -> None:
    flat, falling = np.array([1.0, 2, 3, 1e-16, 0]), np.array([1e-9, 2, 3, 1e-10, 0])

    assert hold_rows(flat, 3, 0.1)
    assert not hold_rows(falling, 3, 0.1)
    assert hold_rows(falling, 3, 1e-15)
    assert not hold_rows(flat, 5, 0.1)
    assert not hold_rows(flat[:2], 3, 0.1)
    assert not hold_rows(flat, 0, 0.1)


def test_a_kernel_of_features_that_are_all_zero_gives_zero_under_relative_damping() -> None:
    train, queries = np.zeros((MANY, WIDTH)), features(5)

    for route in (primal, dual, low_rank):
        made, rows = route(train, queries, Damping(value=0.1))
        assert not contributions(made, rows, queries, train).any()
        assert not made.selves.any()


def test_the_error_of_a_low_rank_falls_with_the_rank_and_the_captured_trace_rises() -> None:
    train, queries, damping = features(MANY), features(5, seed=1), Damping(value=0.01)
    expected = oracle.full_contributions(by_group(train), by_group(queries), [*GROUPS], damping=0.01)
    trace = float((train**2).sum())
    exact = np.linalg.eigvalsh(train.T @ train)[::-1]

    errors, captured = [], []
    for rank in (2, 6, 10, 14):
        errors.append(difference(contributions(*low_rank(train, queries, damping, rank), queries, train), expected))
        values = subspace(train, min(rank + 4, WIDTH), rank)[1].eigenvalues
        captured.append(float(values.sum() / trace))
        assert captured[-1] == pytest.approx(exact[:rank].sum() / trace, rel=1e-3)

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]
    assert captured == sorted(captured)


def test_the_random_subspace_does_not_depend_on_the_order_of_the_groups() -> None:
    first = random_basis(3, [*GROUPS.items()], 4)
    turned = random_basis(3, [*reversed(GROUPS.items())], 4)

    np.testing.assert_array_equal(first[:6], turned[-6:])
    assert np.abs(random_basis(4, [*GROUPS.items()], 4) - first).max() > 0.1


def test_columns_that_span_less_than_their_number_become_an_orthonormal_basis_and_zeros() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((30, 3)) @ rng.standard_normal((3, 5))
    spanned = values.copy()

    orthonormalize(values)

    kept = values[:, np.linalg.norm(values, axis=0) > 0.5]
    assert kept.shape == (30, 3)
    np.testing.assert_allclose(kept.T @ kept, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(kept @ (kept.T @ spanned), spanned, atol=1e-10)
    assert np.abs(values).sum(0)[np.linalg.norm(values, axis=0) <= 0.5].sum() == 0


def test_badly_conditioned_columns_become_orthonormal() -> None:
    values = np.random.default_rng(0).standard_normal((60, 6)) * np.geomspace(1, 1e-9, 6)

    orthonormalize(values)

    np.testing.assert_allclose(values.T @ values, np.eye(6), atol=1e-12)


def test_products_of_rows_are_summed_in_float64_over_pieces_of_features() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((rows, 5000)).astype(np.float32) + 10 for rows in (3, 4))
    gram = np.zeros((3, 4))

    add_row_gram(gram, first, second)

    np.testing.assert_allclose(gram, first.astype(np.float64) @ second.T.astype(np.float64), rtol=1e-6)


def test_a_matrix_is_mirrored_at_its_diagonal() -> None:
    whole = np.random.default_rng(0).standard_normal((1100, 1100))
    whole += whole.T
    upper = np.triu(whole)

    mirror(upper)

    np.testing.assert_array_equal(upper, whole)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"damping": 0.0}, r"kernel.damping: found 0.0"),
        ({"rank": 0}, r"kernel.rank: found 0; accepted: 1 or more"),
        ({"iterations": 0}, r"kernel.iterations: found 0; accepted: 1 or more"),
        ({"oversample": -1}, r"kernel.oversample: found -1; accepted: 0 or more"),
        ({"route": "shortest"}, r"kernel.route: found 'shortest'"),
        ({"spectra": "float16"}, r"kernel.spectra: found 'float16'"),
    ],
)
def test_options_of_the_full_kernel_are_checked(options: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        resolve_kind(KERNELS, "full", options, "kernel")


def test_the_full_kernel_damps_as_every_other() -> None:
    kernel = resolve_kind(KERNELS, "full", {"damping": 0.5, "mode": "absolute"}, "kernel")

    assert isinstance(kernel, Full)
    assert kernel.damped_by == Damping(value=0.5, mode="absolute")


GIB = 2**30


def test_the_smaller_gram_matrix_is_decomposed_where_it_fits() -> None:
    assert choose_route(100_000, 2_000, 4 * GIB, 512)[0] == "primal"
    assert choose_route(2_000, 100_000, 4 * GIB, 512)[0] == "dual"

    route, reason = choose_route(100_000, 28_672, 4 * GIB, 512)

    assert route == "low_rank"
    assert "100,000 rows of 28,672 features: the Gram matrix of 28,672 x 28,672 takes" in reason
    assert "more than the 4.29 GB of a worker: rank 512" in reason


def test_the_dual_route_is_not_taken_where_it_is_closed() -> None:
    assert choose_route(2_000, 100_000, 16 * GIB, 512, dual=False)[0] == "low_rank"
    assert choose_route(2_000, 3_000, 16 * GIB, 512, dual=False)[0] == "primal"


@pytest.mark.parametrize("route", ["primal", "dual"])
def test_a_route_that_does_not_fit_is_refused_with_numbers_and_the_way_out(route: Any) -> None:
    with pytest.raises(
        ResourceError, match=rf'kernel.route = "{route}": 90,000 rows of 90,000 features need .* GB'
    ) as caught:
        check_route(route, 90_000, 90_000, 4 * GIB, 512)

    assert 'Set kernel.route to "low_rank", raise cluster.memory_per_worker to' in str(caught.value)


def test_a_rank_that_does_not_fit_is_refused_with_the_one_that_does() -> None:
    with pytest.raises(ResourceError, match=r"Lower kernel.rank until it is (\d+) with kernel.oversample") as caught:
        choose_route(100_000, 917_504, 8 * GIB, 528)

    most = int(str(caught.value).split("until it is ")[1].split()[0])
    check_route("low_rank", 100_000, 917_504, 8 * GIB, most)
    with pytest.raises(ResourceError):
        check_route("low_rank", 100_000, 917_504, 8 * GIB, most + 1)


def test_partial_sums_keep_workers_busy_and_their_bytes_bounded() -> None:
    assert num_parts(100, 2, 8) == 4
    assert num_parts(3, 8, 8) == 3
    assert num_parts(100, 8, 2 * GIB) == 2
    assert num_parts(100, 8, 100 * GIB) == 1
