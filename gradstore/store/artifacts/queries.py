"""Preconditioned query features: written once, loaded once by every worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo, only_chunks
from gradstore.store.backend import Storage
from gradstore.store.blocks import in_parallel
from gradstore.store.codecs import encode_chunk
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout, chunk_path, group_array

_ARRAYS = "features"


class QueryArtifact(Artifact):
    """float32 [queries, features] of every group, at ``queries/<kernel>/<set>/<member>``; one unit is the whole."""

    kind: ClassVar[str] = "queries"

    @classmethod
    def create(
        cls,
        storage: Storage,
        kernel: str,
        place: tuple[str, str],
        *,
        settings: Mapping[str, Any],
        queries: int,
        widths: Mapping[str, int],
    ) -> QueryArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, kernel, place
            Where, and the names of the kernel, and of the queries' feature set and its member.
        settings
            What is compared: damping, the snapshot of the query set, and the kernel's settings.
        queries
            Number of queries.
        widths
            Features of every group, in the order of the groups.

        Raises
        ------
        ContractError
            If the artifact is there with other settings.
        """
        info = ArtifactInfo(
            kind=cls.kind,
            num_units=1,
            settings={**settings, "queries": queries, "widths": dict(widths)},
        )
        made = cls._create(storage, (kernel, *place), info)
        made._publish_arrays()
        return made

    @classmethod
    def open(cls, storage: Storage, kernel: str, place: tuple[str, str]) -> QueryArtifact:
        """Open the artifact; NotReadyError if there is none of that name."""
        return cls._open(storage, (kernel, *place))

    @property
    def widths(self) -> dict[str, int]:
        """Features of every group."""
        return dict(self.settings["widths"])

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        return {group_array(_ARRAYS, group): self._layout(group) for group in self.widths}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        return only_chunks(self.arrays())

    def write(self, features: Mapping[str, npt.NDArray[np.float32]], *, facts: Mapping[str, Any]) -> Record:
        """Write and commit the features, float32 [queries, k_j] by group."""
        existing = self._committed(0)
        if existing is not None:
            return existing
        assert set(features) == set(self.widths), "the features must be those of the artifact's groups"
        payloads = {}
        for group in self.widths:
            layout = self._layout(group)
            assert features[group].shape == layout.shape
            payloads[chunk_path(group_array(_ARRAYS, group), 0, 0)] = encode_chunk(features[group], layout)
        return self._write_unit(0, payloads, facts)

    def read(self, group: str) -> npt.NDArray[np.float32]:
        """Features of a group, float32 [queries, k_j]; NotReadyError if the artifact is not committed."""
        return self._read_chunk(0, group_array(_ARRAYS, group), self._layout(group))

    def read_all(self) -> dict[str, npt.NDArray[np.float32]]:
        """Features of all groups; NotReadyError if the artifact is not committed."""
        self._record(0)
        features = in_parallel(self.read, self.widths, threads=self.storage.concurrency)
        return dict(zip(self.widths, features, strict=True))

    def _layout(self, group: str) -> ArrayLayout:
        return _layout(group, self.settings["queries"], self.settings["widths"][group])


def _layout(group: str, queries: int, width: int) -> ArrayLayout:
    return ArrayLayout(
        shape=(queries, width),
        chunk_shape=(queries, width),
        dtype="float32",
        dimension_names=("query", f"feature:{group}"),
        attributes={"group": group},
    )
