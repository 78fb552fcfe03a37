"""What a kind of kernel tells those who build and apply it."""

from typing import ClassVar, Literal, Protocol, runtime_checkable

from gradstore.numerics.kernel.damping import Damping

BasisName = Literal["standard", "vectors", "kronecker"]


@runtime_checkable
class Kernel(Protocol):
    """A kind of kernel with its options, as run.toml names it.

    Attributes
    ----------
    needs_spectra
        Whether anything is built from the train features; if not, queries are taken as they are.
    across_groups
        Whether it mixes groups, so that it is no sum of kernels of single groups.
    basis
        In what a group's eigenvalues are: its features (``standard``), stored eigenvectors (``vectors``), or Kronecker
        products of two of each part (``kronecker``). None where a group has no spectrum of its own.
    """

    needs_spectra: ClassVar[bool]
    across_groups: ClassVar[bool]
    basis: ClassVar[BasisName | None]

    @property
    def damped_by(self) -> Damping | None:
        """How its eigenvalues are damped; None where it has none."""
        ...
