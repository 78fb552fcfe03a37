"""Self-influence tau_j(n, n): what every train example contributes to itself, group by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo
from gradstore.store.backend import Storage
from gradstore.store.blocks import in_parallel
from gradstore.store.codecs import encode_chunk
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout, RowBlocks, chunk_path

# In a folder of its own, which then holds nothing but arrays: xarray opens it without a warning.
_ARRAY = "values/tau"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfInfluenceShape(RowBlocks):
    """Shape and division of the self-influence of a train set.

    Attributes
    ----------
    rows, block_rows, gaps
        As in the train set.
    groups
        Names of the M groups.
    chunk_rows, chunk_groups
        Rows of a chunk, a multiple of ``block_rows``, and its consecutive groups: a chunk is a unit of work.
    """

    groups: tuple[str, ...]
    chunk_rows: int
    chunk_groups: int

    @property
    def num_columns(self) -> int:
        """Chunks side by side."""
        return -(-len(self.groups) // self.chunk_groups)

    @property
    def num_rows(self) -> int:
        """Chunks one below the other."""
        return -(-self.rows // self.chunk_rows)

    @property
    def num_units(self) -> int:
        """Number of chunks."""
        return self.num_columns * self.num_rows

    def place(self, unit: int) -> tuple[int, int]:
        """(row, column) of a unit among the chunks: units are counted row by row."""
        return divmod(unit, self.num_columns)

    def blocks_of(self, unit: int) -> range:
        """Blocks whose rows a unit holds."""
        per_chunk = self.chunk_rows // self.block_rows
        first = self.place(unit)[0] * per_chunk
        return range(first, min(first + per_chunk, self.num_blocks))

    def groups_of(self, unit: int) -> tuple[str, ...]:
        """Groups that a unit holds."""
        first = self.place(unit)[1] * self.chunk_groups
        return self.groups[first : first + self.chunk_groups]

    def layout(self) -> ArrayLayout:
        """Layout of the array ``tau``."""
        return ArrayLayout(
            shape=(self.rows, len(self.groups)),
            chunk_shape=(self.chunk_rows, self.chunk_groups),
            dtype="float32",
            dimension_names=("example", "group"),
            attributes={"groups": list(self.groups)},
        )


class SelfInfluenceArtifact(Artifact):
    """tau [examples, groups] at ``self-influence/<kernel>/<member>``; one unit is one chunk of rows and groups.

    It is the array ``values/tau``, float32. Rows that are not valid, erased or in a gap are NaN.
    """

    kind: ClassVar[str] = "self_influence"

    @classmethod
    def create(
        cls, storage: Storage, kernel: str, member: str, *, settings: Mapping[str, Any], shape: SelfInfluenceShape
    ) -> SelfInfluenceArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, kernel, member
            Where, under the name of which kernel, and of whose features.
        settings
            What is compared: the kernel with its damping, and the train set's snapshot.
        shape
            Shape and division; of an artifact that is there, its own division counts.

        Raises
        ------
        ContractError
            If the artifact is there with other settings.
        """
        assert shape.chunk_rows % shape.block_rows == 0, "a chunk holds whole blocks"
        of_set = {"rows": shape.rows, "block_rows": shape.block_rows, "gaps": shape.gaps, "groups": shape.groups}
        info = ArtifactInfo(
            kind=cls.kind,
            num_units=shape.num_units,
            settings={**settings, "shape": of_set},
            recorded={"chunk_rows": shape.chunk_rows, "chunk_groups": shape.chunk_groups},
        )
        made = cls._create(storage, (kernel, member), info)
        made._publish_arrays()
        return made

    @classmethod
    def open(cls, storage: Storage, kernel: str, member: str) -> SelfInfluenceArtifact:
        """Open the artifact; NotReadyError if there is none of that name."""
        return cls._open(storage, (kernel, member))

    @cached_property
    def shape(self) -> SelfInfluenceShape:
        """Shape, and the division that the first creation chose."""
        of_set = self.settings["shape"]
        return SelfInfluenceShape(
            rows=of_set["rows"],
            block_rows=of_set["block_rows"],
            gaps=tuple((start, stop) for start, stop in of_set["gaps"]),
            groups=tuple(of_set["groups"]),
            chunk_rows=self.info.recorded["chunk_rows"],
            chunk_groups=self.info.recorded["chunk_groups"],
        )

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        return {_ARRAY: self.shape.layout()}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        return {chunk_path(_ARRAY, *self.shape.place(unit)): self.shape.layout()}

    def write(self, unit: int, values: npt.NDArray[np.float64], *, facts: Mapping[str, Any]) -> Record:
        """Write and commit a unit: [rows of the chunk, its groups], NaN where there is no valid row."""
        existing = self._committed(unit)
        if existing is not None:
            return existing
        place, layout = self.shape.place(unit), self.shape.layout()
        assert values.shape == layout.chunk_extent(place), "a unit is a whole chunk"
        payload = encode_chunk(values.astype(np.float32), layout)
        return self._write_unit(unit, {chunk_path(_ARRAY, *place): payload}, facts)

    def read(self) -> npt.NDArray[np.float32]:
        """Self-influence of all rows in all groups, float32 [rows, groups].

        Raises
        ------
        NotReadyError
            If a unit is not committed.
        """
        return np.concatenate([self._read_row(row) for row in range(self.shape.num_rows)])

    def read_totals(self, row: int, weights: npt.NDArray[np.float64] | None = None) -> npt.NDArray[np.float64]:
        """Self-influence of the examples in one row of chunks, summed over all groups: float64 [rows].

        With weights [groups] it is their weighted sum.

        Raises
        ------
        NotReadyError
            If a unit is not committed.
        """
        tau = self._read_row(row)
        return np.asarray(tau.sum(1, dtype=np.float64) if weights is None else tau.astype(np.float64) @ weights)

    def _read_row(self, row: int) -> npt.NDArray[np.float32]:
        first = row * self.shape.num_columns
        units = range(first, first + self.shape.num_columns)
        columns = in_parallel(self._read_unit, units, threads=self.storage.concurrency)
        return np.concatenate(columns, 1)

    def _read_unit(self, unit: int) -> npt.NDArray[np.float32]:
        layout, place = self.shape.layout(), self.shape.place(unit)
        rows, groups = layout.chunk_extent(place)
        buffer = np.empty(layout.buffer_bytes, np.uint8)
        return self._read_into(self._record(unit), chunk_path(_ARRAY, *place), layout, buffer)[:rows, :groups]
