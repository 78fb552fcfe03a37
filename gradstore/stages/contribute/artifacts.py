"""What contribute makes: which targets a run has, from what settings, how they are cut, and their artifacts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstore.plan.contribute import BUFFERS, SCORE_TILE, num_spans, query_passes, refuse_moments
from gradstore.plan.contributions import contributed_sets
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.sizes import query_tile, split
from gradstore.spec import RunSpec
from gradstore.stages.contribute.outputs import is_kept, score_name, wants_moments
from gradstore.stages.contribute.queries import Stack, Target, in_group_shape
from gradstore.stages.contribute.settings import output_settings, query_settings
from gradstore.store.artifacts import (
    ContributionArtifact,
    ContributionShape,
    MomentsArtifact,
    MomentsShape,
    QueryArtifact,
    QueryRounding,
    QueryShape,
    ScoreMatrixArtifact,
    ScoreShape,
    span_edges,
)
from gradstore.store.features import FeatureStore

Place = tuple[str, str]
"""A query set and its member."""


def targets_of(spec: RunSpec) -> list[Target]:
    """Everything that a run makes of its queries, those of one stack together."""
    mode, found = spec.contribute.mode, []
    for run in spec.sweep():
        if mode == "scores":
            weights = dict.fromkeys((None, spec.contribute.weights))
            found += [Target(kernel=run.kernel.name, set_name="eval", weights=name) for name in weights]
        else:
            found += [Target(kernel=run.kernel.name, set_name=name) for name in contributed_sets(spec)]
    return found


def create_queries(spec: RunSpec, store: FeatureStore, place: Place) -> QueryArtifact:
    """Create the preconditioned queries of a (set, member) under the kernel of one run of a sweep, or open them.

    Raises
    ------
    NotReadyError
        If the kernel is not built.
    ContractError
        If it is stale, or queries of this name were preconditioned with other settings.
    """
    kernel = resolve_kernel(spec)
    queries = store.open_set(*place)
    if kernel.across_groups:
        from gradstore.stages.contribute import across

        shape: QueryShape = across.query_shape(store, spec, place)
    else:
        shape = in_group_shape(queries, spectra=kernel.needs_spectra)
    settings = query_settings(spec, store, place[0], [place[1]])
    return QueryArtifact.create(store.storage, spec.kernel.name, place, settings=settings, shape=shape)


def create_outputs(
    spec: RunSpec, store: FeatureStore, targets: Sequence[Target], spans: Sequence[Sequence[int]], scales: Scales
) -> None:
    """Create the artifacts of some targets, or open those that are there.

    Parameters
    ----------
    spec, store, targets
        The run, its store, and which targets.
    spans
        Blocks of every span, for what is summed of it and is not there yet.
    scales
        Of targets that are stored in float16 and are not there yet.

    Raises
    ------
    ContractError
        If one of this name was made with other settings.
    """
    train = store.open_set("train").info
    for target in targets:
        settings = output_settings(spec, store, target)
        queries = store.open_set(target.set_name).info.rows
        if spec.contribute.mode == "scores":
            shape = ScoreShape(queries=queries, rows=train.rows, gaps=train.gaps, block_rows=train.block_rows)
            ScoreMatrixArtifact.create(
                store.storage, score_name(target), target.set_name, settings=settings, shape=shape
            )
            continue
        if not is_kept(spec, target):
            continue
        rounding = stored_as(store, target) or QueryRounding.of(spec.contribute.dtype, scales.get(target), queries)
        if spec.contribute.mode == "tensor":
            _create_contributions(spec, store, target, settings, rounding)
        if wants_moments(spec, target):
            _create_moments(spec, store, target, (settings, spans), rounding)


Scales = Mapping[Target, np.ndarray]


def stored_as(store: FeatureStore, target: Target) -> QueryRounding | None:
    """How a target is stored already: C, or what was summed of it without C. None where there is neither."""
    contributions = ContributionArtifact.find_named(store.storage, target.kernel, target.set_name)
    if contributions is not None:
        return contributions.rounding
    moments = MomentsArtifact.find_named(store.storage, target.kernel, target.set_name)
    return None if moments is None else moments.rounding


def tiles_of(spec: RunSpec, store: FeatureStore, target: Target) -> tuple[int, int]:
    """(queries of a target, those that are worked on and written together)."""
    train, queries = store.open_set("train").info, store.open_set(target.set_name).info.rows
    if spec.contribute.mode == "scores":
        return queries, min(queries, SCORE_TILE)
    existing = ContributionArtifact.find_named(store.storage, target.kernel, target.set_name)
    if existing is not None:
        return queries, existing.shape.query_tile
    rounding = stored_as(store, target)
    dtype = spec.contribute.dtype if rounding is None else rounding.dtype
    return queries, query_tile((queries, train.rows, len(train.arrays)), train.block_rows, dtype)


def contribution_shape(
    spec: RunSpec, store: FeatureStore, target: Target, rounding: QueryRounding
) -> ContributionShape:
    """Shape of C of a target, whether it is stored or built."""
    train = store.open_set("train").info
    queries, tile = tiles_of(spec, store, target)
    return ContributionShape(
        queries=queries,
        rows=train.rows,
        gaps=train.gaps,
        groups=tuple(array.name for array in train.arrays),
        block_rows=train.block_rows,
        query_tile=tile,
        dtype=rounding.dtype,
    )


def passes_of(spec: RunSpec, store: FeatureStore, targets: Sequence[Target]) -> tuple[int, int]:
    """(Parts that queries of each stack are cut into, passes that all take over the features)."""
    train, members = store.open_set("train").info, spec.model.etas
    columns = 1 if spec.contribute.mode == "scores" else len(train.arrays)
    rows: dict[Stack, int] = defaultdict(int)
    held: dict[Stack, int] = defaultdict(int)
    for target in targets:
        stack, queries = target.stack, store.open_set(target.set_name).info.rows
        rows[stack] += queries
        for member in members:
            shape = QueryArtifact.open(store.storage, target.kernel, (target.set_name, member)).shape
            held[stack] += 4 * queries * (sum(shape.widths.values()) + columns * shape.coefficients)
    built = BUFFERS * 4 * max(rows.values()) * train.block_rows * columns
    return query_passes(max(held.values()), built, spec.cluster.worker_memory_bytes, len(rows))


def refuse_sums(spec: RunSpec, store: FeatureStore, targets: Sequence[Target]) -> None:
    """Refuse what is to be summed of all targets together, if a worker has no memory for it: a ResourceError."""
    queries = sum(store.open_set(target.set_name).info.rows for target in targets if wants_moments(spec, target))
    refuse_moments(queries, len(store.open_set("train").info.arrays), spec.cluster.worker_memory_bytes)


def new_spans(store: FeatureStore) -> list[Sequence[int]]:
    """Blocks of every span of what is not begun yet."""
    train = store.open_set("train").info
    return split(range(train.num_blocks), num_spans(train.num_blocks, train.rows, len(train.arrays)))


def spans_of(spec: RunSpec, store: FeatureStore, targets: Sequence[Target]) -> list[Sequence[int]]:
    """Blocks of every span of the targets of one stack: those that its sums were begun with, if they were."""
    for target in targets:
        if not wants_moments(spec, target):
            continue
        existing = MomentsArtifact.find_named(store.storage, target.kernel, target.set_name)
        if existing is not None:
            return [existing.shape.blocks_of(span) for span in range(existing.shape.num_spans)]
    return new_spans(store)


def _create_contributions(
    spec: RunSpec, store: FeatureStore, target: Target, settings: Mapping[str, Any], rounding: QueryRounding
) -> None:
    ContributionArtifact.create(
        store.storage,
        target.kernel,
        target.set_name,
        settings=settings,
        shape=contribution_shape(spec, store, target, rounding),
        scales=rounding.scales,
    )


def _create_moments(
    spec: RunSpec,
    store: FeatureStore,
    target: Target,
    made: tuple[Mapping[str, Any], Sequence[Sequence[int]]],
    rounding: QueryRounding,
) -> None:
    from gradstore.numerics.moments import kept_rows

    train, (settings, spans) = store.open_set("train").info, made
    longest = max(sum(stop - start for start, stop in map(train.block_range, span)) for span in spans)
    MomentsArtifact.create(
        store.storage,
        (target.kernel, target.set_name),
        settings=settings,
        recorded={"mode": spec.contribute.mode, "seed": spec.run.seed if spec.learn.seed is None else spec.learn.seed},
        shape=MomentsShape(
            queries=store.open_set(target.set_name).info.rows,
            groups=tuple(array.name for array in train.arrays),
            spans=span_edges(spans),
            candidates=min(kept_rows(max(spec.learn.ks)), longest),
            dtype=rounding.dtype,
        ),
        scales=rounding.scales,
    )
