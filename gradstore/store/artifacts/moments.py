"""What the learner needs of C without C itself: A_q = C_q^T C_q, and the rows that score best before it has learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo
from gradstore.store.artifacts.rounding import ContributionDtype, QueryRounding, contribution_attributes
from gradstore.store.backend import Storage
from gradstore.store.codecs import Payload, encode_chunk
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout, chunk_path

_MOMENTS = "values/second_moments"
_CANDIDATES = "values/candidates"
_ROWS = "values/rows"
# Where there is no further row.
NO_ROW = -1
_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentsShape:
    """Shape of the moments of one query set.

    Attributes
    ----------
    queries, groups
        Q, and the names of the M groups.
    spans
        Edges of the spans, in blocks: ascending, from 0 to the number of blocks.
    candidates
        Rows m that are kept of every query and span.
    dtype
        Type that contributions are stored in: A_q is of those numbers, and candidates are kept in it.
    """

    queries: int
    groups: tuple[str, ...]
    spans: tuple[int, ...]
    candidates: int
    dtype: ContributionDtype = "float32"

    @property
    def num_spans(self) -> int:
        """Number of spans."""
        return len(self.spans) - 1

    def blocks_of(self, span: int) -> range:
        """Blocks of a span."""
        return range(*[*pairwise(self.spans)][span])

    def layouts(self) -> dict[str, ArrayLayout]:
        """Layout of the three arrays, by path: a chunk is of one span and some queries."""
        groups, kept = len(self.groups), self.candidates
        shapes: dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]] = {
            _MOMENTS: ((groups, groups), "float64", ("group", "group2")),
            _CANDIDATES: ((kept, groups), self.dtype, ("candidate", "group")),
            _ROWS: ((kept,), "int64", ("candidate",)),
        }
        attributes: dict[str, dict[str, Any]] = {
            _MOMENTS: {"groups": list(self.groups)},
            _CANDIDATES: contribution_attributes(self.groups, self.dtype),
            _ROWS: {},
        }
        found = {}
        for path, (of_query, dtype, names) in shapes.items():
            item = np.dtype(dtype).itemsize
            tile = max(1, min(self.queries, _CHUNK_BYTES // (item * int(np.prod(of_query)))))
            found[path] = ArrayLayout(
                shape=(self.num_spans, self.queries, *of_query),
                chunk_shape=(1, tile, *of_query),
                dtype=dtype,
                dimension_names=("span", "query", *names),
                attributes=attributes[path],
                fill_value=NO_ROW if path == _ROWS else np.nan,
            )
        return found


class SpanMoments(NamedTuple):
    """The moments of one span."""

    second_moments: npt.NDArray[np.float64]
    """A_q of the span's rows, [queries, groups, groups]."""
    candidates: npt.NDArray[np.float32]
    """Contributions of the rows kept, [queries, m, groups], in their true scale; NaN where there is no further row."""
    rows: npt.NDArray[np.int64]
    """Numbers of these rows, best first, [queries, m]; -1 where there is no further row."""


class MomentsArtifact(Artifact):
    """Second moments and candidate rows at ``moments/<kernel>/<set>``; one unit is a span of blocks.

    ``values/second_moments``, float64 [spans, queries, groups, groups], is the sum of C[q, n, :]^T C[q, n, :] over the span's
    rows that are valid, of C as it is stored; ``values/candidates`` [spans, queries, m, groups] are the contributions of the
    rows that score best under the learner's first weights, and ``values/rows``, int64 [spans, queries, m], which they are.
    Candidates in float16 are to be multiplied by ``values/scale`` [queries].
    """

    kind: ClassVar[str] = "moments"

    @classmethod
    def create(
        cls,
        storage: Storage,
        place: tuple[str, str],
        *,
        settings: Mapping[str, Any],
        recorded: Mapping[str, Any],
        shape: MomentsShape,
        scales: npt.NDArray[np.float32] | None = None,
    ) -> MomentsArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, place
            Where, and the names of the kernel and of the queries' feature set.
        settings
            What is compared: what C is made from.
        recorded
            What is kept beside: whether C is stored too, and of which weights the candidates are best.
        shape
            Q and M, which are compared, and its spans, candidates and dtype, for which those of an artifact that is there
            count.
        scales
            For float16, a power of two for every query.

        Raises
        ------
        ContractError
            If the artifact is there with other settings.
        """
        rounding = QueryRounding.of(shape.dtype, scales, shape.queries)
        values = asdict(shape)
        info = ArtifactInfo(
            kind=cls.kind,
            num_units=shape.num_spans,
            settings={**settings, "shape": {name: values[name] for name in ("queries", "groups")}},
            recorded={
                **recorded,
                "shape": {name: values[name] for name in ("spans", "candidates", "dtype")},
                "scales": rounding.scales.tolist(),
            },
        )
        made = cls._create(storage, place, info)
        made._publish_arrays(made.scale_chunks())
        return made

    @classmethod
    def open(cls, storage: Storage, place: tuple[str, str]) -> MomentsArtifact:
        """Open the artifact; NotReadyError if there is none of that name."""
        return cls._open(storage, place)

    @cached_property
    def shape(self) -> MomentsShape:
        """Shape, and the spans and candidates of the first creation."""
        values = {**self.settings["shape"], **self.info.recorded["shape"]}
        return MomentsShape(**{**values, "groups": tuple(values["groups"]), "spans": tuple(values["spans"])})

    @cached_property
    def rounding(self) -> QueryRounding:
        """How contributions are rounded."""
        scales = np.array(self.info.recorded["scales"], np.float32)
        return QueryRounding.of(self.shape.dtype, scales, self.shape.queries)

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        return {**self.shape.layouts(), **self.rounding.layouts()}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        return {chunk: self.shape.layouts()[array] for array, chunk, _ in self._chunks(unit)}

    def scale_chunks(self) -> dict[str, Payload]:
        """Chunks of ``values/scale``, by path: known from artifact.json, so that no record names them."""
        return self.rounding.chunks()

    def write_span(self, span: int, moments: SpanMoments, *, facts: Mapping[str, Any]) -> Record:
        """Write and commit a span."""
        existing = self._committed(span)
        if existing is not None:
            return existing
        stored = np.empty(moments.candidates.shape, self.rounding.stored_dtype)
        # They are contributions as they were stored: nothing is lost.
        self.rounding.encode(0, moments.candidates, stored)
        values = {_MOMENTS: moments.second_moments, _CANDIDATES: stored, _ROWS: moments.rows}
        layouts = self.shape.layouts()
        assert all(values[array].shape == layout.shape[1:] for array, layout in layouts.items())
        payloads = {
            chunk: encode_chunk(values[array][None, queries], layouts[array])
            for array, chunk, queries in self._chunks(span)
        }
        return self._write_unit(span, payloads, facts)

    def read_span(self, span: int) -> SpanMoments:
        """Return the moments of a span; NotReadyError if it is not committed."""
        queries, groups, kept = self.shape.queries, len(self.shape.groups), self.shape.candidates
        values = {
            _MOMENTS: np.empty((queries, groups, groups), np.float64),
            _CANDIDATES: np.empty((queries, kept, groups), self.rounding.stored_dtype),
            _ROWS: np.empty((queries, kept), np.int64),
        }
        record, layouts = self._record(span), self.shape.layouts()
        for array, chunk, tile in self._chunks(span):
            with self._buffers.borrow(layouts[array].buffer_bytes) as buffer:
                stored = self._read_into(record, chunk, layouts[array], buffer)[0]
                target = values[array][tile]
                target[...] = stored[: len(target)]
        candidates = np.empty(values[_CANDIDATES].shape, np.float32)
        self.rounding.decode(0, values[_CANDIDATES], candidates)
        return SpanMoments(values[_MOMENTS], candidates, values[_ROWS])

    def read_second_moments(self) -> npt.NDArray[np.float64]:
        """A_q over all rows, float64 [queries, groups, groups]; NotReadyError if a span is not committed."""
        total = np.zeros((self.shape.queries, len(self.shape.groups), len(self.shape.groups)))
        for span in range(self.shape.num_spans):
            total += self.read_span(span).second_moments
        return total

    def _chunks(self, span: int) -> Iterator[tuple[str, str, slice]]:
        """(array, path of the chunk, its queries) of every chunk of a span."""
        for array, layout in self.shape.layouts().items():
            size = layout.chunk_shape[1]
            for tile in range(layout.num_chunks[1]):
                chunk = chunk_path(array, span, tile, *(0 for _ in layout.shape[2:]))
                yield array, chunk, slice(tile * size, (tile + 1) * size)


def span_edges(spans: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Edges of consecutive spans of blocks that begin with block 0."""
    return (0, *(span[-1] + 1 for span in spans))
