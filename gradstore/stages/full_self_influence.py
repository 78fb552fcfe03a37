"""Self-influence of train examples under the kernel across groups: what each would add to its own attribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradstore.spec import RunSpec
from gradstore.stages.full_kernel import SideBySide, open_full, rows_held, valid_rows
from gradstore.store.artifacts import FullKernelArtifact
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Damping


def is_dual(store: FeatureStore, spec: RunSpec, member: str) -> bool:
    """Whether self-influence takes a pass over all rows, whichever rows are asked for: better all of them at once."""
    return open_full(store, spec, member).shape.route == "dual"


def full_self_influences(
    store: FeatureStore, spec: RunSpec, member: str, blocks: Sequence[int], dampings: Sequence[Damping]
) -> Iterator[tuple[int, np.ndarray]]:
    """(block, tau_j(n, n) float64 [dampings, rows of the block, M]) of some blocks; NaN of rows that are not valid.

    A dual kernel reads every block of the set besides.

    Raises
    ------
    NotReadyError
        If the kernel is not built.
    ContractError
        If it is stale.
    """
    kernel = open_full(store, spec, member)
    train = store.open_set("train", member)
    read = SideBySide([train], "float64")
    valid = valid_rows([train])
    found = {"primal": _primal, "dual": _dual, "low_rank": _low_rank}[kernel.shape.route](
        kernel, read, blocks, dampings
    )
    for block, tau_VNM in found:
        tau_VNM[:, ~valid[slice(*train.info.block_range(block))]] = np.nan
        yield block, tau_VNM


Found = Iterator[tuple[int, np.ndarray]]


def _primal(kernel: FullKernelArtifact, read: SideBySide, blocks: Sequence[int], dampings: Sequence[Damping]) -> Found:
    from gradstore.numerics.kernel.full import primal_self_influence

    vectors = np.concatenate([kernel.read_basis(group) for group in kernel.shape.widths]).astype(np.float64, copy=False)
    counted = []
    for damping in dampings:
        inverse, held = damping.inverse(kernel.read_eigenvalues()), rows_held(kernel, read.sets[0], damping)
        first = 0 if held is None else len(inverse) - held
        counted.append((vectors[:, first:], inverse[first:]))
    for block, rows in read.blocks(blocks):
        yield block, np.stack([primal_self_influence(rows, read.edges, *which) for which in counted])


def _low_rank(
    kernel: FullKernelArtifact, read: SideBySide, blocks: Sequence[int], dampings: Sequence[Damping]
) -> Found:
    from gradstore.numerics.kernel.full import low_rank_self_influence

    eigenvalues, rotation = kernel.read_eigenvalues(), kernel.read_rotation()
    shifts = [damping.shift(eigenvalues, kernel.mean_eigenvalue) for damping in dampings]
    held = [rows_held(kernel, read.sets[0], damping) for damping in dampings]
    bases = {group: kernel.read_basis(group) for group in kernel.shape.widths}
    for block, rows in read.blocks(blocks):
        coordinates = kernel.read_coordinates(read.sets[0].member, block) @ rotation
        tau_VNM = np.empty((len(dampings), len(rows), len(bases)))
        for place, (group, columns) in enumerate(read.slices().items()):
            features = rows[:, columns]
            products = (features @ bases[group] @ rotation) * coordinates
            squares = np.einsum("nd,nd->n", features, features)
            for variant, shift in enumerate(shifts):
                tau_VNM[variant, :, place] = low_rank_self_influence(
                    squares, products, eigenvalues, shift, held=held[variant]
                )
        yield block, tau_VNM


def _dual(kernel: FullKernelArtifact, read: SideBySide, blocks: Sequence[int], dampings: Sequence[Damping]) -> Found:
    """tau_j(n, n) = sum_r (phi_nj Phi_j^T U)_r U_nr / (g_r + lambda), one group after the other."""
    member, info = read.sets[0].member, read.info
    inverses = [damping.inverse(kernel.read_eigenvalues(), kernel.mean_eigenvalue) for damping in dampings]
    inverse_RV = np.stack(inverses, 1)
    tau = {}
    for block in blocks:
        start, stop = info.block_range(block)
        tau[block] = np.empty((len(dampings), stop - start, len(read.widths)))
    for place, group in enumerate(read.widths):
        of_group = read.of(group)
        images = np.zeros((read.widths[group], kernel.shape.eigenvalues))
        for block, rows in of_group.blocks(range(info.num_blocks)):
            images += rows.T @ np.nan_to_num(kernel.read_coordinates(member, block), nan=0.0)
        for block, rows in of_group.blocks(blocks):
            products = (rows @ images) * kernel.read_coordinates(member, block)
            tau[block][:, :, place] = (products @ inverse_RV).T
    yield from tau.items()
