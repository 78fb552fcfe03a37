"""The kernel that changes nothing."""

from dataclasses import dataclass
from typing import ClassVar

from gradstore.numerics.kernel.protocol import BasisName


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """K = I: contributions are inner products of gradients (TracIn)."""

    needs_spectra: ClassVar[bool] = False
    across_groups: ClassVar[bool] = False
    basis: ClassVar[BasisName | None] = None

    @property
    def damped_by(self) -> None:
        """None: there are no eigenvalues."""
        return
