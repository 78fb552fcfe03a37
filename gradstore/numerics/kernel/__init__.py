"""Kernels K: how the features of queries are preconditioned before they meet those of training examples.

What is stored is a spectrum, not an inverse, so that any damping can be applied later without another pass over the
features. Where K acts inside a group it is symmetric, so it is applied to the Q query rows instead of the N training rows.
"""

from gradstore.numerics.kernel.block import Block
from gradstore.numerics.kernel.damping import DampedKernel, Damping
from gradstore.numerics.kernel.diagonal import Diagonal
from gradstore.numerics.kernel.ekfac import Ekfac, kronecker_basis
from gradstore.numerics.kernel.full import Full
from gradstore.numerics.kernel.gram import GramSum, spectrum, zero_invalid
from gradstore.numerics.kernel.identity import Identity
from gradstore.numerics.kernel.protocol import BasisName, Kernel
from gradstore.numerics.kernel.spectra import Basis, Kronecker, Spectrum, SquareSum, Standard, Vectors

KERNELS: dict[str, type[Kernel]] = {
    "identity": Identity,
    "diagonal": Diagonal,
    "block": Block,
    "ekfac": Ekfac,
    "full": Full,
}

__all__ = [
    "KERNELS",
    "Basis",
    "BasisName",
    "Block",
    "DampedKernel",
    "Damping",
    "Diagonal",
    "Ekfac",
    "Full",
    "GramSum",
    "Identity",
    "Kernel",
    "Kronecker",
    "Spectrum",
    "SquareSum",
    "Standard",
    "Vectors",
    "kronecker_basis",
    "spectrum",
    "zero_invalid",
]
