"""Partial sums of matrices that are too large to be summed in one task; removed when what they are for is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from gradstore.store.artifacts.artifact import FOLDERS, Artifact, ArtifactInfo, remove_artifact
from gradstore.store.backend import Storage
from gradstore.store.codecs import encode_chunk
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout, chunk_path, metadata_path

_ARRAY: Final = "sums/values"
_CHUNK_BYTES: Final = 64 * 2**20


class PartialsArtifact(Artifact):
    """Matrices float64 [parts, rows, columns], at ``partials/<of>/<member>/<phase>``; one unit is a part."""

    kind: ClassVar[str] = "partials"

    @classmethod
    def create(
        cls,
        storage: Storage,
        names: tuple[str, str, str],
        *,
        settings: Mapping[str, Any],
        parts: Sequence[Sequence[Any]],
        shape: tuple[int, int],
    ) -> PartialsArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, names
            Where; and what the sums are for, of which member, and in which phase.
        settings
            What is compared: all that the sums depend on.
        parts
            Blocks or groups that are summed in every part; of an artifact that is there, its own count.
        shape
            Rows and columns of a sum.

        Raises
        ------
        ContractError
            If an artifact of that name is there with other settings.
        """
        info = ArtifactInfo(
            kind=cls.kind,
            num_units=len(parts),
            settings={**settings, "shape": list(shape)},
            recorded={"parts": [list(part) for part in parts]},
        )
        made = cls._create(storage, names, info)
        made._publish_arrays()
        return made

    @classmethod
    def open(cls, storage: Storage, names: tuple[str, str, str]) -> PartialsArtifact:
        """Open the artifact; NotReadyError if there is none of that name."""
        return cls._open(storage, names)

    @property
    def parts(self) -> list[list[Any]]:
        """What is summed in every part."""
        return [list(part) for part in self.info.recorded["parts"]]

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        return {_ARRAY: self._layout()}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        layout = self._layout()
        return {chunk_path(_ARRAY, unit, tile, 0): layout for tile in range(layout.num_chunks[1])}

    def is_written(self, part: int) -> bool:
        """Whether a part is committed."""
        return self._committed(part) is not None

    def write(self, part: int, values: npt.NDArray[np.float64], *, facts: Mapping[str, Any]) -> Record:
        """Write and commit a part, float64 [rows, columns]."""
        existing = self._committed(part)
        if existing is not None:
            return existing
        layout = self._layout()
        assert values.shape == layout.shape[1:]
        tile = layout.chunk_shape[1]
        payloads = {
            chunk_path(_ARRAY, part, index, 0): encode_chunk(values[None, index * tile : (index + 1) * tile], layout)
            for index in range(layout.num_chunks[1])
        }
        return self._write_unit(part, payloads, facts)

    def read(self, part: int) -> npt.NDArray[np.float64]:
        """One part, float64 [rows, columns]; NotReadyError if it is not committed."""
        values = np.empty(self._layout().shape[1:])
        for rows, found in self._tiles(part):
            values[rows] = found
        return values

    def total(self) -> npt.NDArray[np.float64]:
        """Sum of all parts, in their order, float64 [rows, columns]; NotReadyError if one is not committed."""
        total = np.zeros(self._layout().shape[1:])
        for part in range(self.info.num_units):
            for rows, found in self._tiles(part):
                total[rows] += found
        return total

    def facts(self) -> list[Mapping[str, Any]]:
        """What was found of every part; NotReadyError if one is not committed."""
        return [self._record(part).facts for part in range(self.info.num_units)]

    def _tiles(self, part: int) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
        """Rows of a part, some at a time; each lot takes the place of the one before."""
        record, layout = self._record(part), self._layout()
        rows, tile = layout.shape[1], layout.chunk_shape[1]
        buffer = np.empty(layout.buffer_bytes, np.uint8)
        for index in range(layout.num_chunks[1]):
            start, stop = index * tile, min((index + 1) * tile, rows)
            values = self._read_into(record, chunk_path(_ARRAY, part, index, 0), layout, buffer)
            yield slice(start, stop), values[0, : stop - start]

    def _layout(self) -> ArrayLayout:
        rows, columns = self.settings["shape"]
        tile = max(1, min(rows, _CHUNK_BYTES // (8 * columns)))
        return ArrayLayout(
            shape=(self.info.num_units, rows, columns),
            chunk_shape=(1, tile, columns),
            dtype="float64",
            dimension_names=("part", "row", "column"),
        )


def remove_partials(storage: Storage, of: str, member: str) -> None:
    """Remove the partial sums of all phases of something, and the Zarr groups above that then hold nothing.

    They are as large as what they were summed for, which is there now.
    """
    folder = f"{FOLDERS[PartialsArtifact.kind][0]}/{of}/{member}"
    for phase in storage.list_folders(folder):
        remove_artifact(storage, f"{folder}/{phase}")
    while folder and [info.path for info in storage.list_objects(folder)] == [metadata_path(folder)]:
        storage.delete(metadata_path(folder))
        folder = folder.rpartition("/")[0]
