"""C that is not stored, built from features whenever it is read; and which of the two a run reads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from gradstore.errors import NotReadyError
from gradstore.plan.contribute import BUFFERS
from gradstore.spec import RunSpec
from gradstore.stages.contribute.artifacts import contribution_shape, create_queries, passes_of, stored_as, targets_of
from gradstore.stages.contribute.blocks import BlockBuilder, Built
from gradstore.stages.contribute.queries import Slab, Target, refuse_other_groups
from gradstore.stages.contribute.settings import output_settings
from gradstore.stages.contribute.span import Work, slabs_of
from gradstore.stages.contributions import Contributions, Piece, StoredContributions, numbers_of, valid_masks, valid_of
from gradstore.store.alignment import aligned
from gradstore.store.artifacts import ContributionShape, QueryRounding
from gradstore.store.codecs import plain
from gradstore.store.features import FeatureStore
from gradstore.store.read_ahead import read_ahead


def open_contributions(spec: RunSpec, store: FeatureStore, set_name: str) -> Contributions:
    """Open C of a set of queries, under the kernel of one run of a sweep: as the store has it, or to be built.

    Raises
    ------
    NotReadyError
        If it is not whole, or, where it is built, the preconditioned queries are not there.
    ContractError
        If it was made from sets that have changed since.
    """
    if spec.contribute.mode == "tensor":
        return StoredContributions.open(store, spec.kernel.name, set_name)
    return BuiltContributions.open(spec, store, set_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltContributions:
    """C as it is built from features: every read is a pass over them, or as many as queries are cut into parts.

    What `contribute` sums for the learner without keeping C, it sums of the same numbers, to the last bit: queries are multiplied
    with the same ones beside them, and C is rounded as it was there. Where nothing was summed, as of the eval queries, it is not
    rounded.

    Attributes
    ----------
    store, spec
        The store, and one run of a sweep.
    settings, shape, rounding
        See `Contributions`.
    slabs
        Queries of every pass.
    valid
        See `StoredContributions`.
    """

    store: FeatureStore
    spec: RunSpec
    settings: Mapping[str, Any]
    shape: ContributionShape
    slabs: Sequence[Slab]
    rounding: QueryRounding
    valid: Mapping[int, np.ndarray]

    @classmethod
    def open(cls, spec: RunSpec, store: FeatureStore, set_name: str) -> BuiltContributions:
        """Open what C of a set of queries is built from; see `open_contributions`."""
        refuse_other_groups(store, set_name)
        for member in store.open_set(set_name).info.members:
            queries = create_queries(spec, store, (set_name, member))
            if not queries.is_complete():
                raise NotReadyError(f"{queries.folder}: not preconditioned. Run `gradstore contribute` first.")
        target = Target(kernel=spec.kernel.name, set_name=set_name)
        count = store.open_set(set_name).info.rows
        rounding = stored_as(store, target) or QueryRounding.of("float32", None, count)
        shape = contribution_shape(spec, store, target, rounding)
        summed = targets_of(spec)
        parts, _ = passes_of(spec, store, summed if target in summed else [target])
        work = Work(blocks=(), tiles=((count, shape.query_tile),), parts=parts, passes=parts)
        settings = {
            **output_settings(spec, store, target),
            "shape": {"queries": count, "rows": shape.rows, "gaps": shape.gaps, "groups": shape.groups},
        }
        return cls(
            store=store,
            spec=spec,
            settings=plain(settings),
            shape=shape,
            slabs=[*chain.from_iterable(slabs_of([target], work))],
            rounding=rounding,
            valid=valid_masks(store),
        )

    @property
    def read_bytes(self) -> int:
        """See `Contributions`: the features, as often as they are passed over."""
        train = self.store.open_set("train").info
        return len(self.slabs) * train.row_bytes * train.num_examples * len(train.members)

    def valid_rows(self) -> np.ndarray:
        """See `Contributions`."""
        return numbers_of(self.shape, self.valid)

    def slices(self, first: int, last: int) -> Sequence[tuple[int, int]]:
        """See `Contributions`."""
        overlaps = [(max(first, slab.first), min(last, slab.last)) for slab in self.slabs]
        return [(start, stop) for start, stop in overlaps if start < stop]

    def read(self, first: int, last: int) -> Iterator[Piece]:
        """See `Contributions`; a block is built while the one before is worked on."""
        for slab in self.slabs:
            start, stop = max(first, slab.first), min(last, slab.last)
            if start >= stop:
                continue
            for block, rows, c_QNM in self._build(slab):
                assert rows.start == 0, "blocks are built whole"
                # What others stand beside is built with them, so that it has the same bits.
                wanted_QNM = c_QNM[start - slab.first : stop - slab.first]
                self._round(start, wanted_QNM)
                yield start, *valid_of(self.shape, self.valid, block, wanted_QNM)

    def _build(self, slab: Slab) -> Iterator[Built]:
        builder = BlockBuilder(self.store, self.spec, [slab])
        places = deque[np.ndarray]()
        built = builder.build(range(self.shape.num_blocks), places.popleft)

        def begin(pool: ThreadPoolExecutor, _: int, buffer: np.ndarray) -> Callable[[], Built]:
            def build() -> Built:
                places.append(buffer)
                return next(built)

            return pool.submit(build).result

        buffers = [aligned(builder.part_shape) for _ in range(BUFFERS)]
        return read_ahead(range(self.shape.num_blocks), buffers, begin, threads=1)

    def _round(self, first: int, c_QNM: np.ndarray) -> None:
        """Round in place."""
        if self.rounding.dtype != "float32":
            stored_QNM = np.empty(c_QNM.shape, self.rounding.stored_dtype)
            self.rounding.encode(first, c_QNM, stored_QNM)
            self.rounding.decode(first, stored_QNM, c_QNM)
