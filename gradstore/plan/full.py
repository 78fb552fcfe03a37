"""The kernel stage where the kernel is the full one: its route, and what that takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from gradstore.errors import ResourceError, SpecError
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.routes import Route, check_route, choose_route, num_parts, route_memory
from gradstore.plan.sizes import BLOCKS_PER_WORKER, SetPlan, StagePlan, Widths, gigabytes
from gradstore.spec import RunSpec, key_of

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Full

_CHECKSUM_BYTES: Final = 4
# Rows of one group that the dual route holds while the others pass by.
_PANEL_BYTES: Final = 256 * 2**20
# Part of a worker's memory that the coefficients of one query set and member may take.
_COEFFICIENT_SHARE: Final = 0.5


def full_options(spec: RunSpec) -> Full:
    """Options of a run's kernel, which is the full one."""
    from gradstore.numerics.kernel import Full

    kernel = resolve_kernel(spec)
    assert isinstance(kernel, Full), "kernel.kind must be full"
    return kernel


def route_of(spec: RunSpec, shape: tuple[int, int], begun: Route | None = None) -> tuple[Route, str]:
    """Return the route of the full kernel of train features of a ``shape`` [N, D], and why it is that.

    Where run.toml leaves it open, it is that of the kernels which are ``begun`` already, of this member or another.

    Raises
    ------
    ResourceError
        If no route fits a worker, or the one that run.toml asks for does not.
    SpecError
        If the dual route is asked for where the kernel is of the mean of members.
    """
    kernel, memory = full_options(spec), spec.cluster.worker_memory_bytes
    dimensions = kernel.rank + kernel.oversample
    of_mean = spec.kernel.members == "mean" and len(spec.model.etas) > 1
    route = kernel.route
    if route == "auto":
        if begun is None:
            return choose_route(*shape, memory, dimensions, dual=not of_mean)
        route = begun
    if route == "dual" and of_mean:
        raise SpecError(
            'kernel.route: found "dual" with kernel.members = "mean": the dual kernel holds coordinates of the mean features '
            'alone, and none of each member\'s. Set kernel.route to "primal" or "low_rank".'
        )
    check_route(route, *shape, memory, dimensions)
    return route, "as kernel.route says" if kernel.route == route else "as kernels that are there already"


def full_sizes(kernel: Full, route: Route, shape: tuple[int, int]) -> tuple[int, int]:
    """(eigenvalues that are kept, columns of the basis and of coordinates) of train features of a ``shape`` [N, D]."""
    least = min(shape)
    if route == "low_rank":
        return min(kernel.rank, least), min(kernel.rank + kernel.oversample, least)
    return (shape[1], shape[1]) if route == "primal" else (least, least)


def full_stage(spec: RunSpec, widths: Widths, train: SetPlan, reading_bytes: int) -> StagePlan:
    """Plan the kernel stage; ``reading_bytes`` are those of a task's process and of the features that it reads.

    Partial sums are written besides, and removed when the kernel is there: neither their objects nor their bytes are counted.
    """
    kernel, shape, etas = full_options(spec), (train.rows, sum(widths.full)), len(spec.model.etas)
    route, _ = route_of(spec, shape)
    eigenvalues, dimensions = full_sizes(kernel, route, shape)
    mean = spec.kernel.members == "mean"
    kernels, members = (1, etas) if mean else (etas, 1)
    item = 8 if kernel.spectra == "float64" else 4
    # artifact.json, a commit record, zarr.json of the member and of the spectrum, the eigenvalues' and their chunk.
    objects, written = 6, 8 * eigenvalues + _CHECKSUM_BYTES
    if route != "dual":
        objects += 1 + 2 * len(widths.full)
        written += item * shape[1] * dimensions + _CHECKSUM_BYTES * len(widths.full)
    if route != "primal":
        objects += 1 + members * (1 + train.blocks)
        written += members * train.blocks * (item * train.block_rows * dimensions + _CHECKSUM_BYTES)
    if route == "low_rank":
        # The rotation, and a record for the basis and for each block.
        objects += 2 + 1 + train.blocks
        written += 8 * dimensions * eigenvalues + _CHECKSUM_BYTES
    largest = route_memory(route, *shape, kernel.rank + kernel.oversample)
    if route == "dual":
        largest = max(largest, _row_gram_bytes(widths, train, item))
    else:
        largest += item * train.block_rows * shape[1] * (members if route == "low_rank" else 1)
    return StagePlan(
        name="kernel",
        tasks=kernels * _num_tasks(spec, kernel, route, len(widths.full), train, shape),
        # zarr.json of full-kernels and of the route.
        objects=2 + kernels * objects,
        written_bytes=kernels * written,
        task_memory_bytes=reading_bytes + largest,
    )


def panel_blocks(block_bytes: int) -> int:
    """Return how many consecutive blocks of a group's features the dual route holds at once."""
    return max(1, _PANEL_BYTES // block_bytes)


def _row_gram_bytes(widths: Widths, train: SetPlan, item: int) -> int:
    """Memory of summing a Gram matrix of rows, beside a task's process and the features that it reads.

    The sum; rows of a group that are held, two blocks as they pass by, and a product; or the sum once more as it is written.
    """
    passing = 0
    for width in set(widths.full):
        held = min(train.rows, train.block_rows * panel_blocks(item * train.block_rows * width))
        passing = max(passing, item * (width * (held + 2 * train.block_rows) + held**2))
    return 8 * train.rows**2 + max(passing, 8 * train.rows**2)


def full_influence_bytes(spec: RunSpec, widths: Widths, train: SetPlan) -> int:
    """Memory of self-influence under the full kernel, beside a task's process and the features that it reads.

    What building the kernel takes is more than the kernel itself; of the dual route come the images of a group's features.
    """
    kernel, shape = full_options(spec), (train.rows, sum(widths.full))
    route, _ = route_of(spec, shape)
    side_by_side = 3 * 8 * train.block_rows * shape[1]
    images = 8 * max(widths.full) * train.rows if route == "dual" else 0
    return side_by_side + images + route_memory(route, *shape, kernel.rank + kernel.oversample)


def refuse_coefficients(spec: RunSpec, set_name: str, sizes: tuple[int, int, int]) -> None:
    """Refuse coefficients [queries, groups, coordinates] of a query set that a worker has no memory for.

    Raises
    ------
    ResourceError
        With what they take, and the ways out.
    """
    taken, memory = 4 * math.prod(sizes), spec.cluster.worker_memory_bytes
    if taken > _COEFFICIENT_SHARE * memory:
        raise ResourceError(
            f'kernel.kind = "full": the coefficients of {set_name} ({sizes[0]:,} queries x {sizes[1]:,} groups x {sizes[2]:,} '
            f"coordinates) take {gigabytes(taken)}, more than half of the {gigabytes(memory)} of a worker. Lower "
            f'{key_of(set_name)}.rows, set kernel.route to "low_rank" with a lower kernel.rank, or raise cluster.memory_per_worker.'
        )


def refuse_all_coefficients(spec: RunSpec, widths: Widths, sets: Mapping[str, SetPlan]) -> None:
    """Refuse a plan of which one query set's coefficients do not fit: see `refuse_coefficients`."""
    shape = (sets["train"].rows, sum(widths.full))
    route, _ = route_of(spec, shape)
    _, coordinates = full_sizes(full_options(spec), route, shape)
    for name in spec.data.query_sets():
        refuse_coefficients(spec, name, (sets[name].rows, len(widths.full), coordinates))


def full_notes(spec: RunSpec, widths: Widths, rows: int) -> list[str]:
    """What a reader is told of the route."""
    route, reason = route_of(spec, (rows, sum(widths.full)))
    return [f"full kernel: {route}: {reason}"]


def _num_tasks(spec: RunSpec, kernel: Full, route: Route, groups: int, train: SetPlan, shape: tuple[int, int]) -> int:
    workers, (rows, features) = spec.cluster.num_workers, shape
    if route == "primal":
        return num_parts(train.blocks, workers, 8 * features**2) + 1
    if route == "dual":
        return num_parts(groups, workers, 8 * rows**2) + 1
    sums = num_parts(train.blocks, workers, 8 * features * full_sizes(kernel, route, shape)[1])
    return kernel.iterations * (sums + 1) + min(train.blocks, BLOCKS_PER_WORKER * workers) + 1
