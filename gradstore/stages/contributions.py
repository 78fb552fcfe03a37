"""Reading C back, or scores in its place: whole, and without the rows that are not valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gradstore.errors import NotReadyError
from gradstore.plan.sizes import LEARNER_BUFFERS, verified_queries
from gradstore.stages.progress import Progress
from gradstore.stages.spectra import require_current
from gradstore.store.alignment import aligned
from gradstore.store.artifacts import ContributionArtifact, MomentsArtifact, ScoreMatrixArtifact
from gradstore.store.features import FeatureStore
from gradstore.store.layout import RowBlocks
from gradstore.store.read_ahead import read_ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributions:
    """C of one set of queries, whole; ``valid`` tells, of the blocks with rows that are not, which rows are valid.

    A row is valid if it is in every member.
    """

    artifact: ContributionArtifact
    valid: Mapping[int, np.ndarray]

    @classmethod
    def open(cls, store: FeatureStore, kernel: str, set_name: str) -> Contributions:
        """Open the contributions of a set of queries.

        Raises
        ------
        NotReadyError
            If they are not whole, or were never kept.
        ContractError
            If they are stale: a set that they were made from has changed since.
        """
        _refuse_streamed(store, kernel, set_name)
        artifact = ContributionArtifact.open(store.storage, kernel, set_name)
        _require_whole(artifact, store)
        return cls(artifact=artifact, valid=_valid_masks(store))

    def valid_rows(self) -> np.ndarray:
        """Numbers of the valid rows, ascending."""
        return _valid_rows(self.artifact.shape, self.valid)

    def read_blocks(
        self, query_start: int, query_stop: int, buffers: Sequence[np.ndarray] = ()
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows [n] and contributions [queries, n, groups] of some queries, block by block.

        Each block has memory of its own, unless there are ``buffers`` (two, to read a block while one is worked on): then
        it is read into one of these, and stays as it is until the next is asked for.
        """

        def begin(pool: ThreadPoolExecutor, block: int, buffer: np.ndarray) -> Callable[[], np.ndarray]:
            return pool.submit(self.artifact.read, query_start, query_stop, block, buffer).result

        blocks = range(self.artifact.shape.num_blocks)
        read = (
            read_ahead(blocks, buffers, begin, threads=1)
            if buffers
            else self.artifact.read_blocks(query_start, query_stop)
        )
        for block, c_QNM in zip(blocks, read, strict=True):
            rows_N = np.arange(*self.artifact.shape.block_range(block))
            if block in self.valid:
                yield rows_N[self.valid[block]], c_QNM[:, self.valid[block]]
            else:
                yield rows_N, c_QNM


class Reads:
    """Reads C of all queries, some whole tiles of them at a time, block by block through two buffers; more than once.

    Parameters
    ----------
    contributions
        C.
    progress, stage
        Told of every read, and what it is told that reads.
    """

    def __init__(self, contributions: Contributions, progress: Progress, stage: str) -> None:
        self._contributions = contributions
        self._progress = progress
        self._stage = stage
        shape = contributions.artifact.shape
        self._shape = shape
        self._queries = verified_queries((shape.queries, len(shape.groups)), shape.block_rows, shape.query_tile)
        size = self._queries, shape.block_rows, len(shape.groups)
        self._buffers = [aligned(size) for _ in range(LEARNER_BUFFERS)]
        self._count = 0

    def read(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Pieces (first query, rows [n], C [q, n, M]) that hold every valid row of every query once."""
        self._count += 1
        shape, item = self._shape, self._contributions.artifact.rounding.stored_dtype.itemsize
        slices = [
            (first, min(first + self._queries, shape.queries)) for first in range(0, shape.queries, self._queries)
        ]
        stored = shape.queries * shape.rows * len(shape.groups) * item
        label, total = f"{self._stage}, read {self._count} of C", len(slices) * len(self._contributions.valid_rows())
        with self._progress.stage(label, total, "rows", total_bytes=stored) as advance:
            for first, last in slices:
                for rows_N, c_QNM in self._contributions.read_blocks(first, last, self._buffers):
                    yield first, rows_N, c_QNM
                    advance(len(rows_N))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMatrix:
    """Scores of one set of queries under given weights, whole; ``valid`` as in `Contributions`."""

    artifact: ScoreMatrixArtifact
    valid: Mapping[int, np.ndarray]

    @classmethod
    def open(cls, store: FeatureStore, name: str, set_name: str) -> ScoreMatrix:
        """Open the scores of a set of queries; ``name`` is that of the kernel and of the weights, with a dot between.

        Raises
        ------
        NotReadyError
            If they are not whole.
        ContractError
            If they are stale: a set that they were made from has changed since.
        """
        artifact = ScoreMatrixArtifact.open(store.storage, name, set_name)
        _require_whole(artifact, store)
        return cls(artifact=artifact, valid=_valid_masks(store))

    def valid_rows(self) -> np.ndarray:
        """Numbers of the valid rows, ascending."""
        return _valid_rows(self.artifact.shape, self.valid)

    def read_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows [n] and scores [queries, n], block by block."""
        for block in range(self.artifact.shape.num_blocks):
            rows_N, s_QN = np.arange(*self.artifact.shape.block_range(block)), self.artifact.read(block)
            valid_N = self.valid.get(block)
            yield (rows_N, s_QN) if valid_N is None else (rows_N[valid_N], s_QN[:, valid_N])


def valid_queries(store: FeatureStore, set_name: str) -> np.ndarray:
    """Numbers of the queries that are valid in every member: others have scores of zero, and are judged by nothing."""
    members = store.open_set(set_name).info.members
    valid = [store.open_set(set_name, member).valid_rows() for member in members]
    return np.flatnonzero(np.logical_and.reduce(valid))


def _refuse_streamed(store: FeatureStore, kernel: str, set_name: str) -> None:
    """Say so where C was built and not kept.

    Raises
    ------
    NotReadyError
        With the way out.
    """
    if ContributionArtifact.find_named(store.storage, kernel, set_name) is not None:
        return
    moments = MomentsArtifact.find_named(store.storage, kernel, "learn")
    if moments is not None and moments.info.recorded["mode"] == "streamed":
        raise NotReadyError(
            f"contributions/{kernel}/{set_name}: contribute.mode = streamed keeps no C; set contribute.mode = tensor, then "
            "run `gradstore contribute`."
        )


def _require_whole(artifact: ContributionArtifact | ScoreMatrixArtifact, store: FeatureStore) -> None:
    missing = artifact.missing_units()
    if missing:
        raise NotReadyError(
            f"{artifact.folder}: {len(missing)} of {artifact.info.num_units} blocks are missing. Run `gradstore contribute` "
            "again: it computes those."
        )
    require_current(artifact, store)


def _valid_masks(store: FeatureStore) -> dict[int, np.ndarray]:
    """Of the blocks with rows that are not valid in some member, which rows are."""
    valid: dict[int, np.ndarray] = {}
    for member in store.open_set("train").info.members:
        train = store.open_set("train", member)
        for block in train.invalid_blocks():
            mask = train.valid_in(block)
            assert mask is not None, "an invalid block has rows that are not valid"
            valid[block] = mask & valid.get(block, True)
    return valid


def _valid_rows(shape: RowBlocks, valid: Mapping[int, np.ndarray]) -> np.ndarray:
    valid_N = np.zeros(shape.rows, bool)
    for block in range(shape.num_blocks):
        valid_N[slice(*shape.block_range(block))] = valid.get(block, True)
    return np.flatnonzero(valid_N)
