"""Kernels refuse what they cannot invert, and survive what is degenerate."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from gradstore.errors import DataError, SpecError
from gradstore.numerics.kernel import (
    KERNELS,
    Block,
    Damping,
    GramSum,
    Identity,
    Kronecker,
    Spectrum,
    SquareSum,
    Standard,
    Vectors,
    kronecker_basis,
    spectrum,
)
from gradstore.spec import resolve_kind
from tests import oracle


def features(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


def gram_of(*pieces: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    total = GramSum(pieces[0].shape[1], dtype)
    for piece in pieces:
        total.add(piece)
    return total.total()


def test_a_gram_matrix_is_summed_in_float64_over_pieces_of_rows() -> None:
    rows = features(3 * 2048 + 5, 4) + 100

    gram = gram_of(rows)

    exact = rows.astype(np.float64).T @ rows.astype(np.float64)
    np.testing.assert_allclose(gram, exact, rtol=1e-6)
    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_allclose(gram_of(rows, dtype=np.float64), exact, rtol=1e-13)


def test_a_gram_matrix_of_several_tiles_is_whole_and_symmetric() -> None:
    rows = features(40, 1100)

    gram = gram_of(rows[:3], rows[3:])

    np.testing.assert_array_equal(gram, gram.T)
    np.testing.assert_allclose(gram, rows.astype(np.float64).T @ rows.astype(np.float64), atol=1e-4)


@pytest.mark.parametrize("cuts", [(0,), (1, 2047, 2048), (2048,), (700, 1400, 2100, 2800)])
def test_pieces_of_any_length_give_the_same_gram_matrix_bit_for_bit(cuts: tuple[int, ...]) -> None:
    rows = features(4100, 3)

    bounds = [0, *cuts, len(rows)]
    gram = gram_of(*(rows[start:stop] for start, stop in pairwise(bounds)))

    np.testing.assert_array_equal(gram, gram_of(rows))


def test_a_spectrum_rebuilds_its_gram_matrix_and_is_never_negative() -> None:
    gram = gram_of(features(5, 12))

    found = spectrum(gram)

    assert isinstance(found.basis, Vectors)
    values, vectors = found.eigenvalues, found.basis.vectors
    assert values.dtype == vectors.dtype == np.float64
    assert (values >= 0).all()
    assert (values[:7] < 1e-4).all()
    np.testing.assert_allclose(vectors * values @ vectors.T, gram, atol=1e-5)


def test_sums_over_a_row_of_nan_are_refused() -> None:
    rows = features(4, 3)
    rows[2, 1] = np.nan

    with pytest.raises(DataError, match=r"Gram matrix: it holds NaN or infinite values.*left out before the kernel"):
        spectrum(gram_of(rows))
    squares = SquareSum(Standard(), 3)
    squares.add(rows)
    with pytest.raises(DataError, match=r"sum of squares: it holds NaN or infinite values"):
        squares.total()
    with pytest.raises(DataError, match=r"output covariance: it holds NaN"):
        kronecker_basis([(np.full((2, 2), np.inf), np.eye(2))])


def test_features_whose_products_pass_float32_are_told_to_take_float64() -> None:
    rows = 1e25 * features(4, 3)

    with pytest.raises(DataError, match=r'set kernel.spectra = "float64"'):
        spectrum(gram_of(rows))
    exact = spectrum(gram_of(rows, dtype=np.float64))
    expected = oracle.precondition(rows, rows, kind="block", damping=0.1, mode="relative")
    np.testing.assert_allclose(exact.precondition(rows, Damping(value=0.1)), expected, rtol=1e-5)


def test_relative_damping_is_a_ratio_to_the_mean_eigenvalue() -> None:
    eigen = Spectrum(eigenvalues=np.array([1.0, 2.0, 6.0]), basis=Standard())
    query = features(4, 3)

    relative = eigen.precondition(query, Damping(value=0.5))

    np.testing.assert_allclose(relative, query / (np.array([1.0, 2.0, 6.0]) + 1.5), rtol=1e-6)
    np.testing.assert_array_equal(relative, eigen.precondition(query, Damping(value=1.5, mode="absolute")))
    assert Damping(value=0.5).shift(eigen.eigenvalues[:2], mean=3.0) == 1.5


def test_one_damping_applied_to_many_groups_stays_what_it_is() -> None:
    damping, query = Block(damping=0.5).damped_by, features(4, 2)
    small, large = (Spectrum(eigenvalues=scale * np.array([1.0, 3.0]), basis=Standard()) for scale in (1, 1000))

    before = small.precondition(query, damping)
    large.precondition(query, damping)

    np.testing.assert_array_equal(small.precondition(query, damping), before)


@pytest.mark.parametrize("basis", [Standard(), Vectors(np.eye(4)), Kronecker(((np.eye(2), np.eye(2)),))], ids=str)
def test_a_group_of_all_zero_features_is_preconditioned_to_zero_by_relative_damping(basis: Any) -> None:
    nothing, query = Spectrum(eigenvalues=np.zeros(4), basis=basis), features(2, 4)

    assert not nothing.precondition(query, Damping(value=0.1)).any()
    assert not nothing.self_influence(query, Damping(value=0.1)).any()
    absolute = Damping(value=2.0, mode="absolute")
    np.testing.assert_allclose(nothing.precondition(query, absolute), query / 2, rtol=1e-6)


def test_very_small_features_are_preconditioned_though_their_inverse_passes_float32() -> None:
    rows = 1e-20 * features(30, 4)

    found = spectrum(gram_of(rows, dtype=np.float64)).precondition(rows, Damping(value=0.1))

    expected = oracle.precondition(rows, rows, kind="block", damping=0.1, mode="relative")
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def orthonormal(size: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


@pytest.mark.parametrize(
    "basis",
    [
        Standard(),
        Vectors(orthonormal(18, 0)),
        Kronecker(((orthonormal(3, 1), orthonormal(4, 2)), (orthonormal(2, 3), orthonormal(3, 4)))),
    ],
    ids=["standard", "vectors", "kronecker"],
)
def test_coordinates_keep_inner_products_and_are_restored(basis: Any) -> None:
    rows = features(7, 18).astype(np.float64)

    coordinates = basis.rotate(rows)

    np.testing.assert_allclose(coordinates @ coordinates.T, rows @ rows.T, atol=1e-12)
    np.testing.assert_allclose(basis.restore(coordinates), rows, atol=1e-12)
    # One number after the other of what is rotated, as the dense matrix of the basis has it.
    dense = basis.rotate(np.eye(18))
    np.testing.assert_allclose(coordinates, rows @ dense, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 512, 1100])
def test_self_influence_is_the_inner_product_of_a_row_with_itself_preconditioned(rows: int) -> None:
    train, damping = features(rows, 6), Damping(value=0.3)
    found = spectrum(gram_of(train))

    tau = found.self_influence(train, damping)

    expected = oracle.precondition(train, train, kind="block", damping=0.3, mode="relative")
    np.testing.assert_allclose(tau, (expected * train).sum(1), rtol=1e-4)
    assert tau.dtype == np.float64


def test_the_self_influence_of_a_row_that_is_not_valid_is_nan_and_of_no_rows_nothing() -> None:
    train, damping = features(5, 3), Damping(value=0.1)
    found = spectrum(gram_of(train))
    train[2] = np.nan

    tau = found.self_influence(train, damping)

    assert np.isnan(tau).tolist() == [False, False, True, False, False]
    assert found.self_influence(train[:0], damping).shape == (0,)


def test_sums_of_squares_in_a_kronecker_basis_are_those_of_coordinates() -> None:
    basis = Kronecker(((orthonormal(3, 1), orthonormal(2, 2)),))
    rows = features(1025, 6)

    sums = SquareSum(basis, 6)
    sums.add(rows[:100])
    sums.add(rows[100:])

    matrices = rows.astype(np.float64).reshape(-1, 3, 2)
    left, right = basis.parts[0]
    expected = [[sum((left[:, a] @ f @ right[:, b]) ** 2 for f in matrices) for b in range(2)] for a in range(3)]
    np.testing.assert_allclose(sums.total(), np.array(expected).reshape(-1), rtol=1e-6)


def test_what_each_kind_needs_is_told() -> None:
    assert {name: kind.needs_spectra for name, kind in KERNELS.items() if name != "full"} == {
        "identity": False,
        "diagonal": True,
        "block": True,
        "ekfac": True,
    }
    assert Identity().damped_by is None
    assert Block(damping=2.0, mode="absolute").damped_by == Damping(value=2.0, mode="absolute")


@pytest.mark.parametrize("kind", sorted({*KERNELS} - {"identity"}))
@pytest.mark.parametrize("damping", [0.0, -0.1, float("nan"), float("inf")])
def test_damping_that_has_no_inverse_is_refused(kind: str, damping: float) -> None:
    with pytest.raises(SpecError, match=r"kernel.damping: found .*; accepted: a finite number"):
        resolve_kind(KERNELS, kind, {"damping": damping}, "kernel")


def test_options_of_a_kernel_are_checked() -> None:
    with pytest.raises(SpecError, match=r"kernel.damping: unknown key; identity takes no options"):
        resolve_kind(KERNELS, "identity", {"damping": 0.1}, "kernel")
    with pytest.raises(SpecError, match=r"kernel.spectra: unknown key; accepted for diagonal: damping, mode"):
        resolve_kind(KERNELS, "diagonal", {"spectra": "float64"}, "kernel")
    with pytest.raises(SpecError, match=r"kernel.mode: found 'ratio'"):
        resolve_kind(KERNELS, "block", {"mode": "ratio"}, "kernel")
    with pytest.raises(SpecError, match=r"kernel.spectra: found 'float16'"):
        resolve_kind(KERNELS, "ekfac", {"spectra": "float16"}, "kernel")
