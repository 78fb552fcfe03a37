"""Preconditioned queries: what C of every query is made with, written once per kernel and query set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo
from gradstore.store.backend import Storage
from gradstore.store.blocks import in_parallel
from gradstore.store.codecs import Payload, encode_chunk
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout, chunk_path, group_array

_FEATURES = "features"
_SELF = "values/self"
_COEFFICIENTS = "values/coefficients"
# Coefficients are read for some queries at a time: in chunks of about this size.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryShape:
    """What is kept of every query.

    Attributes
    ----------
    queries
        Number of queries, Q.
    groups
        Names of the M groups.
    widths
        Features of every group of which K psi is kept, in the order of the groups.
    coefficients
        Coefficients p of every group of which a kernel across groups makes C; 0 of any other.
    """

    queries: int
    groups: tuple[str, ...]
    widths: Mapping[str, int]
    coefficients: int = 0

    @property
    def coefficient_tile(self) -> int:
        """Queries in a chunk of coefficients."""
        a_query = 4 * len(self.groups) * self.coefficients
        return max(1, min(self.queries, _CHUNK_BYTES // max(a_query, 1)))


class QueryArtifact(Artifact):
    """Preconditioned queries at ``queries/<kernel>/<set>/<member>``; one unit is the whole.

    ``features/<group>``, float32 [queries, features], is K psi of every group; ``values/self``, float64 [queries, groups],
    is tau(q, q) = <K psi, psi> of every group; ``values/coefficients``, float32 [queries, groups, p], are those of a kernel
    across groups.
    """

    kind: ClassVar[str] = "queries"

    @classmethod
    def create(
        cls, storage: Storage, kernel: str, place: tuple[str, str], *, settings: Mapping[str, Any], shape: QueryShape
    ) -> QueryArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, kernel, place
            Where, and the names of the kernel, and of the queries' feature set and its member.
        settings
            What is compared: damping, the snapshot of the query set, and the kernel's settings.
        shape
            What is kept of every query, which is compared too.

        Raises
        ------
        ContractError
            If the artifact is there with other settings.
        """
        info = ArtifactInfo(kind=cls.kind, num_units=1, settings={**settings, **asdict(shape)})
        made = cls._create(storage, (kernel, *place), info)
        made._publish_arrays()
        return made

    @classmethod
    def open(cls, storage: Storage, kernel: str, place: tuple[str, str]) -> QueryArtifact:
        """Open the artifact; NotReadyError if there is none of that name."""
        return cls._open(storage, (kernel, *place))

    @cached_property
    def shape(self) -> QueryShape:
        """What is kept of every query."""
        values = {name: self.settings[name] for name in ("queries", "widths", "coefficients")}
        return QueryShape(groups=tuple(self.settings["groups"]), **values)

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        shape = self.shape
        found = {group_array(_FEATURES, group): self._features(group) for group in shape.widths}
        found[_SELF] = _layout((shape.queries, len(shape.groups)), "float64", ("query", "group"), shape.groups)
        if shape.coefficients:
            sizes = (shape.queries, len(shape.groups), shape.coefficients)
            layout = _layout(sizes, "float32", ("query", "group", "vector"), shape.groups, tile=shape.coefficient_tile)
            found[_COEFFICIENTS] = layout
        return found

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        return {
            chunk_path(path, tile, *(0 for _ in layout.shape[1:])): layout
            for path, layout in self.arrays().items()
            for tile in range(layout.num_chunks[0])
        }

    def write(
        self,
        features: Mapping[str, npt.NDArray[np.float32]],
        self_contributions: npt.NDArray[np.float64],
        coefficients: npt.NDArray[np.float32] | None = None,
        *,
        facts: Mapping[str, Any],
    ) -> Record:
        """Write and commit the features [queries, k_j] by group, tau(q, q) [queries, groups], and any coefficients."""
        existing = self._committed(0)
        if existing is not None:
            return existing
        assert set(features) == set(self.shape.widths), "the features must be those of the artifact's groups"
        assert (coefficients is not None) == bool(self.shape.coefficients), "coefficients are given where they are kept"
        values: dict[str, npt.NDArray[Any]] = {group_array(_FEATURES, group): rows for group, rows in features.items()}
        values[_SELF] = self_contributions
        if coefficients is not None:
            values[_COEFFICIENTS] = coefficients
        payloads: dict[str, Payload] = {}
        for path, layout in self.arrays().items():
            assert values[path].shape == layout.shape
            size = layout.chunk_shape[0]
            for tile in range(layout.num_chunks[0]):
                chunk = values[path][tile * size : (tile + 1) * size]
                payloads[chunk_path(path, tile, *(0 for _ in layout.shape[1:]))] = encode_chunk(chunk, layout)
        return self._write_unit(0, payloads, facts)

    def read(self, group: str) -> npt.NDArray[np.float32]:
        """Features of a group, float32 [queries, k_j]; NotReadyError if the artifact is not committed."""
        return self._read_chunk(0, group_array(_FEATURES, group), self._features(group))

    def read_all(self) -> dict[str, npt.NDArray[np.float32]]:
        """Features of all groups; NotReadyError if the artifact is not committed."""
        self._record(0)
        widths = self.shape.widths
        features = in_parallel(self.read, widths, threads=self.storage.concurrency)
        return dict(zip(widths, features, strict=True))

    def read_self(self) -> npt.NDArray[np.float64]:
        """tau(q, q) of every group, float64 [queries, groups]; NotReadyError if the artifact is not committed."""
        return self._read_chunk(0, _SELF, self.arrays()[_SELF])

    def read_coefficients(self, first: int, last: int) -> npt.NDArray[np.float32]:
        """Coefficients of some queries, float32 [queries, groups, p]; NotReadyError if the artifact is not committed."""
        record, layout, tile = self._record(0), self.arrays()[_COEFFICIENTS], self.shape.coefficient_tile
        found = np.empty((last - first, *layout.shape[1:]), np.float32)
        for index in range(first // tile, -(-last // tile)):
            with self._buffers.borrow(layout.buffer_bytes) as buffer:
                chunk = self._read_into(record, chunk_path(_COEFFICIENTS, index, 0, 0), layout, buffer)
                start, stop = max(index * tile, first), min((index + 1) * tile, last)
                found[start - first : stop - first] = chunk[start - index * tile : stop - index * tile]
        return found

    def _features(self, group: str) -> ArrayLayout:
        queries, width = self.shape.queries, self.shape.widths[group]
        return ArrayLayout(
            shape=(queries, width),
            chunk_shape=(queries, width),
            dtype="float32",
            dimension_names=("query", f"feature:{group}"),
            attributes={"group": group},
        )


def _layout(
    shape: tuple[int, ...], dtype: str, names: tuple[str, ...], groups: tuple[str, ...], tile: int | None = None
) -> ArrayLayout:
    return ArrayLayout(
        shape=shape,
        chunk_shape=(tile or shape[0], *shape[1:]),
        dtype=dtype,
        dimension_names=names,
        attributes={"groups": list(groups)},
    )
