"""Sketches: a few numbers of every train row, by which a query finds the rows that are worth scoring exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo
from gradstore.store.backend import Storage
from gradstore.store.blocks import in_parallel, read_object
from gradstore.store.codecs import decode_document, encode_chunk, encode_document
from gradstore.store.commits import Record
from gradstore.store.dtypes import DTYPES
from gradstore.store.layout import ArrayLayout, RowBlocks, chunk_path, group_array

_LEVELS: Final = "values/levels"
_SCALES: Final = "values/scales"
_CHECKSUMS: Final = "values/checksums"
_RECALL: Final = "recall.json"
_BASIS_DTYPE, _ROW_DTYPE = DTYPES["bfloat16"], DTYPES["int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchShape(RowBlocks):
    """Shape of a sketch.

    Attributes
    ----------
    rows, block_rows, gaps
        As in the train set.
    rank
        Numbers of every row, R.
    members
        Names of the members, over which it is summed.
    widths
        Features of every group, as kernels see them.
    """

    rank: int
    members: tuple[str, ...]
    widths: Mapping[str, int]

    def basis(self, group: str) -> ArrayLayout:
        """Layout of a group's directions: one chunk."""
        shape = self.widths[group], self.rank
        return ArrayLayout(
            shape=shape,
            chunk_shape=shape,
            dtype=_BASIS_DTYPE.zarr_dtype,
            dimension_names=(f"feature:{group}", "direction"),
            attributes={"group": group, **_BASIS_DTYPE.attributes(1.0)},
            fill_value=_BASIS_DTYPE.fill_value,
        )

    def rows_of(self) -> dict[str, ArrayLayout]:
        """Layouts of what is kept of rows, by path: chunks of a block."""
        level = self._of_rows(_ROW_DTYPE.zarr_dtype, _ROW_DTYPE.fill_value, ("direction", self.rank))
        checksum = self._of_rows("uint32", 0, ("member", len(self.members)))
        return {
            _LEVELS: replace(level, attributes={"scaled_by": "scales"}),
            _SCALES: self._of_rows("float32", float("nan")),
            _CHECKSUMS: replace(checksum, attributes={"members": list(self.members)}),
        }

    def _of_rows(self, dtype: str, fill_value: float, *axes: tuple[str, int]) -> ArrayLayout:
        sizes = tuple(size for _, size in axes)
        return ArrayLayout(
            shape=(self.rows, *sizes),
            chunk_shape=(self.block_rows, *sizes),
            dtype=dtype,
            dimension_names=("example", *(name for name, _ in axes)),
            fill_value=fill_value,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SketchRows:
    """What is kept of rows.

    Attributes
    ----------
    levels
        int8 [rows, R]: z / scale, rounded.
    scales
        float32 [rows]; NaN of a row that is not valid.
    checksums
        uint32 [rows, members]: crc32c of the row's features as they read, float32, group after group.
    """

    levels: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    checksums: npt.NDArray[np.uint32]


class SketchArtifact(Artifact):
    """A sketch at ``sketches/<kernel>``. Unit 0 is the basis, unit 1 + b block b, and the last one what recall was measured.

    ``basis/<member>/<group>`` [features, R], bfloat16, has the directions; ``values/levels``, ``values/scales`` and
    ``values/checksums`` what `SketchRows` says; ``recall.json`` how many candidates find the best rows.
    """

    kind: ClassVar[str] = "sketch"

    @classmethod
    def create(
        cls,
        storage: Storage,
        kernel: str,
        *,
        settings: Mapping[str, Any],
        recorded: Mapping[str, Any],
        shape: SketchShape,
    ) -> SketchArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, kernel
            Where, under the name of which kernel.
        settings
            What is compared: the kernel, normalisation, weights of members, and the train set's snapshots.
        recorded
            What is not: the seed.
        shape
            Its shape, which is compared too.

        Raises
        ------
        ContractError
            If the artifact is there with other settings.
        """
        info = ArtifactInfo(
            kind=cls.kind,
            num_units=shape.num_blocks + 2,
            settings={**settings, "shape": asdict(shape)},
            recorded=recorded,
        )
        made = cls._create(storage, (kernel,), info)
        made._publish_arrays()
        return made

    @classmethod
    def open(cls, storage: Storage, kernel: str) -> SketchArtifact:
        """Open the artifact; NotReadyError if there is none of that name."""
        return cls._open(storage, (kernel,))

    @cached_property
    def shape(self) -> SketchShape:
        """Shape of the sketch."""
        values = self.settings["shape"]
        gaps = tuple((start, stop) for start, stop in values["gaps"])
        return SketchShape(**{**values, "gaps": gaps, "members": tuple(values["members"])})

    @property
    def recall_unit(self) -> int:
        """Number of the last unit."""
        return self.info.num_units - 1

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        return {**self._basis_arrays(), **self.shape.rows_of()}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        if unit == 0:
            return {chunk_path(path, 0, 0): layout for path, layout in self._basis_arrays().items()}
        if unit == self.recall_unit:
            return {_RECALL: None}
        return {_chunk(path, layout, unit - 1): layout for path, layout in self.shape.rows_of().items()}

    def missing_blocks(self) -> list[int]:
        """Blocks of rows that are not committed, in order."""
        return [unit - 1 for unit in self.missing_units() if 0 < unit < self.recall_unit]

    def write_basis(
        self, directions: Mapping[str, Mapping[str, npt.NDArray[np.float32]]], *, facts: Mapping[str, Any]
    ) -> Record:
        """Write and commit the directions [features, R] by member and group."""
        payloads = {}
        for member, of_member in directions.items():
            for group, values in of_member.items():
                layout = self.shape.basis(group)
                assert values.shape == layout.shape
                stored = np.empty(values.shape, layout.stored_dtype)
                _BASIS_DTYPE.encode(np.ascontiguousarray(values), 1.0, stored)
                payloads[chunk_path(group_array(f"basis/{member}", group), 0, 0)] = encode_chunk(stored, layout)
        return self._committed(0) or self._write_unit(0, payloads, facts)

    def read_basis(self) -> dict[str, dict[str, npt.NDArray[np.uint16]]]:
        """Directions as they are stored, by member and group; `widened` turns them to float32.

        Raises
        ------
        NotReadyError
            If they are not committed.
        """
        self._record(0)
        shape = self.shape
        places = [(member, group) for member in shape.members for group in shape.widths]

        def read(place: tuple[str, str]) -> npt.NDArray[np.uint16]:
            values: npt.NDArray[np.uint16] = self._read_chunk(
                0, group_array(f"basis/{place[0]}", place[1]), shape.basis(place[1])
            )
            return values

        found: dict[str, dict[str, npt.NDArray[np.uint16]]] = {member: {} for member in shape.members}
        for (member, group), values in zip(
            places, in_parallel(read, places, threads=self.storage.concurrency), strict=True
        ):
            found[member][group] = values
        return found

    def write_block(
        self,
        block: int,
        values: npt.NDArray[np.float32],
        checksums: npt.NDArray[np.uint32],
        *,
        facts: Mapping[str, Any],
    ) -> Record:
        """Round, write and commit a block: z [rows of the block, R], NaN of rows that are not valid, and `SketchRows.checksums`."""
        scales = _ROW_DTYPE.scale_of(values, 1.0)
        levels = np.empty(values.shape, np.int8)
        _ROW_DTYPE.encode(values, scales, levels)
        stored = {_LEVELS: levels, _SCALES: scales, _CHECKSUMS: checksums}
        payloads = {
            _chunk(path, layout, block): encode_chunk(np.asarray(stored[path]), layout)
            for path, layout in self.shape.rows_of().items()
        }
        return self._committed(block + 1) or self._write_unit(block + 1, payloads, facts)

    def read_rows(self) -> SketchRows:
        """What is kept of all rows; rows of gaps are as such that are not valid.

        Raises
        ------
        NotReadyError
            If a block is not committed.
        """
        shape = self.shape
        rows = SketchRows(
            levels=np.zeros((shape.rows, shape.rank), np.int8),
            scales=np.full(shape.rows, np.nan, np.float32),
            checksums=np.zeros((shape.rows, len(shape.members)), np.uint32),
        )
        targets: dict[str, npt.NDArray[Any]] = {_LEVELS: rows.levels, _SCALES: rows.scales, _CHECKSUMS: rows.checksums}
        layouts = shape.rows_of()

        def read(block: int) -> None:
            record, (start, stop) = self._record(block + 1), shape.block_range(block)
            for path, layout in layouts.items():
                with self._buffers.borrow(layout.buffer_bytes) as buffer:
                    chunk = self._read_into(record, _chunk(path, layout, block), layout, buffer)
                    targets[path][start:stop] = chunk[: stop - start]

        in_parallel(read, range(shape.num_blocks), threads=self.storage.concurrency)
        return rows

    def write_recall(self, recall: Mapping[str, Any], *, facts: Mapping[str, Any]) -> Record:
        """Write and commit what recall was measured."""
        last = self.recall_unit
        return self._committed(last) or self._write_unit(last, {_RECALL: encode_document(recall)}, facts)

    def forget_recall(self, reason: str) -> None:
        """Take back what recall was measured."""
        self.log.take_back(self.recall_unit, reason)

    def read_recall(self) -> dict[str, Any]:
        """Return what recall was measured; NotReadyError if it was not."""
        record, place, remedy = self._record(self.recall_unit), f"{self.folder}/{_RECALL}", self.log.remedy()
        data = self.log.read(
            record, place, lambda: read_object(self.storage, place, record.objects[_RECALL], remedy=remedy)
        )
        return decode_document(data, f"{self.storage.url}/{place}", remedy)

    def _basis_arrays(self) -> dict[str, ArrayLayout]:
        shape = self.shape
        return {
            group_array(f"basis/{member}", group): shape.basis(group)
            for member in shape.members
            for group in shape.widths
        }


def widened(stored: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Directions as float32."""
    out = np.empty(stored.shape, np.float32)
    _BASIS_DTYPE.decode(stored, 1.0, out)
    return out


def _chunk(path: str, layout: ArrayLayout, block: int) -> str:
    return chunk_path(path, block, *(0 for _ in layout.shape[1:]))
