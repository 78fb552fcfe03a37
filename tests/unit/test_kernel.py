"""Kernels refuse what they cannot invert, and survive what is degenerate."""

from __future__ import annotations

import numpy as np
import pytest

from gradstore.errors import DataError, SpecError
from gradstore.numerics.kernel import KERNELS, Block, Identity, Spectrum, spectrum, update_gram
from gradstore.spec import resolve_kind


def features(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


def test_a_gram_matrix_is_summed_in_float64_over_pieces_of_rows() -> None:
    gram = np.zeros((4, 4))
    rows = features(3 * 2048 + 5, 4) + 100

    update_gram(gram, rows)

    exact = rows.astype(np.float64).T @ rows.astype(np.float64)
    np.testing.assert_allclose(gram, exact, rtol=1e-6)
    np.testing.assert_array_equal(gram, gram.T)


def test_a_spectrum_rebuilds_its_gram_matrix_and_is_never_negative() -> None:
    rows = features(5, 12)
    gram = np.zeros((12, 12))
    update_gram(gram, rows)

    eigenvalues, eigenvectors = spectrum(gram)

    assert eigenvalues.dtype == eigenvectors.dtype == np.float64
    assert (eigenvalues >= 0).all()
    assert (eigenvalues[:7] < 1e-4).all()
    np.testing.assert_allclose(eigenvectors * eigenvalues @ eigenvectors.T, gram, atol=1e-5)


def test_a_gram_matrix_with_a_row_of_nan_is_refused() -> None:
    gram = np.zeros((3, 3))
    rows = features(4, 3)
    rows[2, 1] = np.nan
    update_gram(gram, rows)

    with pytest.raises(DataError, match=r"NaN or infinite values.*left out before the kernel is built"):
        spectrum(gram)


def test_relative_damping_is_a_ratio_to_the_mean_eigenvalue() -> None:
    eigen = Spectrum(np.array([1.0, 2.0, 6.0]), np.eye(3))
    query = features(4, 3)

    relative = Block(damping=0.5).precondition(query, *eigen)

    np.testing.assert_allclose(relative, query / (np.array([1.0, 2.0, 6.0]) + 1.5), rtol=1e-6)
    np.testing.assert_array_equal(relative, Block(damping=1.5, mode="absolute").precondition(query, *eigen))


def test_one_kernel_applied_to_many_groups_keeps_its_damping() -> None:
    kernel, query = Block(damping=0.5), features(4, 2)
    small, large = (Spectrum(scale * np.array([1.0, 3.0]), np.eye(2)) for scale in (1, 1000))

    before = kernel.precondition(query, *small)
    kernel.precondition(query, *large)

    np.testing.assert_array_equal(kernel.precondition(query, *small), before)


def test_a_group_of_all_zero_features_is_preconditioned_to_zero_by_relative_damping() -> None:
    nothing = spectrum(np.zeros((3, 3)))

    assert not Block().precondition(features(2, 3), *nothing).any()
    np.testing.assert_allclose(
        Block(damping=2.0, mode="absolute").precondition(features(2, 3), *nothing), features(2, 3) / 2, rtol=1e-6
    )


def test_the_identity_returns_the_queries_and_needs_no_spectra() -> None:
    query = features(2, 3)

    assert not Identity.needs_spectra
    np.testing.assert_array_equal(Identity().precondition(query), query)


@pytest.mark.parametrize("damping", [0.0, -0.1, float("nan"), float("inf")])
def test_damping_that_has_no_inverse_is_refused(damping: float) -> None:
    with pytest.raises(SpecError, match=r"kernel.damping: found .*; accepted: a finite number"):
        resolve_kind(KERNELS, "block", {"damping": damping}, "kernel")


def test_options_of_a_kernel_are_checked() -> None:
    with pytest.raises(SpecError, match=r"kernel.damping: unknown key; identity takes no options"):
        resolve_kind(KERNELS, "identity", {"damping": 0.1}, "kernel")
    with pytest.raises(SpecError, match=r"kernel.mode: found 'ratio'"):
        resolve_kind(KERNELS, "block", {"mode": "ratio"}, "kernel")
