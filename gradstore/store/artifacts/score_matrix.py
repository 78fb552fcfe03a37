"""Scores S[q, n] = sum_j w_j C[q, n, j] under given weights, of which C is not kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo
from gradstore.store.backend import Storage
from gradstore.store.codecs import encode_chunk
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout, RowBlocks, chunk_path

# In a folder of its own, which then holds nothing but arrays: xarray opens it without a warning.
_ARRAY = "values/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreShape(RowBlocks):
    """Shape of S: ``queries``, and the rows, blocks and gaps of the train set."""

    queries: int

    def layout(self) -> ArrayLayout:
        """Layout of the array ``s``: chunks of all queries and a block."""
        return ArrayLayout(
            shape=(self.queries, self.rows),
            chunk_shape=(self.queries, self.block_rows),
            dtype="float32",
            dimension_names=("query", "example"),
        )


class ScoreMatrixArtifact(Artifact):
    """S [queries, examples] at ``score-matrices/<kernel>.<weights>/<set>``; one unit is a block of rows.

    It is the array ``values/s``, float32. Without weights every group has the weight 1 / M, and the name is ``unweighted``.
    """

    kind: ClassVar[str] = "score_matrix"

    @classmethod
    def create(
        cls, storage: Storage, name: str, feature_set: str, *, settings: Mapping[str, Any], shape: ScoreShape
    ) -> ScoreMatrixArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, name, feature_set
            Where, the names of the kernel and weights, with a dot between, and that of the queries' feature set.
        settings
            What is compared: what C is made from, and the weights.
        shape
            Its axes and blocks.

        Raises
        ------
        ContractError
            If the artifact is there with other settings.
        """
        info = ArtifactInfo(kind=cls.kind, num_units=shape.num_blocks, settings={**settings, "shape": asdict(shape)})
        made = cls._create(storage, (name, feature_set), info)
        made._publish_arrays()
        return made

    @classmethod
    def open(cls, storage: Storage, name: str, feature_set: str) -> ScoreMatrixArtifact:
        """Open the artifact; NotReadyError if there is none of that name."""
        return cls._open(storage, (name, feature_set))

    @cached_property
    def shape(self) -> ScoreShape:
        """Shape of S."""
        values = self.settings["shape"]
        return ScoreShape(**{**values, "gaps": tuple((start, stop) for start, stop in values["gaps"])})

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        return {_ARRAY: self.shape.layout()}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        return {chunk_path(_ARRAY, 0, unit): self.shape.layout()}

    def write_block(self, block: int, scores: npt.NDArray[np.float32], *, facts: Mapping[str, Any]) -> Record:
        """Write and commit a block: float32 [queries, rows of the block]."""
        start, stop = self.shape.block_range(block)
        assert scores.shape == (self.shape.queries, stop - start)
        return self._write_unit(block, {chunk_path(_ARRAY, 0, block): encode_chunk(scores, self.shape.layout())}, facts)

    def read(self, block: int) -> npt.NDArray[np.float32]:
        """Scores in a block, float32 [queries, rows of the block]; NotReadyError if it is not committed."""
        start, stop = self.shape.block_range(block)
        layout = self.shape.layout()
        buffer = np.empty(layout.buffer_bytes, np.uint8)
        return self._read_into(self._record(block), chunk_path(_ARRAY, 0, block), layout, buffer)[:, : stop - start]
