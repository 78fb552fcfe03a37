"""Kernels that act inside a group: their bundles, objects, bytes and memory, and what they cannot be built from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gradstore.errors import ResourceError, SpecError
from gradstore.plan.sizes import BUNDLE_BYTES, KERNEL_BUNDLES, Widths, gigabytes, split
from gradstore.spec import RunSpec

if TYPE_CHECKING:
    from gradstore.numerics.kernel import BasisName, Kernel

# Rows of a product of a Gram matrix, and entries of rows whose squares are summed at once (numerics/kernel).
_ROWS_PER_PRODUCT: Final = 2048
_ENTRIES_AT_ONCE: Final = 2**17
# Rows that are rotated at once into eigenvectors.
_ROWS_AT_ONCE: Final = 512
# A tile of a Gram matrix, as the product and as it is added.
_TILE_BYTES: Final = 2 * 8 * 1024**2
_CHECKSUM_BYTES: Final = 4
# Of the decomposition of a symmetric matrix [d, d] in float64, by d^3: measured at 256 and 1,024 on one core with AVX2.
SECONDS_PER_CUBE: Final = 4e-10
# What the refusal of a kernel of whole Gram matrices tells to take instead.
SMALLER_KERNELS: Final = (
    'the projection\'s rank, or set kernel.kind = "diagonal", "ekfac", or "full" with kernel.route = "low_rank"'
)


def kernel_bundles(basis: BasisName | None, widths: Sequence[int]) -> int:
    """Number of bundles of groups that a kernel is built in; the same whatever the number of workers.

    Several bundles keep workers busy; what a bundle sums up takes about BUNDLE_BYTES at most.
    """
    held = sum(_held_bytes(basis, width, 8) for width in widths)
    return min(len(widths), max(KERNEL_BUNDLES, math.ceil(held / BUNDLE_BYTES)))


def kernel_objects(basis: BasisName | None, widths: Widths) -> int:
    """Objects of one kernel: artifact.json, commit records, array and chunk of each matrix, and zarr.json of folders."""
    if basis is None:
        return 1
    groups, parts = len(widths.full), sum(map(len, widths.sides))
    bundles = kernel_bundles(basis, widths.full)
    # artifact.json, zarr.json of the kernel and of its folders; array and chunk of the eigenvalues of every group.
    folders, matrices = {"standard": (1, 0), "vectors": (2, groups), "kronecker": (5, 4 * parts)}[basis]
    return 2 + folders + bundles + (basis == "kronecker") + 2 * (groups + matrices)


def kernel_tasks(basis: BasisName | None, widths: Widths) -> int:
    """Tasks of one kernel: one a bundle of groups, and one that sums covariances where bases come from them."""
    return 0 if basis is None else kernel_bundles(basis, widths.full) + (basis == "kronecker")


def kernel_bytes(kernel: Kernel, widths: Widths) -> int:
    """Bytes of the chunks of one kernel: float64 eigenvalues, and the matrices of their basis."""
    if kernel.basis is None:
        return 0
    total = sum(8 * width + _CHECKSUM_BYTES for width in widths.full)
    item = vector_bytes(kernel)
    if kernel.basis == "vectors":
        total += sum(item * width**2 + _CHECKSUM_BYTES for width in widths.full)
    if kernel.basis == "kronecker":
        sides = [side for group in widths.sides for part in group for side in part]
        total += sum((item + 8) * side**2 + 2 * _CHECKSUM_BYTES for side in sides)
    return total


def task_bytes(kernel: Kernel, widths: Widths) -> int:
    """Memory of the largest task of a kernel, beside its process and the features that it reads.

    A Gram matrix comes with the rows that are gathered for its next product. LAPACK's syevd works on a copy, with two more
    as workspace, and numpy copies the result out: 32 d^2 bytes beside the matrix, and the eigenvectors that are kept. Those
    of later groups take less than the matrices they replace. Sums of squares take the rows that are rotated at once: as
    they are cut out of a group, between the two products and after, in the precision of the bases, and in float64.
    """
    if kernel.basis is None:
        return 0
    item, widest = vector_bytes(kernel), max(widths.full)
    entries = max(_ENTRIES_AT_ONCE, widest)
    bundles = split(widths.full, kernel_bundles(kernel.basis, widths.full))
    held = max(sum(_held_bytes(kernel.basis, width, item) for width in bundle) for bundle in bundles)
    if kernel.basis == "vectors":
        return held + max((32 + item) * widest**2, _TILE_BYTES)
    if kernel.basis == "standard":
        return held + 8 * entries
    squares = [sum(r**2 + s**2 for r, s in group) for group in widths.sides]
    bases = max(sum(bundle) for bundle in split(squares, len(bundles))) * (8 + 2 * item)
    # The covariances are summed by a task of their own, of all parts at once: the sums, and a block's as they are read.
    return max(held + bases + (8 + 4 * item) * entries, (8 + 3 * 4) * sum(squares))


def spectra_bytes(kernel: Kernel, widths: Widths, groups: int) -> int:
    """Memory of the spectra of as many consecutive groups, as they are applied, and of rows that are rotated at once."""
    item = vector_bytes(kernel)
    held = [8 * width for width in widths.full]
    if kernel.basis == "vectors":
        held = [8 * width + item * width**2 for width in widths.full]
    elif kernel.basis == "kronecker":
        sides = [sum(r**2 + s**2 for r, s in group) for group in widths.sides]
        held = [8 * width + item * side for width, side in zip(widths.full, sides, strict=True)]
    most = max(sum(held[first : first + groups]) for first in range(0, len(held), groups))
    return most + (16 + 3 * item) * max(_ENTRIES_AT_ONCE, _ROWS_AT_ONCE * max(widths.full))


def vector_bytes(kernel: Kernel) -> int:
    """Bytes of one number of stored eigenvectors."""
    from gradstore.numerics.kernel import Block, Ekfac

    return 8 if isinstance(kernel, Block | Ekfac) and kernel.spectra == "float64" else 4


def decomposition_notes(kernel: Kernel, widths: Widths) -> list[str]:
    """What is told of the time that decompositions take, where it is more than a minute."""
    sides: list[int] = []
    if kernel.basis == "vectors":
        sides = list(widths.full)
    elif kernel.basis == "kronecker":
        sides = [side for group in widths.sides for part in group for side in part]
    minutes = SECONDS_PER_CUBE * sum(side**3 for side in sides) / 60
    if minutes < 1:
        return []
    told = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.0f} minutes"
    return [
        f"the kernel decomposes {len(sides):,} matrices of up to {max(sides):,} x {max(sides):,}: about {told} on one core"
    ]


def refuse_too_large(spec: RunSpec, kernel: Kernel, widths: Widths, beside: int) -> None:
    """Refuse a kernel of which one task does not fit a worker; ``beside`` are its process and the features that it reads.

    Raises
    ------
    ResourceError
        With what it takes, and what would fit.
    """
    needed, limit = beside + task_bytes(kernel, widths), spec.cluster.worker_memory_bytes
    if needed > limit:
        raise ResourceError(
            f'kernel.kind = "{spec.kernel.kind}": one task needs {gigabytes(needed)} for groups of up to '
            f"{max(widths.full):,} features, a worker may use {gigabytes(limit)}. Raise cluster.memory_per_worker, or lower "
            f"{SMALLER_KERNELS}."
        )


def refuse_without_factors(spec: RunSpec, kernel: Kernel, without: Sequence[str]) -> None:
    """Refuse Kronecker bases of features that are no matrices of factors; ``without`` names the groups that are not.

    Raises
    ------
    SpecError
        Naming the first group, and what to change.
    """
    if kernel.basis != "kronecker":
        return
    what = f'kernel.kind = "{spec.kernel.kind}"'
    if spec.kernel.members == "mean":
        raise SpecError(
            f'{what}: found kernel.members = "mean"; accepted: "each". The covariances of the mean of several members\' '
            'factors are not known. Set kernel.members = "each", or use kernel.kind = "block" or "diagonal".'
        )
    if without:
        raise SpecError(
            f"{what}: the features of group {without[0]}{_and_more(without)} are not matrices of two projected factors, so they "
            'have no covariances. Use features.projection.kind = "logra" or "lorif", or kernel.kind = "block" or "diagonal".'
        )


def refuse_without_covariances(spec: RunSpec, kernel: Kernel) -> None:
    """Refuse Kronecker bases where featurize keeps no covariances.

    Raises
    ------
    SpecError
        Naming the setting.
    """
    if kernel.basis != "kronecker":
        return
    what = f'kernel.kind = "{spec.kernel.kind}" needs the covariances of the projected factors: '
    if not spec.features.covariances:
        raise SpecError(
            f'{what}found features.covariances = false. Set it to true, or use kernel.kind = "block" or "diagonal".'
        )
    if any(spec.model.of_member(name).optimizer is not None for name in spec.model.etas):
        raise SpecError(
            f"{what}found model.optimizer; features in Adam's direction have none, since what is divided entry by entry has "
            'no factors. Leave model.optimizer out, or use kernel.kind = "block" or "diagonal".'
        )


def _held_bytes(basis: BasisName | None, width: int, item: int) -> int:
    """What a group's sum takes: a Gram matrix and the rows of its next product, or sums of squares."""
    return 8 * width**2 + item * _ROWS_PER_PRODUCT * width if basis == "vectors" else 8 * width


def _and_more(names: Sequence[str]) -> str:
    return f" and of {len(names) - 1} more" if len(names) > 1 else ""
