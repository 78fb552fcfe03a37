"""Reads of C until every visit has its top k, whatever makes the visits."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float64, Int64

from gradstore.errors import DataError
from gradstore.numerics.learner.algorithm import refuse_k_above, refuse_non_finite
from gradstore.numerics.learner.kept import KeptRows, Piece
from gradstore.numerics.learner.positives import refuse_missing
from gradstore.numerics.learner.settings import ENDS
from gradstore.numerics.learner.trajectory import Trajectory
from gradstore.numerics.learner.verification import Verification

# Q queries, M groups, K rows of a query.

T = TypeVar("T")

# Norms by A_q and by float32 scores differ by less, if A_q is of this C and no cancellation spoils it.
NORM_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What it took until every visit of a setting had its true top k.

    Attributes
    ----------
    reads
        Reads of C.
    added
        Rows that each read added, over all queries and settings: 0 by the last unless others went on.
    kept_rows
        Rows kept at the end of the query that has most.
    kept_bytes
        Bytes of all rows kept at the end.
    ties
        Visits at which another row was as good as the k-th, to 1e-12 sum_j w_j |C_j|.
    norm_error
        Largest relative difference at any visit between ||S|| by A_q and by the scores that were read, beyond what these may
        lose in float32: next to 0 where A_q is of this C and exact.
    """

    reads: int
    added: tuple[int, ...]
    kept_rows: int
    kept_bytes: int
    ties: int
    norm_error: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Certification(Generic[T]):
    """What became of each setting, by its place in the list: it is in one of the two.

    Attributes
    ----------
    certified
        What was found of it, whose visits are all those of the whole C.
    uncertified
        Why nothing was: these settings need `learn_weights`.
    """

    certified: dict[int, T]
    uncertified: dict[int, str]


def certify(
    trajectories: Mapping[int, Trajectory],
    run: Callable[[Mapping[int, Trajectory]], None],
    read: Callable[[], Iterable[Piece]],
    *,
    second_moments_QMM: Float64[np.ndarray, "Q M M"],
    kept: KeptRows,
    limit_bytes: int,
) -> Certification[Certificate]:
    """Run visits on the rows kept, verify them in a read of C, keep the rows that they lacked, and again until none is lacking.

    Parameters
    ----------
    trajectories
        The visits of each setting, by its place.
    run
        Makes the visits of these settings that are not settled, on the rows that are kept.
    read
        Reads C once.
    second_moments_QMM
        A_q.
    kept
        The first guess, to which rows are added.
    limit_bytes
        Most bytes of kept rows.

    Raises
    ------
    SpecError
        If k is above the number of rows, or positives are not among these.
    DataError
        If C holds NaN or infinite values, or A_q does though C does not.
    """
    _refuse_non_finite_guess(second_moments_QMM, kept, read)
    pending = dict(trajectories)
    found: Certification[Certificate] = Certification(certified={}, uncertified={})
    wanted = next((each.positives for each in pending.values() if each.positives is not None), [])
    missing = [rows_K[~kept.holds(query, rows_K)] for query, rows_K in enumerate(wanted)]
    full = kept.num_bytes + sum(map(len, missing)) * kept.row_bytes > limit_bytes
    added = [] if full else _fetched(kept, missing, read)
    while pending and not full:
        run(pending)
        verification = Verification(list(pending.values()), second_moments_QMM, kept=kept, limit_bytes=limit_bytes)
        for first, rows_N, c_QNM in read():
            verification.offer(first, rows_N, c_QNM)
        ranked = [trajectory.settings.k for trajectory in pending.values() if ENDS[trajectory.settings.objective]]
        refuse_k_above(int(verification.rows_Q.min()), max(ranked, default=0))
        added.append(verification.finish())
        full = verification.full
        for place, trajectory in list(pending.items()):
            if _is_decided(place, trajectory, found, kept=kept, added=added):
                del pending[place]
    message = f"it needs more rows than {limit_bytes} bytes hold, which is the limit of kept rows; {len(added)} reads were made"
    found.uncertified.update(dict.fromkeys(pending, message))
    return found


def _fetched(
    kept: KeptRows, missing: Sequence[Int64[np.ndarray, " _"]], read: Callable[[], Iterable[Piece]]
) -> list[int]:
    """Keep rows that are missing; how many the reads that it took have added."""
    if not any(map(len, missing)):
        return []
    kept.fetch(read, missing)
    for query, rows_K in enumerate(missing):
        refuse_missing(rows_K[~kept.holds(query, rows_K)], query)
    return [sum(map(len, missing))]


def _is_decided(
    place: int, trajectory: Trajectory, found: Certification[Certificate], *, kept: KeptRows, added: list[int]
) -> bool:
    """Whether a setting needs no further read, after what was found of it was filled in."""
    error = float(trajectory.norm_errors_T[: trajectory.settled].max(initial=0))
    if not error <= NORM_TOLERANCE:
        found.uncertified[place] = (
            f"||S|| by the second moments A_q differs from that of the scores by {error:.2g} of it, above {NORM_TOLERANCE:.2g}: "
            "either they are not of this C, or the scores of its groups cancel"
        )
        return True
    if trajectory.settled < len(trajectory.visits):
        return False
    found.certified[place] = Certificate(
        reads=len(added),
        added=tuple(added),
        kept_rows=kept.most,
        kept_bytes=kept.num_bytes,
        ties=int(trajectory.tied_T.sum()),
        norm_error=error,
    )
    return True


def _refuse_non_finite_guess(
    second_moments_QMM: Float64[np.ndarray, "Q M M"], kept: KeptRows, read: Callable[[], Iterable[Piece]]
) -> None:
    """Where no run can start because A_q or kept rows are not finite, find the contribution that is to blame."""
    good = np.isfinite(second_moments_QMM).all() and all(np.isfinite(kept.c(query)).all() for query in range(len(kept)))
    if good:
        return
    for first, rows_N, c_QNM in read():
        for query, c_NM in enumerate(c_QNM, first):
            refuse_non_finite(c_NM, query, rows_N)
    raise DataError(
        "second moments or kept rows hold NaN or infinite values, though the contributions do not: they are not of these "
        "contributions. Make them anew."
    )
