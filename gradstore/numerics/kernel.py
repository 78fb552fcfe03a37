"""Kernels K: how the features of queries are preconditioned before they meet those of training examples.

What is stored is the spectrum of each group's Gram matrix Phi^T Phi, not its inverse, so that any damping can be
applied later without another pass over the features. K acts inside a group and is symmetric, so it is applied to the Q
query rows instead of the N training rows.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Float64

from gradstore.errors import DataError, SpecError

ROWS_PER_PRODUCT = 2048


class Spectrum(NamedTuple):
    """The eigendecomposition of one group's Gram matrix."""

    eigenvalues: Float[np.ndarray, " D"]
    """Ascending, none negative."""
    eigenvectors: Float[np.ndarray, "D D"]
    """In columns, in the order of the eigenvalues."""


@runtime_checkable
class Kernel(Protocol):
    """A kind of kernel with its options, as run.toml names it."""

    needs_spectra: ClassVar[bool]

    def precondition(
        self,
        query_QD: Float[np.ndarray, "Q D"],
        eigenvalues_D: Float[np.ndarray, " D"] | None = None,
        eigenvectors_DD: Float[np.ndarray, "D D"] | None = None,
    ) -> Float32[np.ndarray, "Q D"]:
        """Return K psi_q of one group for every query q; the group's spectrum is left out if it is not needed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """K = I: contributions are inner products of gradients (TracIn)."""

    needs_spectra: ClassVar[bool] = False

    def precondition(
        self,
        query_QD: Float[np.ndarray, "Q D"],
        eigenvalues_D: Float[np.ndarray, " D"] | None = None,
        eigenvectors_DD: Float[np.ndarray, "D D"] | None = None,
    ) -> Float32[np.ndarray, "Q D"]:
        """Return the queries as they are; no spectrum is needed."""
        return query_QD.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    r"""Inverse of the damped Gram matrix, per group.

    .. math:: K_j = (\Phi_j^T \Phi_j + \lambda_j I)^{-1}

    Attributes
    ----------
    damping
        lambda_j itself, or its ratio to the mean eigenvalue of the group's Gram matrix.
    mode
        ``relative`` or ``absolute``: which of the two ``damping`` is.
    """

    needs_spectra: ClassVar[bool] = True
    damping: float = 0.1
    mode: Literal["relative", "absolute"] = "relative"

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise SpecError(
                f"kernel.damping: found {self.damping}; accepted: a finite number above 0. Features need not span "
                "their space, and without damping the kernel has no inverse."
            )

    def precondition(
        self,
        query_QD: Float[np.ndarray, "Q D"],
        eigenvalues_D: Float[np.ndarray, " D"] | None = None,
        eigenvectors_DD: Float[np.ndarray, "D D"] | None = None,
    ) -> Float32[np.ndarray, "Q D"]:
        """Return V diag(1 / (eigenvalue + lambda)) V^T psi_q for every query, in the precision of the eigenvectors.

        Where relative damping meets a group whose training features are all zero, lambda is 0 and so is the result:
        such a group contributes nothing, whatever its kernel.
        """
        assert eigenvalues_D is not None, "a block kernel is applied to a group without its spectrum"
        assert eigenvectors_DD is not None, "a block kernel is applied to a group without its spectrum"
        damped_D = eigenvalues_D.astype(np.float64)
        damped_D += self.damping * damped_D.mean() if self.mode == "relative" else self.damping
        inverse_D = np.divide(1, damped_D, out=np.zeros_like(damped_D), where=damped_D > 0)
        dtype = eigenvectors_DD.dtype
        rotated_QD = (query_QD.astype(dtype, copy=False) @ eigenvectors_DD) * inverse_D.astype(dtype)
        return np.asarray(rotated_QD @ eigenvectors_DD.T, dtype=np.float32)


def update_gram(gram_DD: Float64[np.ndarray, "D D"], features_ND: Float32[np.ndarray, "N D"]) -> None:
    """Add the features' Gram matrix Phi^T Phi to ``gram_DD`` in place.

    Products of at most 2,048 rows are float32; their sum is float64.
    """
    for start in range(0, len(features_ND), ROWS_PER_PRODUCT):
        piece_ND = features_ND[start : start + ROWS_PER_PRODUCT]
        # numpy sees that both factors are one array, and computes half of the symmetric product.
        gram_DD += piece_ND.T @ piece_ND


def zero_invalid(features_ND: Float32[np.ndarray, "N D"]) -> None:
    """Set rows that are not valid, which hold NaN, to 0 in place: they add nothing to a Gram matrix or a product."""
    features_ND[~np.isfinite(features_ND).all(1)] = 0


def spectrum(gram_DD: Float64[np.ndarray, "D D"]) -> Spectrum:
    """Eigenvalues, raised to 0 where rounding made them negative, and eigenvectors of a Gram matrix, both float64.

    Raises
    ------
    DataError
        If the Gram matrix is not finite.
    """
    if not np.isfinite(gram_DD).all():
        raise DataError(
            "Gram matrix: it holds NaN or infinite values, so some row of the features does. Rows that are not valid "
            "must be left out before the kernel is built."
        )
    eigenvalues_D, eigenvectors_DD = np.linalg.eigh(gram_DD)
    return Spectrum(np.maximum(eigenvalues_D, 0), eigenvectors_DD)


KERNELS: dict[str, type[Kernel]] = {"identity": Identity, "block": Block}
