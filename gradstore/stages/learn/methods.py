"""Ways to the weights that Algorithm 1 gives: a few reads of C that certify them, or a read for every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.cluster.tasks import one_thread
from gradstore.plan.sizes import gigabytes
from gradstore.stages.contributions import Contributions, Reads
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import MomentsArtifact

if TYPE_CHECKING:
    from gradstore.numerics.learner import KeptRows, LearnedWeights, LearnerSettings

Found = tuple["LearnedWeights", dict[str, Any]]
"""Weights, and what the record says of how they were found."""


def certified(
    contributions: Contributions, settings: LearnerSettings, limit_bytes: int, progress: Progress
) -> Found | str:
    """Find the weights in a few reads of C; or say why that cannot be done.

    Parameters
    ----------
    contributions
        C of the learning queries.
    settings
        The learner's.
    limit_bytes
        Most memory for rows of C that are kept.
    progress
        Told of every read.
    """
    from gradstore.numerics.learner import learn_certified

    moments = _moments_of(contributions)
    if isinstance(moments, str):
        return moments
    shape = moments.shape
    of_span = shape.queries * shape.candidates * (4 * len(shape.groups) + 8)
    if of_span > limit_bytes:
        return f"{moments.folder} has {gigabytes(of_span)} of rows to begin with in every span, more than learn.memory"
    second_moments_QMM, kept = first_guess(moments, settings)
    reads = Reads(contributions, progress, "learn")
    # Two threads that wait for each other take longer than one, and sums are in one order.
    with one_thread():
        outcome = learn_certified(second_moments_QMM, kept, reads.read, settings=[settings], limit_bytes=limit_bytes)
    if 0 in outcome.uncertified:
        return outcome.uncertified[0]
    found = outcome.certified[0]
    proof = found.certificate
    progress.note(
        f"certified by {proof.reads} reads of C; {proof.kept_rows:,} rows of a query at most were kept, "
        f"{gigabytes(proof.kept_bytes)} in all"
    )
    return found.learned, {"method": "certified", **asdict(proof)}


def streamed(contributions: Contributions, settings: LearnerSettings, progress: Progress) -> Found:
    """Find the weights by a read of C for every epoch."""
    from gradstore.numerics.learner import learn_weights

    shape = contributions.artifact.shape
    with progress.stage("learn, by streaming", settings.epochs * shape.queries, "steps") as advance:
        learned = learn_weights(
            TileReader(contributions, settings.tile, advance).read,
            num_queries=shape.queries,
            num_groups=len(shape.groups),
            settings=settings,
        )
    return learned, {"method": "streamed", "reads": settings.epochs}


def first_guess(moments: MomentsArtifact, settings: LearnerSettings) -> tuple[np.ndarray, KeptRows]:
    """A_q over all rows, float64 [Q, M, M], and of the candidates of all spans those that score best at the first weights."""
    from gradstore.numerics.learner import best_rows, initial_weights
    from gradstore.numerics.moments import kept_rows

    groups = len(moments.shape.groups)
    total_QMM = np.zeros((moments.shape.queries, groups, groups))

    def choices() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for span in range(moments.shape.num_spans):
            found = moments.read_span(span)
            np.add(total_QMM, found.second_moments, out=total_QMM)
            yield found.rows, found.candidates

    weights_M = initial_weights(groups, seed=settings.seed)
    kept = best_rows(choices(), weights_M, count=kept_rows(settings.k), transform=settings.transform)
    return total_QMM, kept


def _moments_of(contributions: Contributions) -> MomentsArtifact | str:
    """A_q and candidates of C, whole; or why there are none."""
    artifact = contributions.artifact
    kernel, set_name = artifact.folder.split("/")[1:]
    moments = MomentsArtifact.find_named(artifact.storage, kernel, set_name)
    if moments is None:
        return f"there is no moments/{kernel}/{set_name}: contribute.second_moments was false"
    if not moments.is_complete():
        return f"{moments.folder} is not whole"
    same = all(moments.settings[name] == value for name, value in artifact.settings.items() if name != "shape")
    rounding = moments.rounding
    if not same or rounding.dtype != artifact.rounding.dtype or (rounding.scales != artifact.rounding.scales).any():
        return f"{moments.folder} is of other contributions"
    return moments


class TileReader:
    """Gives the valid rows of C_q block by block; holds the tile that q is in, because visits stay inside a tile."""

    def __init__(self, contributions: Contributions, size: int, advance: Callable[[int], None]) -> None:
        self._contributions = contributions
        self._size = size
        self._advance = advance
        self._tile = -1
        self._blocks: list[np.ndarray] = []

    def read(self, query: int) -> Iterator[np.ndarray]:
        """Pieces [rows, M] of one query's contributions, in row order."""
        self._advance(1)
        if query // self._size != self._tile:
            self._tile = query // self._size
            first = self._tile * self._size
            last = min(first + self._size, self._contributions.artifact.shape.queries)
            self._blocks = [c_QNM for _, c_QNM in self._contributions.read_blocks(first, last)]
        for block in self._blocks:
            yield block[query % self._size]
