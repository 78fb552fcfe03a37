"""How C of some rows comes from features: by products of one member's, which a span adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from gradstore.plan.resolve import resolve_kernel
from gradstore.spec import RunSpec
from gradstore.stages.contribute.queries import Slab, Target, open_slabs, stacked
from gradstore.stages.reading import full_rows, inner_products, is_factored
from gradstore.stages.weights import read_weights
from gradstore.store.artifacts import QueryArtifact
from gradstore.store.features import FeatureArray, FeatureStore

Rows = Mapping[str, np.ndarray]
"""float32 [n, k_j] of some groups, as they are stored but in their true scale."""


class Product(Protocol):
    """C of one member, of the queries of all slabs one after another, before row factors.

    Q queries, n rows, M groups; of scores, whose weights are in the product, M is 1.
    """

    @property
    def reads_features(self) -> bool:
        """Whether anything comes from features; if not, they are not streamed."""
        ...

    def begin(self, block: int) -> None:
        """Read what is needed of a block beside its features."""
        ...

    def columns(self, groups: Sequence[str]) -> slice:
        """Which groups of C get something from features of these groups."""
        ...

    def write(self, rows: Rows, out_NGQ: np.ndarray) -> None:
        """Write, not add, what these features give to the groups that `columns` names."""
        ...

    def finish(self, rows: slice, out_NMQ: np.ndarray) -> bool:
        """Write what does not come from features, of some rows of the block begun last; False if that is nothing."""
        ...


class InGroup:
    """Under a kernel that acts inside a group: inner products with preconditioned queries, group by group.

    Rank-c factors are multiplied out where queries are preconditioned, since those have no factors any more.

    Parameters
    ----------
    arrays
        The groups.
    queries
        Preconditioned queries [Q, k_j] of every group; of scores times the weight of the group.
    summed
        Whether groups are summed, for scores.
    factored
        Whether queries are rank-c factors still.
    """

    def __init__(
        self, arrays: Sequence[FeatureArray], queries: Mapping[str, np.ndarray], *, summed: bool, factored: bool
    ) -> None:
        self._arrays = {array.name: array for array in arrays}
        self._places = {array.name: place for place, array in enumerate(arrays)}
        self._queries = queries
        self._summed = summed
        self._factored = factored

    @property
    def reads_features(self) -> bool:
        """See `Product`."""
        return True

    def begin(self, block: int) -> None:
        """See `Product`."""

    def columns(self, groups: Sequence[str]) -> slice:
        """See `Product`."""
        return slice(0, 1) if self._summed else slice(self._places[groups[0]], self._places[groups[-1]] + 1)

    def write(self, rows: Rows, out_NGQ: np.ndarray) -> None:
        """See `Product`."""
        from gradstore.numerics.contributions import group_products, summed_products

        if self._factored:
            self._write_factored(rows, out_NGQ)
            return
        queries = [self._queries[group] for group in rows]
        full = [full_rows(self._arrays[group], values) for group, values in rows.items()]
        if self._summed:
            summed_products(queries, full, out_NGQ[:, 0])
        else:
            group_products(queries, full, out_NGQ)

    def finish(self, rows: slice, out_NMQ: np.ndarray) -> bool:
        """See `Product`."""
        return False

    def _write_factored(self, rows: Rows, out_NGQ: np.ndarray) -> None:
        out_NGQ[:] = 0
        for index, (group, values) in enumerate(rows.items()):
            array, queries = self._arrays[group], self._queries[group]
            product_QN = inner_products(array, queries, values) if is_factored(array) else queries @ values.T
            out_NGQ[:, 0 if self._summed else index] += product_QN.T


def make_products(
    store: FeatureStore, spec: RunSpec, member: str, stacks: Sequence[Sequence[Slab]]
) -> Sequence[Product]:
    """Make the products of a member of the train set and the queries of some stacks of slabs, which are read."""
    if resolve_kernel(spec).across_groups:
        from gradstore.stages.contribute import across

        return across.make_products(store, spec, member, stacks)
    return [_in_group(store, spec, member, slabs) for slabs in stacks]


def _in_group(store: FeatureStore, spec: RunSpec, member: str, slabs: Sequence[Slab]) -> InGroup:
    kernel = resolve_kernel(spec)
    arrays = store.open_set("train", member).info.arrays
    weights = [weights_of(store, slab.target, spec) for slab in slabs]
    factored = not kernel.needs_spectra and any(map(is_factored, arrays))
    opened, queries = open_slabs(store, spec, member, slabs), {}
    for place, array in enumerate(arrays):

        def read(artifact: QueryArtifact, first: int, last: int, group: str = array.name) -> np.ndarray:
            return artifact.read(group)[first:last]

        weigh = partial(_weigh_factors, array) if factored and is_factored(array) else _weigh
        rows, start = stacked(opened, read, weigh), 0
        for slab, weight_M in zip(slabs, weights, strict=True):
            if weight_M is not None:
                weigh(rows[start : start + slab.queries], np.full(slab.queries, weight_M[place], np.float32))
            start += slab.queries
        queries[array.name] = rows
    return InGroup(arrays, queries, summed=weights[0] is not None, factored=factored)


def weights_of(store: FeatureStore, target: Target, spec: RunSpec) -> np.ndarray | None:
    """Weights of a target's scores, float64 [M], in the order of the train set's groups; None where C itself is asked for.

    Raises
    ------
    NotReadyError, ContractError
        See `read_weights`.
    """
    return read_weights(store, target.weights) if spec.contribute.mode == "scores" else None


def refuse_weights(store: FeatureStore, spec: RunSpec, targets: Sequence[Target]) -> None:
    """Make sure of all weights of some targets before anything is created: see `read_weights` for what is raised."""
    for target in targets:
        weights_of(store, target, spec)


def _weigh(rows_QK: np.ndarray, factor_Q: np.ndarray) -> None:
    rows_QK *= factor_Q[:, None]


def _weigh_factors(array: FeatureArray, rows_QK: np.ndarray, factor_Q: np.ndarray) -> None:
    """Multiply the matrices that rank-c factors u, v stand for: u alone, since they are multiplied with each other."""
    for part in array.parts:
        rows_QK[:, part.start : part.start + (part.factors or 0) * part.shape[0]] *= factor_Q[:, None]
