"""Preconditioned queries: one task writes those of a (set, member), and workers stack those of all sets and dampings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.errors import ContractError, SupersededError
from gradstore.plan.contributions import stack_of
from gradstore.plan.resolve import resolve_kernel
from gradstore.spec import RunSpec
from gradstore.stages.contribute.rows import query_factor
from gradstore.stages.reading import full_rows, full_width
from gradstore.stages.spectra import kernel_settings, open_spectra, read_spectrum
from gradstore.store.alignment import aligned
from gradstore.store.artifacts import KernelArtifact, QueryArtifact, QueryShape, WeightsArtifact
from gradstore.store.features import FeatureArray, FeatureSet, FeatureStore

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Damping, Spectrum


Stack = tuple[str, str | None, str]
"""A kernel, a choice of weights, and which of their queries; see `stack_of`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One C: of a query set, under one kernel of a sweep; or its scores, under ``weights`` (None: the same for all groups)."""

    kernel: str
    set_name: str
    weights: str | None = None

    @property
    def stack(self) -> Stack:
        """What is equal of targets whose queries are multiplied together; those of an aspect are by themselves."""
        return self.kernel, self.weights, stack_of(self.set_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """Some queries of a target, ``first`` to ``last``, that are worked on together with those of other slabs."""

    target: Target
    first: int
    last: int

    @property
    def queries(self) -> int:
        """How many."""
        return self.last - self.first


def run_of(spec: RunSpec, kernel: str) -> RunSpec:
    """Return the run of a sweep whose kernel has a name."""
    return next(run for run in spec.sweep() if run.kernel.name == kernel)


def in_group_shape(queries: FeatureSet, *, spectra: bool) -> QueryShape:
    """What is kept of queries under a kernel that acts inside a group: of rank-c factors the matrices, if it has spectra."""
    arrays = queries.info.arrays
    return QueryShape(
        queries=queries.info.rows,
        groups=tuple(array.name for array in arrays),
        widths={array.name: full_width(array) if spectra else array.features for array in arrays},
    )


def precondition(
    store_url: str,
    run: Mapping[str, Any],
    place: tuple[str, str],
    read: Callable[[KernelArtifact, str], Spectrum] = read_spectrum,
) -> int:
    """Task: write K_j psi and tau_j(q, q) for every query of a (set, member) and every group j; return how many queries.

    ``run`` is one of a sweep, and its kernel one that acts inside a group; ``read`` gives the spectrum of a group.
    """
    from gradstore.numerics.kernel import zero_invalid

    spec, store = RunSpec.model_validate(run), FeatureStore.open(store_url)
    queries, artifact = store.open_set(*place), open_for(store, spec, place)
    if artifact.is_complete():
        return queries.info.rows
    kernel = resolve_kernel(spec)
    spectra = open_spectra(store, spec, queries.member) if kernel.needs_spectra else None
    preconditioned, selves = {}, []
    for array in queries.info.arrays:
        stored = all_rows(queries, array)
        # A query that is not valid is answered by nothing; the learner takes no step for it.
        zero_invalid(stored)
        rows = full_rows(array, stored)
        if spectra is None:
            preconditioned[array.name] = stored
            selves.append(np.einsum("qd,qd->q", rows, rows, dtype=np.float64))
            continue
        assert kernel.damped_by is not None, "a kernel with spectra is damped"
        preconditioned[array.name], own = _apply(read(spectra, array.name), rows, kernel.damped_by)
        selves.append(own)
    artifact.write(preconditioned, np.stack(selves, 1), facts={"queries": queries.info.rows})
    return queries.info.rows


def _apply(spectrum: Spectrum, rows: np.ndarray, damping: Damping) -> tuple[np.ndarray, np.ndarray]:
    """K psi and tau(q, q) in one group; its spectrum is gone before that of the next is read."""
    return spectrum.precondition(rows, damping), spectrum.self_influence(rows, damping)


def open_for(store: FeatureStore, spec: RunSpec, place: tuple[str, str]) -> QueryArtifact:
    """Open the preconditioned queries that a task is to write.

    Raises
    ------
    SupersededError
        If they are of another kernel: a task of an earlier run must not fill an artifact that was pruned and made anew since.
    """
    artifact = QueryArtifact.open(store.storage, spec.kernel.name, place)
    if (artifact.settings["kernel"], artifact.settings["kernel_of"]) != (kernel_settings(spec), spec.kernel.members):
        raise SupersededError(
            f"{artifact.folder}: is of another kernel than this task's. Run `gradstore contribute` again."
        )
    return artifact


def all_rows(feature_set: FeatureSet, array: FeatureArray) -> np.ndarray:
    """All rows [n, k_j] of one group of a small set, as they are stored; NaN in gaps."""
    info = feature_set.info
    rows = np.full((info.rows, array.features), np.nan, np.float32)
    for block in range(info.num_blocks):
        place = rows[slice(*info.block_range(block))]
        feature_set.read_block(block, [array.name], out={array.name: place})
    return rows


def attempts(store: FeatureStore, slabs: Sequence[Slab], members: Sequence[str]) -> tuple[str, ...]:
    """The attempts that wrote the preconditioned queries, and weights, of some slabs: other ones where they were made anew."""
    found = []
    for slab in slabs:
        for member in members:
            artifact = QueryArtifact.open(store.storage, slab.target.kernel, (slab.target.set_name, member))
            missing = f"{artifact.folder}: not written. Run `gradstore contribute` again."
            found.append(artifact.log.require(0, missing).attempt)
        if slab.target.weights is not None:
            weights = WeightsArtifact.open(store.storage, slab.target.weights)
            missing = f"{weights.folder}: not learned to the end. Run `gradstore learn` again."
            found.append(weights.log.require(0, missing).attempt)
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSlab:
    """A slab with its preconditioned queries, of one member, and what C of each counts: None where all count once."""

    slab: Slab
    artifact: QueryArtifact
    factors: np.ndarray | None


def open_slabs(store: FeatureStore, spec: RunSpec, member: str, slabs: Sequence[Slab]) -> list[OpenSlab]:
    """Open the queries of some slabs of a run, as a member has them; an artifact of many groups takes milliseconds to."""
    found = []
    for slab in slabs:
        target = slab.target
        artifact = QueryArtifact.open(store.storage, target.kernel, (target.set_name, member))
        factor_Q = query_factor(store, run_of(spec, target.kernel), target.set_name)
        of_slab = None if factor_Q is None else factor_Q[slab.first : slab.last]
        found.append(OpenSlab(slab=slab, artifact=artifact, factors=of_slab))
    return found


def stacked(
    slabs: Sequence[OpenSlab],
    read: Callable[[QueryArtifact, int, int], np.ndarray],
    weigh: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> np.ndarray:
    """What ``read`` gives of the queries of all slabs, one after another, times the factor of every query.

    Parameters
    ----------
    slabs
        Which queries.
    read
        Reads, from the artifact of a slab, queries first to last: float32 [queries, ...].
    weigh
        Multiplies, in place, what is stacked of a slab by a factor [queries]; by default all of it.
    """
    stack: np.ndarray | None = None
    start, total = 0, sum(item.slab.queries for item in slabs)
    for item in slabs:
        values = read(item.artifact, item.slab.first, item.slab.last)
        if stack is None:
            stack = aligned((total, *values.shape[1:]))
        place = stack[start : start + item.slab.queries]
        np.copyto(place, values)
        if item.factors is not None:
            (weigh or _weigh)(place, item.factors)
        start += item.slab.queries
    assert stack is not None, "there is nothing to stack"
    return stack


def _weigh(stack: np.ndarray, factor_Q: np.ndarray) -> None:
    stack *= factor_Q.reshape(-1, *(1 for _ in stack.shape[1:]))


def refuse_other_groups(store: FeatureStore, set_name: str) -> None:
    """Make sure that queries have the groups of the train set, of the same widths.

    Raises
    ------
    ContractError
        Naming the first group that differs.
    """
    sets = {name: store.open_set(name).info for name in ("train", set_name)}
    found = {name: {array.name: full_width(array) for array in info.arrays} for name, info in sets.items()}
    differing = [group for group in {**found["train"], **found[set_name]} if not _same(found, set_name, group)]
    if differing or list(found["train"]) != list(found[set_name]):
        shown = differing[0] if differing else "the order of groups"
        told = "; ".join(f"{name} has {of.get(shown, 'none')}" for name, of in found.items()) if differing else ""
        raise ContractError(
            f"{store.storage.url}/features/{set_name}: its groups are not those of features/train: {shown}"
            f"{f' ({told} features)' if told else ''}. Queries are compared with train examples group by group: compute both "
            "under one feature contract, in one store."
        )


def _same(found: Mapping[str, Mapping[str, int]], set_name: str, group: str) -> bool:
    return found["train"].get(group) == found[set_name].get(group)
