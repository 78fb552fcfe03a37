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

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from gradstore.numerics.learner.algorithm import LearnedWeights, refuse_no_query
from gradstore.numerics.learner.certificate import Certificate, Certification, certify
from gradstore.numerics.learner.kept import KeptRows, Piece
from gradstore.numerics.learner.positives import given_positives
from gradstore.numerics.learner.settings import ENDS, LearnerSettings
from gradstore.numerics.learner.trajectory import Trajectory, run_visits

# Q queries, M groups.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CertifiedWeights:
    """Weights equal to those of `learn_weights`, and why."""

    learned: LearnedWeights
    certificate: Certificate


def learn_certified(
    second_moments_QMM: Float64[np.ndarray, "Q M M"],
    kept: KeptRows,
    read: Callable[[], Iterable[Piece]],
    *,
    settings: Sequence[LearnerSettings],
    limit_bytes: int,
    positives: Sequence[Int64[np.ndarray, " _"]] | None = None,
) -> Certification[CertifiedWeights]:
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
    wanted = given_positives([each.objective for each in settings], positives, num_queries)
    trajectories = {
        place: Trajectory(each, num_queries=num_queries, num_groups=num_groups, positives=wanted)
        for place, each in enumerate(settings)
        if -1 not in ENDS[each.objective]
    }

    def run(pending: Mapping[int, Trajectory]) -> None:
        for together in _by_order(list(pending.values())):
            run_visits(together, second_moments_QMM, kept)

    found = certify(trajectories, run, read, second_moments_QMM=second_moments_QMM, kept=kept, limit_bytes=limit_bytes)
    message = "its objective {!r} asks for the lowest scores too, and reads are verified for the highest"
    others = {place: message.format(each.objective) for place, each in enumerate(settings) if place not in trajectories}
    certified = {
        place: CertifiedWeights(learned=trajectories[place].learned(), certificate=certificate)
        for place, certificate in found.certified.items()
    }
    return Certification(certified=certified, uncertified=others | found.uncertified)


def _by_order(trajectories: list[Trajectory]) -> list[list[Trajectory]]:
    """Settings whose visits come in the same order, together: they share what a visit needs of its query."""
    together: dict[tuple[int, int, int], list[Trajectory]] = {}
    for trajectory in trajectories:
        settings = trajectory.settings
        together.setdefault((settings.seed, settings.epochs, settings.tile), []).append(trajectory)
    return list(together.values())
