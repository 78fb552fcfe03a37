"""What becomes of C as blocks of it are built: it is stored, or summed and sifted for the learner, or both; or it is scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gradstore.errors import SupersededError
from gradstore.spec import RunSpec, role_of
from gradstore.stages.contribute.queries import Target
from gradstore.stages.contribute.rows import score_transform
from gradstore.stages.contribute.settings import refuse_superseded
from gradstore.stages.weights import ranking_name
from gradstore.store.artifacts import (
    BlockWriter,
    ContributionArtifact,
    MomentsArtifact,
    QueryRounding,
    ScoreMatrixArtifact,
    SpanMoments,
)
from gradstore.store.dtypes import Rounding
from gradstore.store.features import FeatureSet, FeatureStore

if TYPE_CHECKING:
    from gradstore.numerics.scores import Transform


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some queries and rows of a block that were built.

    Attributes
    ----------
    block, first, row
        The block; the first of the queries; and the first of the rows, counted from the block's.
    ends_rows, ends_block
        Whether the rows are the last of the block for these queries, and these queries the last as well.
    """

    block: int
    first: int
    row: int
    ends_rows: bool
    ends_block: bool


class Output(Protocol):
    """Where what is built of a target goes."""

    def lacks(self, block: int) -> bool:
        """Whether a block must be built from features."""
        ...

    def take(self, part: Part, c_QNM: np.ndarray) -> None:
        """Take C of some queries and rows; it may be overwritten."""
        ...

    def take_stored(self, block: int, first: int, last: int) -> None:
        """Take some queries of a block that does not have to be built."""
        ...

    def finish(self) -> None:
        """Commit what is of the span as a whole."""
        ...


class Tensor:
    """C itself where it is kept, and what the learner needs of it where that is asked for.

    Parameters
    ----------
    rounding
        How C is rounded.
    artifact
        Where C is kept; None if it is not.
    moments
        What is summed and sifted of C as it is rounded; None if nothing is, or it is committed.
    train
        The train set.
    """

    def __init__(
        self, rounding: QueryRounding, artifact: ContributionArtifact | None, moments: Moments | None, train: FeatureSet
    ) -> None:
        self._rounding = rounding
        self._artifact = artifact
        self._moments = moments
        self._train = train
        self._missing = set() if artifact is None else set(artifact.missing_blocks())
        self._writers: dict[int, BlockWriter | None] = {}
        self._buffer = np.empty(0, rounding.stored_dtype)

    def lacks(self, block: int) -> bool:
        """See `Output`."""
        return block in self._missing if self._artifact is not None else self._moments is not None

    def take(self, part: Part, c_QNM: np.ndarray) -> None:
        """See `Output`."""
        if not self.lacks(part.block):
            if part.ends_rows:
                self.take_stored(part.block, part.first, part.first + len(c_QNM))
            return
        if self._artifact is not None:
            self._write(self._artifact, part, c_QNM)
        elif self._rounding.dtype != "float32":
            self._round(part, c_QNM, c_QNM.shape[1])
        if self._moments is not None:
            self._moments.add(part, c_QNM)

    def take_stored(self, block: int, first: int, last: int) -> None:
        """See `Output`."""
        if self._moments is not None:
            assert self._artifact is not None, "without C every block is built"
            c_QNM = self._artifact.read(first, last, block)
            self._moments.add(Part(block=block, first=first, row=0, ends_rows=True, ends_block=False), c_QNM)

    def finish(self) -> None:
        """See `Output`."""
        if self._moments is not None:
            self._moments.commit()

    def _write(self, artifact: ContributionArtifact, part: Part, c_QNM: np.ndarray) -> None:
        """Round a part, and publish the block's tiles of these queries when all of their rows are there."""
        if part.block not in self._writers:
            self._writers[part.block] = artifact.begin_block(part.block)
        writer = self._writers[part.block]
        start, stop = self._train.info.block_range(part.block)
        whole = c_QNM.shape[1] == stop - start
        stored_QNM = c_QNM if whole and self._rounding.dtype == "float32" else self._round(part, c_QNM, stop - start)
        # None where another attempt was faster: then what it committed has the same bits.
        if writer is None or not part.ends_rows:
            return
        writer.put(part.first, stored_QNM)
        if part.ends_block:
            writer.commit({"rows": stop - start})
            del self._writers[part.block]

    def _round(self, part: Part, c_QNM: np.ndarray, rows: int) -> np.ndarray:
        """Round a part, in place too; return what is there of the rows of the block, as they are stored."""
        queries, size, groups = c_QNM.shape
        if self._buffer.size < queries * rows * groups:
            self._buffer = np.empty(queries * rows * groups, self._rounding.stored_dtype)
        stored_QNM = self._buffer[: queries * rows * groups].reshape(queries, rows, groups)
        row = part.row if rows > size else 0
        place_QNM = stored_QNM[:, row : row + size]
        lost = self._rounding.encode(part.first, c_QNM, place_QNM)
        if self._artifact is None and self._moments is not None:
            self._moments.lost += lost
        elif (writer := self._writers.get(part.block)) is not None:
            writer.lost += lost
        if self._moments is not None:
            self._rounding.decode(part.first, place_QNM, c_QNM)
        return stored_QNM


class Moments:
    """A_q and candidate rows of a span.

    Parameters
    ----------
    artifact, span
        Where they are kept.
    trains
        The train set as every member has it: a row counts if it is valid in all of them.
    weights_M
        The learner's first weights.
    transform
        What becomes of scores in the end.

    Attributes
    ----------
    lost
        What rounding has lost where C is not kept, for the record: whoever rounds adds to it.
    """

    def __init__(
        self,
        artifact: MomentsArtifact,
        span: int,
        trains: Sequence[FeatureSet],
        weights_M: np.ndarray,
        transform: Transform,
    ) -> None:
        from gradstore.numerics.moments import Candidates, SecondMoments

        shape = artifact.shape
        self._artifact = artifact
        self._span = span
        self._trains = trains
        self.lost = Rounding()
        self._second = SecondMoments(num_queries=shape.queries, num_groups=len(shape.groups))
        self._candidates = Candidates(
            num_queries=shape.queries, kept=shape.candidates, weights_M=weights_M, transform=transform
        )

    def add(self, part: Part, c_QNM: np.ndarray) -> None:
        """Add some queries and rows of a block, as C is rounded."""
        start, _ = self._trains[0].info.block_range(part.block)
        rows_N = np.arange(start + part.row, start + part.row + c_QNM.shape[1])
        for train in self._trains:
            valid_N = train.valid_in(part.block)
            if valid_N is not None:
                kept_N = valid_N[rows_N - start]
                c_QNM, rows_N = c_QNM[:, kept_N], rows_N[kept_N]
        self._second.add(part.first, c_QNM)
        self._candidates.offer(part.first, c_QNM, rows_N)

    def commit(self) -> None:
        """Write and commit them."""
        moments = SpanMoments(self._second.total_QMM, self._candidates.c_QKM, self._candidates.rows_QK)
        facts = {"saturated": self.lost.saturated, "flushed": self.lost.flushed}
        self._artifact.write_span(self._span, moments, facts=facts)


class Scores:
    """Scores alone.

    Parameters
    ----------
    artifact
        Where they are kept.
    """

    def __init__(self, artifact: ScoreMatrixArtifact) -> None:
        self._artifact = artifact
        self._missing = set(artifact.missing_units())
        self._built: dict[int, np.ndarray] = {}

    def lacks(self, block: int) -> bool:
        """See `Output`."""
        return block in self._missing

    def take(self, part: Part, c_QNM: np.ndarray) -> None:
        """See `Output`."""
        if part.block not in self._missing:
            return
        start, stop = self._artifact.shape.block_range(part.block)
        if part.block not in self._built:
            self._built[part.block] = np.empty((self._artifact.shape.queries, stop - start), np.float32)
        queries, rows, _ = c_QNM.shape
        self._built[part.block][part.first : part.first + queries, part.row : part.row + rows] = c_QNM[:, :, 0]
        if part.ends_block and part.ends_rows:
            self._artifact.write_block(part.block, self._built.pop(part.block), facts={"rows": stop - start})

    def take_stored(self, block: int, first: int, last: int) -> None:
        """See `Output`."""

    def finish(self) -> None:
        """See `Output`."""


def open_output(store: FeatureStore, spec: RunSpec, target: Target, of: tuple[int | None, Sequence[int]]) -> Output:
    """Open where a target goes; with the number of a span, also what is summed of it for the learner, if it is not there.

    Parameters
    ----------
    store, spec, target
        The store, and which target of which run.
    of
        Number of the span, or None, and its blocks.

    Raises
    ------
    SupersededError
        If what is there now was made anew with other settings, or is of other spans.
    """
    train = store.open_set("train")
    if spec.contribute.mode == "scores":
        scores = ScoreMatrixArtifact.open(store.storage, score_name(target), target.set_name)
        refuse_superseded(spec, store, target, scores)
        return Scores(scores)
    span, blocks = of
    moments = None if span is None else _open_moments(store, spec, target, (span, blocks))
    if spec.contribute.mode == "streamed":
        rounding = MomentsArtifact.open(store.storage, (target.kernel, target.set_name)).rounding
        return Tensor(rounding, None, moments, train)
    artifact = ContributionArtifact.open(store.storage, target.kernel, target.set_name)
    refuse_superseded(spec, store, target, artifact)
    return Tensor(artifact.rounding, artifact, moments, train)


def score_name(target: Target) -> str:
    """Name of a target's scores below ``score-matrices``."""
    return ranking_name(target.kernel, target.weights)


def wants_moments(spec: RunSpec, target: Target) -> bool:
    """Whether A_q and candidates are made of a target: the learner needs them of its own queries."""
    asked = spec.contribute.mode != "scores" and spec.contribute.second_moments
    return asked and role_of(target.set_name) == "learn"


def is_kept(spec: RunSpec, target: Target) -> bool:
    """Whether C of a target is kept, or what is summed of it: in the type and with the scales of C."""
    return spec.contribute.mode == "tensor" or wants_moments(spec, target)


def _open_moments(store: FeatureStore, spec: RunSpec, target: Target, of: tuple[int, Sequence[int]]) -> Moments | None:
    from gradstore.numerics.learner import initial_weights

    if not wants_moments(spec, target):
        return None
    artifact, (span, blocks) = MomentsArtifact.open(store.storage, (target.kernel, target.set_name)), of
    refuse_superseded(spec, store, target, artifact)
    if span >= artifact.shape.num_spans or [*artifact.shape.blocks_of(span)] != [*blocks]:
        raise SupersededError(
            f"{store.storage.url}/{artifact.folder}: was made anew with other spans than this task's. Run "
            "`gradstore contribute` again."
        )
    if span not in artifact.missing_units():
        return None
    weights_M = initial_weights(len(artifact.shape.groups), seed=artifact.info.recorded["seed"])
    train = store.open_set("train")
    trains = [train.of_member(member) for member in spec.model.etas]
    return Moments(artifact, span, trains, weights_M, score_transform(store.contract["model"]["output"]))
