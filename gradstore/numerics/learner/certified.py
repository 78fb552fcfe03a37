r"""Algorithm 1 with the whole of C, from a few reads: guess on kept rows, verify in a read, add what was missed, repeat.

A visit needs of C_q only the top k rows and A_q = C_q^T C_q, because ||S_q||^2 = w^T A_q w. Whatever rows are kept, Algorithm 1
runs on them in memory and gives the w that meets every visit. One read of C then finds the rows that belong in the top k of
any visit, of all settings together. Visits before the first that lacks a row are those of Algorithm 1 on all rows, by
induction: each met the w that the ones before it made, and took the right rows. They are settled. With the missing rows kept,
the next run goes further. Each read settles at least one visit more, and in practice most: 2 to 6 reads are enough.

What is exact: top k are those of float64 scores, where rows within 1e-12 sum_j w_j |C_j| of the k-th place may swap. Losses
and weights equal the reference's to rounding if A_q is summed in float64. As `gradstore.numerics.moments` sums it, A_q has the
rounding of float32 products, about 1e-7 of it, and so have response and norm; where the groups' scores cancel, so that
||S|| is much smaller than sum_j w_j ||C_j||, it weighs more by the square of their ratio.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from gradstore.errors import DataError
from gradstore.numerics.learner.algorithm import LearnedWeights, refuse_k_above, refuse_no_query, refuse_non_finite
from gradstore.numerics.learner.kept import KeptRows, Piece
from gradstore.numerics.learner.positives import given_positives, refuse_missing
from gradstore.numerics.learner.settings import ENDS, LearnerSettings
from gradstore.numerics.learner.trajectory import Trajectory, run_visits
from gradstore.numerics.learner.verification import Verification

# Q queries, M groups, K rows of a query.

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
class CertifiedWeights:
    """Weights equal to those of `learn_weights`, and why."""

    learned: LearnedWeights
    certificate: Certificate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Certification:
    """What became of each setting, by its place in the list: it is in one of the two.

    Attributes
    ----------
    certified
        Weights and certificates.
    uncertified
        Why there are none: these settings need `learn_weights`.
    """

    certified: dict[int, CertifiedWeights]
    uncertified: dict[int, str]


def learn_certified(
    second_moments_QMM: Float64[np.ndarray, "Q M M"],
    kept: KeptRows,
    read: Callable[[], Iterable[Piece]],
    *,
    settings: Sequence[LearnerSettings],
    limit_bytes: int,
    positives: Sequence[Int64[np.ndarray, " _"]] | None = None,
) -> Certification:
    """Fit the weights of Algorithm 1 for one or more settings, reading C a few times in all.

    The result is that of `learn_weights` on the same C, to rounding (see the module). Memory is the kept rows, A_q, 16 E Q M
    bytes for every setting, 4 bytes for every number of all weights to be verified, and some slices of about 2 MiB.

    Parameters
    ----------
    second_moments_QMM
        A_q.
    kept
        The first guess. More rows make fewer reads; any choice, even none, gives the same result. Missing rows are added.
    read
        Reads C once: pieces in any order that together hold every valid row of every query once.
    settings
        Each is verified until it is certified; reads are shared.
    limit_bytes
        Most bytes of kept rows. Where they would not do, the settings that are not certified yet are returned as such.
    positives
        As for `learn_weights`. Those that are not kept take a read more.

    Raises
    ------
    SpecError
        If there is no query, k is above the number of rows, or positives are missing, of no use, or of no such row.
    DataError
        If C holds NaN or infinite values, or A_q does though C does not.
    """
    num_queries, num_groups, _ = second_moments_QMM.shape
    refuse_no_query(num_queries)
    wanted = given_positives(settings, positives, num_queries)
    _refuse_non_finite_guess(second_moments_QMM, kept, read)
    pending = {
        place: Trajectory(each, num_queries=num_queries, num_groups=num_groups, positives=wanted)
        for place, each in enumerate(settings)
        if -1 not in ENDS[each.objective]
    }
    message = "its objective {!r} asks for the lowest scores too, and reads are verified for the highest"
    others = {
        place: message.format(settings[place].objective) for place in range(len(settings)) if place not in pending
    }
    outcome = Certification(certified={}, uncertified=others)
    missing = [rows_K[~kept.holds(query, rows_K)] for query, rows_K in enumerate(wanted or [])]
    full = kept.num_bytes + sum(map(len, missing)) * kept.row_bytes > limit_bytes
    added = [] if full else _fetched(kept, missing, read)
    while pending and not full:
        for together in _by_order(list(pending.values())):
            run_visits(together, second_moments_QMM, kept)
        verification = Verification(list(pending.values()), second_moments_QMM, kept=kept, limit_bytes=limit_bytes)
        for first, rows_N, c_QNM in read():
            verification.offer(first, rows_N, c_QNM)
        ranked = [trajectory.settings.k for trajectory in pending.values() if ENDS[trajectory.settings.objective]]
        refuse_k_above(int(verification.rows_Q.min()), max(ranked, default=0))
        added.append(verification.finish())
        full = verification.full
        for place, trajectory in list(pending.items()):
            if _is_decided(place, trajectory, outcome, kept=kept, added=added):
                del pending[place]
    message = f"it needs more rows than {limit_bytes} bytes hold, which is the limit of kept rows; {len(added)} reads were made"
    outcome.uncertified.update(dict.fromkeys(pending, message))
    return outcome


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
    place: int, trajectory: Trajectory, outcome: Certification, *, kept: KeptRows, added: list[int]
) -> bool:
    """Whether a setting needs no further read, after its outcome was filled in."""
    error = float(trajectory.norm_errors_T[: trajectory.settled].max(initial=0))
    if not error <= NORM_TOLERANCE:
        outcome.uncertified[place] = (
            f"||S|| by the second moments A_q differs from that of the scores by {error:.2g} of it, above {NORM_TOLERANCE:.2g}: "
            "either they are not of this C, or the scores of its groups cancel"
        )
        return True
    if trajectory.settled < len(trajectory.visits):
        return False
    certificate = Certificate(
        reads=len(added),
        added=tuple(added),
        kept_rows=kept.most,
        kept_bytes=kept.num_bytes,
        ties=int(trajectory.tied_T.sum()),
        norm_error=error,
    )
    outcome.certified[place] = CertifiedWeights(learned=trajectory.learned(), certificate=certificate)
    return True


def _by_order(trajectories: list[Trajectory]) -> list[list[Trajectory]]:
    """Settings whose visits come in the same order, together: they share what a visit needs of its query."""
    together: dict[tuple[int, int, int], list[Trajectory]] = {}
    for trajectory in trajectories:
        settings = trajectory.settings
        together.setdefault((settings.seed, settings.epochs, settings.tile), []).append(trajectory)
    return list(together.values())


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
