"""Tasks of the full kernel: partial sums over rows or groups, and what is made of their total (ADR 0016).

A task that finds committed what it is to make returns at once, so that a kernel goes on from where it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradstore.plan.full import panel_blocks
from gradstore.stages.full_kernel import SideBySide, valid_rows
from gradstore.stages.reading import members_of
from gradstore.store.artifacts import FullKernelArtifact, PartialsArtifact
from gradstore.store.artifacts.full_kernel import BASIS_UNIT
from gradstore.store.features import FeatureSet, FeatureStore

GRAM = "gram"
POWER = "power"
BASIS = "basis"

Place = tuple[str, str, str]
"""Name and member of a full kernel, and what the run that builds it calls it: two at once have partial sums of their own."""


def partials_names(place: Place, phase: str) -> tuple[str, str, str]:
    """Names of the partial sums of a phase of a full kernel."""
    name, member, run = place
    return f"full-{name}-{run}", member, phase


def sum_gram(store_url: str, place: Place, part: int) -> int:
    """Task: sum the Gram matrix of some blocks (primal) or groups (dual) and commit it; return how many."""
    kernel, partials, read = _open(store_url, place, GRAM)
    items = partials.parts[part]
    # The kernel may be there by another run.
    if not partials.is_written(part) and kernel.begin(BASIS_UNIT):
        gram = _gram_of_blocks(read, items) if kernel.shape.route == "primal" else _gram_of_groups(read, items)
        partials.write(part, gram, facts={})
    return len(items)


def decompose(store_url: str, place: Place) -> int:
    """Task: add up the partial sums of a Gram matrix, decompose it and commit the kernel; return its eigenvalues' number."""
    from gradstore.numerics.kernel import Vectors, spectrum

    kernel, partials, read = _open(store_url, place, GRAM)
    shape = kernel.shape
    if not kernel.begin(BASIS_UNIT):
        return shape.eigenvalues
    found = spectrum(partials.total())
    assert isinstance(found.basis, Vectors)
    # Of the dual's N eigenvalues no more than D can be other than zero; the eigenvectors of the rest give nothing.
    values, vectors = found.eigenvalues[-shape.eigenvalues :], found.basis.vectors[:, -shape.eigenvalues :]
    facts = {"trace": float(values.sum()), "captured": 1.0}
    if shape.route == "primal":
        basis = {group: vectors[columns] for group, columns in read.slices().items()}
        kernel.write_exact(values, basis=basis, facts=facts)
    else:
        vectors[~valid_rows(read.sets)] = np.nan
        kernel.write_exact(values, coordinates=vectors, facts=facts)
    return shape.eigenvalues


def sum_power(store_url: str, place: Place, step: int, part: int) -> int:
    """Task: sum Phi^T (Phi Q) over some blocks, Q being the step's basis, and commit it; return how many rows.

    The first step also sums the squares of all features, which is the trace of Phi^T Phi.
    """
    from gradstore.numerics.kernel.low_rank import add_power, random_basis

    kernel, partials, read = _open(store_url, place, f"{POWER}-{step}")
    blocks = partials.parts[part]
    rows = sum(stop - start for start, stop in map(read.info.block_range, blocks))
    # The basis may be there by another run of the same kernel.
    if partials.is_written(part) or not kernel.begin(BASIS_UNIT):
        return rows
    if step == 0:
        basis = random_basis(kernel.settings["seed"], [*read.widths.items()], kernel.shape.dimensions)
    else:
        names = partials_names(place, f"{BASIS}-{step}")
        basis = PartialsArtifact.open(kernel.storage, names).read(0)
    basis = basis.astype(kernel.shape.dtype, copy=False)
    total, trace = np.zeros(basis.shape), 0.0
    for _, features in read.blocks(blocks):
        add_power(total, features, basis)
        trace += float(np.einsum("nd,nd->", features, features, dtype=np.float64))
    partials.write(part, total, facts={"trace": trace})
    return rows


def orthonormalize_step(store_url: str, place: Place, step: int) -> int:
    """Task: add up the partial sums of a step and commit an orthonormal basis of it; return its number of dimensions.

    That of the last step is the kernel's.
    """
    from gradstore.numerics.kernel.low_rank import orthonormalize

    kernel, partials, read = _open(store_url, place, f"{POWER}-{step}")
    shape, last = kernel.shape, step + 1 == kernel.settings["iterations"]
    later = None if last else PartialsArtifact.open(kernel.storage, partials_names(place, f"{BASIS}-{step + 1}"))
    if not kernel.begin(BASIS_UNIT) or (later is not None and later.is_written(0)):
        return shape.dimensions
    basis = partials.total()
    orthonormalize(basis)
    if later is not None:
        later.write(0, basis, facts={})
        return shape.dimensions
    trace = sum(facts["trace"] for facts in partials.facts())
    kernel.write_basis({group: basis[columns] for group, columns in read.slices().items()}, facts={"trace": trace})
    return shape.dimensions


def project_blocks(store_url: str, place: Place, blocks: Sequence[int]) -> int:
    """Task: commit the coordinates of the rows of some blocks in the kernel's basis; return how many rows.

    Rows that are not valid are NaN, where the kernel is of the mean of members those that are not in one of them.
    """
    from gradstore.numerics.kernel.low_rank import coordinates

    kernel, trains = _open_kernel(store_url, place)
    info, made_from = trains[0].info, kernel.attempt(BASIS_UNIT)
    blocks = [block for block in blocks if kernel.begin(kernel.block_unit(block), made_from)]
    rows = sum(stop - start for start, stop in map(info.block_range, blocks))
    if not blocks:
        return rows
    basis = np.concatenate([kernel.read_basis(group) for group in kernel.shape.widths])
    valid = valid_rows(trains)
    streams = [SideBySide([each], kernel.shape.dtype).blocks(blocks) for each in trains]
    for found in zip(*streams, strict=True):
        block = found[0][0]
        written = {}
        for member, (_, features) in zip(kernel.shape.members, found, strict=True):
            written[member] = coordinates(features, basis)
            written[member][~valid[slice(*info.block_range(block))]] = np.nan
        kernel.write_block(block, written, facts={"basis": made_from})
    return rows


def finish_low_rank(store_url: str, place: Place) -> int:
    """Task: decompose the second moment of the rows' coordinates and commit the spectrum; return how many eigenvalues."""
    from gradstore.numerics.kernel.low_rank import ritz_pairs

    kernel, _ = _open_kernel(store_url, place)
    shape, made_from = kernel.shape, kernel.attempt(BASIS_UNIT)
    if not kernel.begin(kernel.spectrum_unit, made_from):
        return shape.eigenvalues
    moment = np.zeros((shape.dimensions, shape.dimensions))
    for block in range(shape.num_blocks):
        rows = sum(kernel.read_coordinates(member, block).astype(np.float64) for member in shape.members)
        assert isinstance(rows, np.ndarray)
        rows /= len(shape.members)
        rows[~np.isfinite(rows).all(1)] = 0
        moment += rows.T @ rows
    values, rotation = ritz_pairs(moment, shape.eigenvalues)
    trace = kernel.facts(BASIS_UNIT)["trace"]
    captured = float(values.sum() / trace) if trace > 0 else 1.0
    kernel.write_spectrum(values, rotation, facts={"basis": made_from, "trace": trace, "captured": captured})
    return shape.eigenvalues


def _open(store_url: str, place: Place, phase: str) -> tuple[FullKernelArtifact, PartialsArtifact, SideBySide]:
    kernel, trains = _open_kernel(store_url, place)
    partials = PartialsArtifact.open(kernel.storage, partials_names(place, phase))
    return kernel, partials, SideBySide(trains, kernel.shape.dtype)


def _open_kernel(store_url: str, place: Place) -> tuple[FullKernelArtifact, list[FeatureSet]]:
    store = FeatureStore.open(store_url)
    return FullKernelArtifact.open(store.storage, *place[:2]), members_of(store.open_set("train"), place[1])


def _gram_of_blocks(read: SideBySide, blocks: Sequence[int]) -> np.ndarray:
    """Phi^T Phi [D, D] of the rows of some blocks."""
    from gradstore.numerics.kernel import GramSum

    gram = GramSum(read.edges[-1], read.dtype)
    for _, features in read.blocks(blocks):
        gram.add(features)
    return gram.total()


def _gram_of_groups(read: SideBySide, groups: Sequence[str]) -> np.ndarray:
    """Phi_j Phi_j^T [rows, rows], summed over some groups."""
    from gradstore.numerics.kernel.full import mirror

    gram = np.zeros((read.info.rows, read.info.rows))
    for group in groups:
        _add_rows(gram, read.of(group))
    mirror(gram)
    return gram


def _add_rows(gram: np.ndarray, read: SideBySide) -> None:
    """Add Phi_j Phi_j^T of one group to what is on and above the diagonal of a sum."""
    from gradstore.numerics.kernel.full import add_row_gram

    info, width = read.info, read.edges[-1]
    step = panel_blocks(info.block_rows * width * read.dtype.itemsize)
    # One panel after another in the same memory: two would be held where the next is made.
    memory = np.empty((min(info.rows, step * info.block_rows), width), read.dtype)
    for begun in range(0, info.num_blocks, step):
        # A panel's rows against themselves, then against those that come after it: each pair of rows meets once.
        panel = range(begun, min(begun + step, info.num_blocks))
        first, last = info.block_range(panel[0])[0], info.block_range(panel[-1])[1]
        held = memory[: last - first]
        # There are no rows in gaps.
        held.fill(0)
        for block, rows in read.blocks(range(begun, info.num_blocks)):
            start, stop = info.block_range(block)
            if block in panel:
                held[start - first : stop - first] = rows
            else:
                add_row_gram(gram[first:last, start:stop], held, rows)
            if block == panel[-1]:
                add_row_gram(gram[first:last, first:last], held, held)
