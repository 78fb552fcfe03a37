"""C of blocks as it is built: features stream by, and products of tiles of rows are added up while they are in cache."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby, islice, pairwise
from typing import Protocol

import numpy as np

from gradstore.plan.contribute import GROUPS_AT_ONCE, READ_BYTES, part_rows, read_bundles, tile_rows
from gradstore.plan.resolve import resolve_kernel
from gradstore.spec import RunSpec
from gradstore.stages.contribute.products import Product, Rows, make_products
from gradstore.stages.contribute.queries import Slab, attempts
from gradstore.stages.contribute.rows import row_factor
from gradstore.stages.reading import full_width
from gradstore.store.alignment import aligned
from gradstore.store.features import BlockReader, FeatureSet, FeatureStore, Piece

Built = tuple[int, slice, np.ndarray]
"""A block, some of its rows, and C [Q, n, M] of them."""
Factors = Mapping[tuple[str, str], np.ndarray | None]
"""What every row of a block counts, by kernel and member; None where all count once."""


class Reader(Protocol):
    """What gives the features of blocks as a `BlockReader` does."""

    def read(self, blocks: Iterable[int]) -> Generator[Piece, None, None]:
        """See `BlockReader.read`."""
        ...


MakeReader = Callable[[Sequence[FeatureSet], Sequence[Sequence[str]]], Reader]
"""(train set as every member has it, bundles of groups) -> what reads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stack:
    """Queries that are multiplied together; see `Target.stack`.

    Attributes
    ----------
    kernel
        Name of the kernel.
    place
        Where they are among the queries of all slabs.
    tile
        Rows whose products are computed at once.
    products
        The product of every member.
    """

    kernel: str
    place: slice
    tile: int
    products: Mapping[str, Product]


class BlockBuilder:
    """Builds C [Q, n, M] of blocks, of the queries of all slabs one after another; of scores M is 1.

    Every block is read once for all slabs and members. Products may round otherwise where other queries stand beside, so that
    queries of each stack are multiplied by themselves: what is computed of a row depends on the block and on the slabs of
    its stack alone. A block that is built again has the same bits, whatever else the sweep holds by then.

    Parameters
    ----------
    store, spec
        The store and the run.
    slabs
        Which queries: those of one stack stand together.
    row_parts
        In how many parts the rows of a block are built, each of which reads the block.
    make_reader
        What reads the features.
    """

    def __init__(
        self,
        store: FeatureStore,
        spec: RunSpec,
        slabs: Sequence[Slab],
        *,
        row_parts: int = 1,
        make_reader: MakeReader = BlockReader,
    ) -> None:
        self._store = store
        self._make_reader = make_reader
        self._runs = {run.kernel.name: run for run in spec.sweep()}
        train = store.open_set("train")
        self.info = train.info
        self._trains = {member: train.of_member(member) for member in spec.model.etas}
        self._groups = [array.name for array in self.info.arrays]
        self.queries = sum(slab.queries for slab in slabs)
        self.columns = 1 if spec.contribute.mode == "scores" else len(self._groups)
        self._stacks = self._stacked(spec, slabs)
        self._part = part_rows(self.info.block_rows, max(stack.tile for stack in self._stacks), row_parts)
        widths = {array.name: full_width(array) for array in self.info.arrays}
        self._bundles = read_bundles(widths, self.info.block_rows, READ_BYTES // row_parts)
        # A portion across groups is of all of them.
        self._across = resolve_kernel(spec).across_groups
        widest = self.columns if self._across else min(self.columns, GROUPS_AT_ONCE)
        largest = max((stack.place.stop - stack.place.start) * stack.tile for stack in self._stacks)
        self._scratch = aligned(largest * widest)

    def _stacked(self, spec: RunSpec, slabs: Sequence[Slab]) -> list[_Stack]:
        together = [tuple(of) for _, of in groupby(slabs, key=lambda slab: slab.target.stack)]
        written_by = attempts(self._store, slabs, [*self._trains])
        products = _products(self._store.storage.url, spec.model_dump_json(), tuple(together), written_by)
        stacks, start = [], 0
        for number, of in enumerate(together):
            queries = sum(slab.queries for slab in of)
            stacks.append(
                _Stack(
                    kernel=of[0].target.kernel,
                    place=slice(start, start + queries),
                    tile=tile_rows(queries, self.columns),
                    products={member: found[number] for member, found in products.items()},
                )
            )
            start += queries
        return stacks

    @property
    def part_shape(self) -> tuple[int, int, int]:
        """Shape of the largest C that is built at once."""
        return self.queries, self._part, self.columns

    def build(self, blocks: Sequence[int], buffers: Callable[[], np.ndarray]) -> Iterator[Built]:
        """Yield C of all parts of the blocks, in order, each in a buffer of `part_shape` that ``buffers`` gives."""
        parts = [(block, rows) for block in blocks for rows in self._parts_of(block)]
        if not all(product.reads_features for stack in self._stacks for product in stack.products.values()):
            for block, rows in parts:
                yield block, rows, self._fill(block, rows, (), buffers())
            return
        reader = self._make_reader([*self._trains.values()], self._bundles)
        with closing(reader.read([block for block, _ in parts])) as pieces:
            for block, rows in parts:
                of_block = islice(pieces, len(self._bundles) * len(self._trains))
                yield block, rows, self._fill(block, rows, of_block, buffers())

    def _parts_of(self, block: int) -> list[slice]:
        start, stop = self.info.block_range(block)
        edges = [*range(0, stop - start, self._part), stop - start]
        return [slice(*edge) for edge in pairwise(edges)]

    def _fill(self, block: int, rows: slice, pieces: Iterable[Piece], buffer: np.ndarray) -> np.ndarray:
        c_QNM = buffer[:, : rows.stop - rows.start]
        totals = [_Sum(c_QNM[stack.place], rows, stack.tile, self._scratch) for stack in self._stacks]
        factors = self._factors(block)
        for stack in self._stacks:
            for product in stack.products.values():
                product.begin(block)
        for piece in pieces:
            for groups in _batches([*piece.rows], GROUPS_AT_ONCE):
                features = {group: piece.rows[group] for group in groups}
                for stack, total in zip(self._stacks, totals, strict=True):
                    product, factor_N = stack.products[piece.member], factors[stack.kernel, piece.member]
                    total.add(partial(_write, product, features), product.columns(groups), factor_N)
        for stack, total in zip(self._stacks, totals, strict=True) if self._across else ():
            for member, product in stack.products.items():
                total.add(product.finish, slice(0, self.columns), factors[stack.kernel, member])
        return c_QNM

    def _factors(self, block: int) -> Factors:
        found: dict[tuple[str, str], np.ndarray | None] = {}
        for kernel in dict.fromkeys(stack.kernel for stack in self._stacks):
            for member, train in self._trains.items():
                factor_N = row_factor(self._store, self._runs[kernel], train, block)
                found[kernel, member] = None if (factor_N == 1).all() else factor_N
        return found


class _Sum:
    """C [Q, n, M] of some rows of a block, to which portions are added tile by tile."""

    def __init__(self, c_QNM: np.ndarray, rows: slice, tile: int, scratch: np.ndarray) -> None:
        self._c_QNM = c_QNM
        self._scratch = scratch
        self._tiles = [slice(first, min(first + tile, rows.stop)) for first in range(rows.start, rows.stop, tile)]
        self._start = rows.start
        self._filled = np.zeros(c_QNM.shape[2], bool)

    def add(self, write: Callable[[slice, np.ndarray], bool], columns: slice, factor_N: np.ndarray | None) -> None:
        """Add what ``write`` writes of every tile, and returns True, to some columns, times a factor of every row."""
        from gradstore.numerics.contributions import accumulate

        queries, groups = len(self._c_QNM), columns.stop - columns.start
        first = not self._filled[columns].any()
        for tile in self._tiles:
            size = tile.stop - tile.start
            portion_NGQ = self._scratch[: size * groups * queries].reshape(size, groups, queries)
            if not write(tile, portion_NGQ):
                return
            place = slice(tile.start - self._start, tile.stop - self._start)
            factor = None if factor_N is None else factor_N[tile]
            accumulate(portion_NGQ, factor, self._c_QNM[:, place, columns], first=first)
        self._filled[columns] = True


def _write(product: Product, features: Rows, tile: slice, out_NGQ: np.ndarray) -> bool:
    product.write({group: values[tile] for group, values in features.items()}, out_NGQ)
    return True


def _batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@lru_cache(maxsize=1)
def _products(
    store_url: str, spec_json: str, stacks: tuple[tuple[Slab, ...], ...], written_by: tuple[str, ...]
) -> Mapping[str, Sequence[Product]]:
    """The products of every member, one for each stack, with their queries: made once per process."""
    # Those of another pass go before these come: there may be no room for both.
    _products.cache_clear()
    del written_by
    store, spec = FeatureStore.open(store_url), RunSpec.model_validate_json(spec_json)
    return {member: make_products(store, spec, member, stacks) for member in spec.model.etas}
