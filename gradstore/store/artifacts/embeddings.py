"""Embeddings of examples: what similarity to a query is measured by where no gradient takes part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo
from gradstore.store.backend import Storage
from gradstore.store.codecs import decode_table, encode_table
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout


class EmbeddingsArtifact(Artifact):
    """Embeddings [rows, width] of a feature set at ``embeddings/<encoder>/<set>``; one unit is a block of rows."""

    kind: ClassVar[str] = "embeddings"

    @classmethod
    def create(
        cls, storage: Storage, encoder: str, feature_set: str, *, settings: Mapping[str, Any], blocks: int
    ) -> EmbeddingsArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Raises
        ------
        ContractError
            If it is there with other settings.
        """
        return cls._create(
            storage, (encoder, feature_set), ArtifactInfo(kind=cls.kind, num_units=blocks, settings=settings)
        )

    @classmethod
    def open(cls, storage: Storage, encoder: str, feature_set: str) -> EmbeddingsArtifact:
        """Open the artifact; NotReadyError if there is none of these names."""
        return cls._open(storage, (encoder, feature_set))

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`; it has none."""
        return {}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        return {_path(unit): None}

    def write_block(
        self,
        block: int,
        rows: npt.NDArray[np.int64],
        embeddings: npt.NDArray[np.float32],
        *,
        facts: Mapping[str, Any],
    ) -> Record:
        """Write and commit a block: the numbers of its rows [n], and their embeddings [n, width]."""
        table = pa.table(
            {"row": pa.array(rows, pa.int64()), "embedding": pa.array([*embeddings], pa.list_(pa.float32()))}
        )
        return self._write_unit(block, {_path(block): encode_table(table)}, facts)

    def read(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the numbers of all rows [n], ascending, and their embeddings [n, width]; NotReadyError if a block is missing."""
        tables = [decode_table(self._read_object(_path(unit), unit)) for unit in range(self.info.num_units)]
        table = pa.concat_tables(tables)
        values = table["embedding"].combine_chunks().flatten().to_numpy()
        return np.array(table["row"], np.int64), values.reshape(len(table), -1)


def _path(block: int) -> str:
    return f"values/{block:08d}.parquet"
