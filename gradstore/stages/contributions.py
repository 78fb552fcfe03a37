"""Reading C, or scores in its place: whole, and without the rows that are not valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gradstore.errors import NotReadyError
from gradstore.plan.sizes import LEARNER_BUFFERS, verified_queries
from gradstore.stages.progress import Progress
from gradstore.stages.spectra import require_current
from gradstore.store.alignment import aligned
from gradstore.store.artifacts import (
    ContributionArtifact,
    ContributionShape,
    MomentsArtifact,
    QueryRounding,
    ScoreMatrixArtifact,
)
from gradstore.store.features import FeatureStore
from gradstore.store.layout import RowBlocks
from gradstore.store.read_ahead import read_ahead

Piece = tuple[int, np.ndarray, np.ndarray]
"""First query, numbers of some valid rows [n], and C [q, n, M] of some queries from the first on."""


class Contributions(Protocol):
    """C of one set of queries, which can be read any number of times: from the store, or built from features each time."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What C is made from."""
        ...

    @property
    def shape(self) -> ContributionShape:
        """Shape of C, and how it is cut."""
        ...

    @property
    def rounding(self) -> QueryRounding:
        """How C is rounded."""
        ...

    @property
    def read_bytes(self) -> int:
        """Bytes that a read of all queries takes from the store."""
        ...

    def valid_rows(self) -> np.ndarray:
        """Numbers of the valid rows, ascending."""
        ...

    def slices(self, first: int, last: int) -> Sequence[tuple[int, int]]:
        """Queries, first to last, that `read` gives together, in turn."""
        ...

    def read(self, first: int, last: int) -> Iterator[Piece]:
        """Pieces that hold every valid row of some queries once, of each in the order of rows; each lasts until the next."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredContributions:
    """C as the store has it, whole; ``valid`` tells, of the blocks with rows that are not, which rows are valid.

    A row is valid if it is in every member.
    """

    artifact: ContributionArtifact
    valid: Mapping[int, np.ndarray]

    @classmethod
    def open(cls, store: FeatureStore, kernel: str, set_name: str) -> StoredContributions:
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
        return cls(artifact=artifact, valid=valid_masks(store))

    @property
    def settings(self) -> Mapping[str, Any]:
        """See `Contributions`."""
        return self.artifact.settings

    @property
    def shape(self) -> ContributionShape:
        """See `Contributions`."""
        return self.artifact.shape

    @property
    def rounding(self) -> QueryRounding:
        """See `Contributions`."""
        return self.artifact.rounding

    @property
    def read_bytes(self) -> int:
        """See `Contributions`."""
        shape = self.shape
        return shape.queries * shape.rows * len(shape.groups) * self.rounding.stored_dtype.itemsize

    def valid_rows(self) -> np.ndarray:
        """See `Contributions`."""
        return numbers_of(self.shape, self.valid)

    def slices(self, first: int, last: int) -> Sequence[tuple[int, int]]:
        """See `Contributions`; they are some whole tiles, if ``first`` begins one."""
        size = self._queries_at_once()
        return [(start, min(start + size, last)) for start in range(first, last, size)]

    def read(self, first: int, last: int) -> Iterator[Piece]:
        """See `Contributions`; block by block through two buffers."""
        size = min(self._queries_at_once(), last - first), self.shape.block_rows, len(self.shape.groups)
        buffers = [aligned(size) for _ in range(LEARNER_BUFFERS)]
        blocks = range(self.shape.num_blocks)
        for start, stop in self.slices(first, last):

            def begin(
                pool: ThreadPoolExecutor, block: int, buffer: np.ndarray, queries: tuple[int, int] = (start, stop)
            ) -> Callable[[], np.ndarray]:
                return pool.submit(self.artifact.read, *queries, block, buffer).result

            for block, c_QNM in zip(blocks, read_ahead(blocks, buffers, begin, threads=1), strict=True):
                yield start, *valid_of(self.shape, self.valid, block, c_QNM)

    def _queries_at_once(self) -> int:
        shape = self.shape
        return verified_queries((shape.queries, len(shape.groups)), shape.block_rows, shape.query_tile)


class Reads:
    """Reads C of all queries, more than once.

    Parameters
    ----------
    contributions
        C.
    progress, stage
        Told of every read, and what it is told that reads.
    """

    def __init__(self, contributions: Contributions, progress: Progress, stage: str) -> None:
        self.contributions = contributions
        self.count = 0
        self._progress = progress
        self._stage = stage

    def read(self) -> Iterator[Piece]:
        """Pieces (first query, rows [n], C [q, n, M]) that hold every valid row of every query once."""
        self.count += 1
        queries, rows = self.contributions.shape.queries, len(self.contributions.valid_rows())
        label, total = f"{self._stage}, read {self.count} of C", len(self.contributions.slices(0, queries)) * rows
        with self._progress.stage(label, total, "rows", total_bytes=self.contributions.read_bytes) as advance:
            for first, rows_N, c_QNM in self.contributions.read(0, queries):
                yield first, rows_N, c_QNM
                advance(len(rows_N))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreMatrix:
    """Scores of one set of queries under given weights, whole; ``valid`` as in `StoredContributions`."""

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
        return cls(artifact=artifact, valid=valid_masks(store))

    def valid_rows(self) -> np.ndarray:
        """Numbers of the valid rows, ascending."""
        return numbers_of(self.artifact.shape, self.valid)

    def read_blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows [n] and scores [queries, n], block by block."""
        for block in range(self.artifact.shape.num_blocks):
            rows_N, s_QN = np.arange(*self.artifact.shape.block_range(block)), self.artifact.read(block)
            valid_N = self.valid.get(block)
            yield (rows_N, s_QN) if valid_N is None else (rows_N[valid_N], s_QN[:, valid_N])


def valid_rows_of(store: FeatureStore, set_name: str) -> np.ndarray:
    """Numbers of the rows of a set that are valid in every member; other queries have scores of zero, and are judged by nothing."""
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


def valid_masks(store: FeatureStore) -> dict[int, np.ndarray]:
    """Of the blocks with rows that are not valid in some member, which rows are."""
    valid: dict[int, np.ndarray] = {}
    for member in store.open_set("train").info.members:
        train = store.open_set("train", member)
        for block in train.invalid_blocks():
            mask = train.valid_in(block)
            assert mask is not None, "an invalid block has rows that are not valid"
            valid[block] = mask & valid.get(block, True)
    return valid


def valid_of(
    shape: RowBlocks, valid: Mapping[int, np.ndarray], block: int, c_QNM: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of a block's valid rows, and C of these."""
    rows_N, valid_N = np.arange(*shape.block_range(block)), valid.get(block)
    return (rows_N, c_QNM) if valid_N is None else (rows_N[valid_N], c_QNM[:, valid_N])


def numbers_of(shape: RowBlocks, valid: Mapping[int, np.ndarray]) -> np.ndarray:
    """Numbers of the valid rows, ascending."""
    valid_N = np.zeros(shape.rows, bool)
    for block in range(shape.num_blocks):
        valid_N[slice(*shape.block_range(block))] = valid.get(block, True)
    return np.flatnonzero(valid_N)
