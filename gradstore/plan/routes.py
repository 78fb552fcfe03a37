"""How the full kernel is built: by its D x D Gram matrix, by the N x N one, or from a random subspace, as they fit."""

from __future__ import annotations

from typing import Final, Literal

from gradstore.errors import ResourceError
from gradstore.plan.sizes import gigabytes

Route = Literal["primal", "dual", "low_rank"]

# Bytes that decomposing a Gram matrix takes by its entries: the matrix, its sum with a part that is read, LAPACK's copy
# with its workspace, the eigenvectors and what is stored of them (plan/memory.py).
_DECOMPOSED_BYTES: Final = 44
# Bytes that a random subspace takes by its entries: the float64 sum of a phase, the basis that it was made with and the one
# that comes of it, and pieces of both.
_SUBSPACE_BYTES: Final = 20
# What a worker takes beside: its process, and a block of features (plan/memory.py counts them exactly).
_BESIDE_BYTES: Final = 2**30
# Partial sums that are kept for a kernel that is being built: fewer tasks where they would take more.
PARTIAL_BYTES: Final = 4 * 2**30
PARTS_PER_WORKER: Final = 2


def choose_route(
    num_rows: int, num_features: int, memory_bytes: int, rank: int, *, dual: bool = True
) -> tuple[Route, str]:
    """Choose the route of the full kernel; return it and why.

    The smaller Gram matrix is decomposed where that fits a worker, because it is exact; else the eigenvectors of the
    largest eigenvalues are found in a random subspace.

    Parameters
    ----------
    num_rows, num_features
        N examples of D features in all groups together.
    memory_bytes
        Memory of one worker.
    rank
        Dimensions of the random subspace.
    dual
        Whether the dual route is open: not to a kernel of the mean of members.

    Raises
    ------
    ResourceError
        If no route fits.
    """
    exact: Route = "dual" if dual and num_rows < num_features else "primal"
    side = num_rows if exact == "dual" else num_features
    needed = _BESIDE_BYTES + route_memory(exact, num_rows, num_features, rank)
    what = f"{num_rows:,} rows of {num_features:,} features: the Gram matrix of {side:,} x {side:,} takes "
    if needed <= memory_bytes:
        return exact, f"{what}{gigabytes(needed)}, which a worker with {gigabytes(memory_bytes)} has: exact"
    check_route("low_rank", num_rows, num_features, memory_bytes, rank)
    return "low_rank", f"{what}{gigabytes(needed)}, more than the {gigabytes(memory_bytes)} of a worker: rank {rank}"


def check_route(route: Route, num_rows: int, num_features: int, memory_bytes: int, rank: int) -> None:
    """Refuse a route that a worker has no memory for.

    Raises
    ------
    ResourceError
        With what it takes, and what would fit.
    """
    needed = _BESIDE_BYTES + route_memory(route, num_rows, num_features, rank)
    if needed <= memory_bytes:
        return
    found = (
        f'kernel.route = "{route}": {num_rows:,} rows of {num_features:,} features need {gigabytes(needed)} in one task; a '
        f"worker has {gigabytes(memory_bytes)}. "
    )
    if route != "low_rank":
        raise ResourceError(
            f'{found}Set kernel.route to "low_rank", raise cluster.memory_per_worker to {gigabytes(needed)}, '
            "or lower the projection's rank."
        )
    most = (memory_bytes - _BESIDE_BYTES) // (_SUBSPACE_BYTES * num_features)
    fitting = (
        f"Lower kernel.rank until it is {most} with kernel.oversample, "
        if most > 1
        else "Lower the projection's rank, "
    )
    raise ResourceError(f"{found}{fitting}or raise cluster.memory_per_worker to {gigabytes(needed)}.")


def route_memory(route: Route, num_rows: int, num_features: int, rank: int) -> int:
    """Bytes that the largest task of a route takes beside its process and the features that it reads."""
    side = {"primal": num_features, "dual": num_rows}
    if route == "low_rank":
        return _SUBSPACE_BYTES * num_features * min(rank, num_rows, num_features)
    return _DECOMPOSED_BYTES * side[route] ** 2


def num_parts(units: int, workers: int, part_bytes: int) -> int:
    """Number of partial sums: two a worker keep all busy, fewer where there is less to share out or they would take much."""
    return max(1, min(units, PARTS_PER_WORKER * workers, PARTIAL_BYTES // part_bytes))
