"""The sizes of a sketch: its rank, the sample that its basis is from, numbers of candidates, and what its tasks take."""

from __future__ import annotations

import math
from typing import Final

from gradstore.errors import ResourceError
from gradstore.plan.memory import PROCESS_BYTES
from gradstore.plan.sizes import gigabytes
from gradstore.spec import RunSpec
from gradstore.store.features import SetInfo

# Rows of the sample: some for each direction, and so many at least.
_ROWS_A_DIRECTION: Final = 8
_LEAST_SAMPLE: Final = 2048
# Blocks that they are from at least, so that the sample is of all parts of the data.
SAMPLED_BLOCKS: Final = 8
# The rank that is chosen: below, most of the best rows are not found; above, more candidates are cheaper.
_RANKS: Final = (64, 1024)
# Numbers of candidates whose recall is measured.
_LADDER: Final = (10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 700, 1000, 1500, 2000, 3000, 5000, 7000, 10_000)
# Queries that recall is measured on at most, and how many best rows of each.
MEASURED_QUERIES: Final = 64
MEASURED_ROWS: Final = (1, 10, 100)
# Bytes of a number of the basis.
_BASIS_ITEM: Final = 2


def sketch_rank(spec: RunSpec, info: SetInfo, features: int) -> int:
    """Numbers that are kept of every row: as declared, or what a share of the features' bytes has room for.

    Parameters
    ----------
    spec
        The run.
    info
        The train set.
    features
        Features of all groups and members, as kernels see them.
    """
    most = sample_rows(info.num_examples, info.num_examples)
    if spec.sketch.rank != "auto":
        return min(spec.sketch.rank, most)
    room = spec.sketch.share * info.num_examples * len(info.members) * info.row_bytes
    fitting = int(room / (info.num_examples + _BASIS_ITEM * features))
    least, largest = _RANKS
    return min(max(fitting, least), largest, most)


def sample_rows(rank: int, rows: int) -> int:
    """Rows that the directions are found from."""
    return min(rows, max(_LEAST_SAMPLE, _ROWS_A_DIRECTION * rank))


def ladder(rows: int) -> list[int]:
    """Numbers of candidates whose recall is measured."""
    return [count for count in _LADDER if count < rows] or [rows]


def sketch_bytes(rank: int, rows: int, features: int) -> int:
    """Bytes of levels and of the basis."""
    return rank * (rows + _BASIS_ITEM * features)


def refuse_large_sketch(spec: RunSpec, rank: int, widths: tuple[int, ...], members: int, sample: int) -> None:
    """Refuse a sketch whose basis a worker has no memory for.

    Raises
    ------
    ResourceError
        Naming what to lower.
    """
    features = members * sum(widths)
    # Directions in float32 and as they are stored; the Gram matrix, its eigenvectors and what finds them; rows of one group.
    needed = (
        PROCESS_BYTES
        + (4 + 2 * _BASIS_ITEM) * rank * features
        + 12 * sample**2
        + 16 * sample * rank
        + 20 * sample * max(widths)
    )
    worker = spec.cluster.worker_memory_bytes
    if needed > worker:
        fitting = math.floor(rank * worker / needed)
        raise ResourceError(
            f"sketch.rank: {rank} directions of {features:,} features take {gigabytes(needed)} of a task; each worker may use "
            f"{gigabytes(worker)}. Set sketch.rank = {max(fitting, 1)} or less, or raise cluster.memory_per_worker."
        )
