"""Contributions C[q, n, j]: what every group adds to the attribution of every query to every example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from gradstore.errors import DataError
from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo
from gradstore.store.backend import Storage
from gradstore.store.blocks import in_parallel
from gradstore.store.codecs import Payload, encode_chunk
from gradstore.store.commits import Record
from gradstore.store.dtypes import DTYPES, Rounding
from gradstore.store.layout import ArrayLayout, RowBlocks, chunk_path

# In a folder of their own, which then holds nothing but arrays: xarray opens it without a warning.
_ARRAY = "values/c"
_SCALE = "values/scale"


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
    dtype: Literal["float32", "float16"] = "float32"

    @property
    def num_tiles(self) -> int:
        """Number of query tiles."""
        return -(-self.queries // self.query_tile)

    def layout(self) -> ArrayLayout:
        """Layout of the array ``c``: chunks of a query tile, a block, and all groups."""
        attributes: dict[str, Any] = {"groups": list(self.groups)}
        if self.dtype == "float16":
            attributes["scaled_by"] = "scale"
        return ArrayLayout(
            shape=(self.queries, self.rows, len(self.groups)),
            chunk_shape=(self.query_tile, self.block_rows, len(self.groups)),
            dtype=self.dtype,
            dimension_names=("query", "example", "group"),
            attributes=attributes,
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
        if scales is None:
            assert shape.dtype == "float32", "float16 contributions need a scale for every query"
            scales = np.ones(shape.queries, np.float32)
        assert scales.shape == (shape.queries,)
        assert (np.frexp(scales)[0] == 0.5).all(), "scales must be powers of two"
        values = asdict(shape)
        info = ArtifactInfo(
            kind=cls.kind,
            num_units=shape.num_blocks,
            settings={**settings, "shape": {name: values[name] for name in ("queries", "rows", "gaps", "groups")}},
            recorded={
                "shape": {name: values[name] for name in ("block_rows", "query_tile", "dtype")},
                "scales": scales.tolist(),
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
    def scales(self) -> npt.NDArray[np.float32]:
        """What the stored values of every query are multiplied by, [queries]; ones for float32."""
        return np.array(self.info.recorded["scales"], np.float32)

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        scaled = self.shape.dtype == "float16"
        return {_ARRAY: self.shape.layout(), **({_SCALE: _scale_layout(self.shape.queries)} if scaled else {})}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        layout = self.shape.layout()
        return {chunk_path(_ARRAY, tile, unit, 0): layout for tile in range(self.shape.num_tiles)}

    def scale_chunks(self) -> dict[str, Payload]:
        """Chunks of ``values/scale``, by path: known from artifact.json, so that no record names them."""
        if self.shape.dtype != "float16":
            return {}
        return {chunk_path(_SCALE, 0): encode_chunk(self.scales, _scale_layout(self.shape.queries))}

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
        encoded = in_parallel(
            lambda tile: self._encode_tile(contributions, tile),
            range(self.shape.num_tiles),
            threads=self.storage.concurrency,
        )
        payloads = {chunk_path(_ARRAY, tile, block, 0): payload for tile, (payload, _) in enumerate(encoded)}
        lost = sum((rounding for _, rounding in encoded), Rounding())
        return self._write_unit(block, payloads, {**facts, "saturated": lost.saturated, "flushed": lost.flushed})

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

    def _encode_tile(self, contributions: npt.NDArray[np.float32], tile: int) -> tuple[Payload, Rounding]:
        first = tile * self.shape.query_tile
        values = contributions[first : first + self.shape.query_tile]
        dtype, rounding = DTYPES[self.shape.dtype], Rounding()
        stored = np.empty(values.shape, dtype.numpy_dtype)
        for index, scale in enumerate(self.scales[first : first + len(values)]):
            rounding += dtype.encode(values[index], float(scale), stored[index])
        return encode_chunk(stored, self.shape.layout()), rounding

    def _read_tile(self, record: Record, tile: int, query_start: int, out: npt.NDArray[np.float32]) -> None:
        layout = self.shape.layout()
        path = chunk_path(_ARRAY, tile, record.unit, 0)
        first = tile * self.shape.query_tile
        begin = max(first, query_start)
        end = min(first + self.shape.query_tile, query_start + len(out), self.shape.queries)
        with self._buffers.borrow(layout.buffer_bytes) as buffer:
            stored = self._read_into(record, path, layout, buffer)
            for query in range(begin, end):
                source, target = stored[query - first, : out.shape[1]], out[query - query_start]
                DTYPES[self.shape.dtype].decode(source, float(self.scales[query]), target)


def _scale_layout(queries: int) -> ArrayLayout:
    return ArrayLayout(shape=(queries,), chunk_shape=(queries,), dtype="float32", dimension_names=("query",))
