"""Contributions C[q, n, j]: what every group adds to the attribution of every query to every example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gradstore.errors import DataError
from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo
from gradstore.store.artifacts.rounding import ContributionDtype, QueryRounding, contribution_attributes
from gradstore.store.backend import Storage
from gradstore.store.blocks import ObjectEntry, in_parallel
from gradstore.store.codecs import Payload, encode_chunk
from gradstore.store.commits import Attempt, Record
from gradstore.store.dtypes import Rounding
from gradstore.store.layout import ArrayLayout, RowBlocks, chunk_path

# In a folder of their own, which then holds nothing but arrays: xarray opens it without a warning.
_ARRAY = "values/c"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionShape(RowBlocks):
    """Shape and division of C.

    Attributes
    ----------
    queries, rows, groups
        Its three axes: Q, N, and the names of the M groups.
    block_rows, gaps
        Rows of a block, and those that belong to no example: as in the training set.
    query_tile
        Queries of a chunk.
    dtype
        Stored type; float16 has a power-of-two scale for every query.
    """

    queries: int
    groups: tuple[str, ...]
    query_tile: int
    dtype: ContributionDtype = "float32"

    @property
    def num_tiles(self) -> int:
        """Number of query tiles."""
        return -(-self.queries // self.query_tile)

    def layout(self) -> ArrayLayout:
        """Layout of the array ``c``: chunks of a query tile, a block, and all groups."""
        return ArrayLayout(
            shape=(self.queries, self.rows, len(self.groups)),
            chunk_shape=(self.query_tile, self.block_rows, len(self.groups)),
            dtype=self.dtype,
            dimension_names=("query", "example", "group"),
            attributes=contribution_attributes(self.groups, self.dtype),
        )


class ContributionArtifact(Artifact):
    """C [queries, examples, groups], at ``contributions/<kernel>/<set>``; one unit is a block of rows.

    It is the array ``values/c``. Stored in float16 it is to be multiplied by ``values/scale`` [queries].
    """

    kind: ClassVar[str] = "contributions"

    @classmethod
    def create(
        cls,
        storage: Storage,
        kernel: str,
        feature_set: str,
        *,
        settings: Mapping[str, Any],
        shape: ContributionShape,
        scales: npt.NDArray[np.float32] | None = None,
    ) -> ContributionArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, kernel, feature_set
            Where, and the names of the kernel and of the queries' feature set.
        settings
            What is compared: what C is made from, with the snapshots of both sets.
        shape
            Its axes, which are compared, and its division and dtype, for which those of an artifact that is there count.
        scales
            For float16, a power of two for every query, chosen so that no contribution divided by it passes 65504.

        Raises
        ------
        ContractError
            If the artifact is there with other settings.
        """
        rounding = QueryRounding.of(shape.dtype, scales, shape.queries)
        values = asdict(shape)
        info = ArtifactInfo(
            kind=cls.kind,
            num_units=shape.num_blocks,
            settings={**settings, "shape": {name: values[name] for name in ("queries", "rows", "gaps", "groups")}},
            recorded={
                "shape": {name: values[name] for name in ("block_rows", "query_tile", "dtype")},
                "scales": rounding.scales.tolist(),
            },
        )
        made = cls._create(storage, (kernel, feature_set), info)
        # Of what is there, which the first of several creators divided and scaled.
        made._publish_arrays(made.scale_chunks())
        return made

    @classmethod
    def open(cls, storage: Storage, kernel: str, feature_set: str) -> ContributionArtifact:
        """Open the artifact; NotReadyError if there is none of that name."""
        return cls._open(storage, (kernel, feature_set))

    @cached_property
    def shape(self) -> ContributionShape:
        """Shape of C, and its division, which is that of the first creation."""
        values = {**self.settings["shape"], **self.info.recorded["shape"]}
        gaps = tuple((start, stop) for start, stop in values["gaps"])
        return ContributionShape(**{**values, "groups": tuple(values["groups"]), "gaps": gaps})

    @cached_property
    def rounding(self) -> QueryRounding:
        """How contributions are rounded: as the first creation chose."""
        scales = np.array(self.info.recorded["scales"], np.float32)
        return QueryRounding.of(self.shape.dtype, scales, self.shape.queries)

    @property
    def scales(self) -> npt.NDArray[np.float32]:
        """What the stored values of every query are multiplied by, [queries]; ones for float32."""
        return self.rounding.scales

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        return {_ARRAY: self.shape.layout(), **self.rounding.layouts()}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        layout = self.shape.layout()
        return {chunk_path(_ARRAY, tile, unit, 0): layout for tile in range(self.shape.num_tiles)}

    def scale_chunks(self) -> dict[str, Payload]:
        """Chunks of ``values/scale``, by path: known from artifact.json, so that no record names them."""
        return self.rounding.chunks()

    def write_block(self, block: int, contributions: npt.NDArray[np.float32], *, facts: Mapping[str, Any]) -> Record:
        """Write and commit a block: float32 [queries, rows of the block, groups].

        The record's facts count the values that float16 could not hold (``saturated``) or made zero (``flushed``).
        """
        existing = self._committed(block)
        if existing is not None:
            return existing
        start, stop = self.shape.block_range(block)
        wanted = (self.shape.queries, stop - start, len(self.shape.groups))
        if contributions.shape != wanted or contributions.dtype != np.float32:
            raise DataError(
                f"{self.storage.url}/{self.folder}: block {block}: found {contributions.dtype} "
                f"{list(contributions.shape)}; the artifact takes float32 {list(wanted)}."
            )
        writer = self.begin_block(block)
        if writer is None:
            return self._record(block)
        stored = contributions
        if self.shape.dtype != "float32":
            stored = np.empty(wanted, self.rounding.stored_dtype)
            writer.lost += self.rounding.encode(0, contributions, stored)
        writer.put(0, stored)
        return writer.commit(facts)

    def begin_block(self, block: int) -> BlockWriter | None:
        """Begin an attempt at a block, whose query tiles are then written one after another; None if it is committed."""
        attempt = self._begin(block)
        return None if attempt is None else BlockWriter(self, block, attempt)

    def missing_blocks(self) -> list[int]:
        """Blocks that are not committed, in order."""
        return self.missing_units()

    def read(
        self, query_start: int, query_stop: int, block: int, out: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Contributions of some queries in a block: float32 [queries, rows of the block, groups], in their true scale.

        Parameters
        ----------
        query_start, query_stop
            The queries; whole tiles are read, so ask for whole tiles.
        block
            The block.
        out
            Contiguous float32 array [at least queries, at least rows, groups] to read into; the result is a view of it.

        Raises
        ------
        NotReadyError
            If the block is not committed.
        """
        record = self._record(block)
        start, stop = self.shape.block_range(block)
        shape = (query_stop - query_start, stop - start, len(self.shape.groups))
        result = np.empty(shape, np.float32) if out is None else out[: shape[0], : shape[1]]
        tile = self.shape.query_tile
        in_parallel(
            lambda index: self._read_tile(record, index, query_start, result),
            range(query_start // tile, -(-query_stop // tile)),
            threads=self.storage.concurrency,
        )
        return result

    def read_blocks(
        self, query_start: int, query_stop: int, out: npt.NDArray[np.float32] | None = None
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Contributions of some queries, block by block; with ``out``, each block takes the place of the one before."""
        for block in range(self.shape.num_blocks):
            yield self.read(query_start, query_stop, block, out)

    def publish_tiles(
        self, attempt: Attempt, block: int, first: int, stored: npt.NDArray[Any]
    ) -> dict[str, ObjectEntry]:
        """Publish whole query tiles of a block, as they are stored; return their entries."""
        size, layout = self.shape.query_tile, self.shape.layout()
        assert first % size == 0, "queries are written in whole tiles"
        payloads = {
            chunk_path(_ARRAY, (first + start) // size, block, 0): encode_chunk(stored[start : start + size], layout)
            for start in range(0, len(stored), size)
        }
        return self._publish(attempt, payloads)

    def _read_tile(self, record: Record, tile: int, query_start: int, out: npt.NDArray[np.float32]) -> None:
        layout = self.shape.layout()
        path = chunk_path(_ARRAY, tile, record.unit, 0)
        first = tile * self.shape.query_tile
        begin = max(first, query_start)
        end = min(first + self.shape.query_tile, query_start + len(out), self.shape.queries)
        with self._buffers.borrow(layout.buffer_bytes) as buffer:
            stored = self._read_into(record, path, layout, buffer)
            into = out[begin - query_start : end - query_start]
            self.rounding.decode(begin, stored[begin - first : end - first, : out.shape[1]], into)


class BlockWriter:
    """Writes a block of C in portions of whole query tiles, as they are stored, and commits it when all are there.

    Attributes
    ----------
    lost
        What rounding has lost, for the record: whoever rounds adds to it.
    """

    def __init__(self, artifact: ContributionArtifact, block: int, attempt: Attempt) -> None:
        self._artifact = artifact
        self._block = block
        self._attempt = attempt
        self._entries: dict[str, ObjectEntry] = {}
        self.lost = Rounding()

    def put(self, first: int, stored: npt.NDArray[Any]) -> None:
        """Write the queries from ``first`` on: [queries, rows of the block, groups] of the stored type, in whole tiles."""
        self._entries |= self._artifact.publish_tiles(self._attempt, self._block, first, stored)

    def commit(self, facts: Mapping[str, Any]) -> Record:
        """Commit the block; see `Artifact` for what is raised where it was taken back."""
        assert len(self._entries) == self._artifact.shape.num_tiles, (
            "a block is committed when all of its tiles are there"
        )
        counts = {"saturated": self.lost.saturated, "flushed": self.lost.flushed}
        return self._attempt.commit(self._entries, {**facts, **counts})
