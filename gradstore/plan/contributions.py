"""The contribute stage of a plan: what it writes in which mode, and what its tasks hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from gradstore.plan.contribute import (
    BUFFERS,
    GROUPS_AT_ONCE,
    SCORE_TILE,
    moments_bytes,
    num_spans,
    query_passes,
    refuse_moments,
    tile_rows,
)
from gradstore.plan.full import full_options, full_sizes, route_of
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.routes import Route, route_memory
from gradstore.plan.sizes import (
    BLOCKS_PER_WORKER,
    ITEM_BYTES,
    SetPlan,
    StagePlan,
    Widths,
    gigabytes,
    query_tile,
    split,
)
from gradstore.spec import SPLITS, RunSpec
from gradstore.store.artifacts import MomentsShape, QueryShape, span_edges

# Coefficients of a kernel across groups that are made at once, in float64.
COEFFICIENT_TILE_BYTES: Final = 256 * 2**20
_CHECKSUM_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributePlan:
    """What contribute is to do.

    Attributes
    ----------
    queries
        What is kept of the queries of every set.
    stacks
        What is built at once, (set, queries written together) of each: queries of a stack are multiplied together. Every
        kernel and choice of weights has one of learn and eval, and one of each aspect.
    columns
        Groups of C; 1 of scores.
    parts
        Parts that the queries of each stack are cut into.
    passes
        Passes over the features, each for some of these parts.
    moments
        What is summed for the learner under each damping, by set; of none if nothing is.
    route
        The route of a kernel across groups; None of any other.
    """

    queries: Mapping[str, QueryShape]
    stacks: Sequence[Sequence[tuple[str, int]]]
    columns: int
    parts: int
    passes: int
    moments: Mapping[str, MomentsShape]
    route: Route | None

    @property
    def targets(self) -> Sequence[tuple[str, int]]:
        """(set, queries written together) of all stacks."""
        return [target for stack in self.stacks for target in stack]

    @property
    def rows(self) -> int:
        """Queries of all targets."""
        return sum(self.queries[name].queries for name, _ in self.targets)

    @property
    def part_rows(self) -> int:
        """Most queries of one part, which are multiplied together: whole tiles."""
        return max(self._part_rows(stack) for stack in self.stacks)

    @property
    def pass_rows(self) -> int:
        """Most queries of one pass: some parts of them."""
        return min(self.rows, math.ceil(len(self.stacks) * self.parts / self.passes) * self.part_rows)

    def query_bytes(self, members: int) -> int:
        """Bytes that the queries of all targets take in a task."""
        return members * sum(_held_bytes(self.queries[name], self.columns) for name, _ in self.targets)

    def _part_rows(self, stack: Sequence[tuple[str, int]]) -> int:
        queries = [self.queries[name].queries for name, _ in stack]
        tiles = sum(math.ceil(count / tile) for count, (_, tile) in zip(queries, stack, strict=True))
        return min(math.ceil(tiles / self.parts) * max(tile for _, tile in stack), sum(queries))


def plan_contribute(spec: RunSpec, widths: Widths, sets: Mapping[str, SetPlan]) -> ContributePlan:
    """Cut the work of contribute.

    Raises
    ------
    ResourceError
        If a worker has no memory for what is summed for the learner.
    """
    mode, train, groups = spec.contribute.mode, sets["train"], len(widths.full)
    names = contributed_sets(spec)
    weights = len({None, spec.contribute.weights}) if mode == "scores" else 1
    queries = {name: _query_shape(spec, widths, sets[name].rows, train.rows) for name in preconditioned_sets(spec)}
    dampings, memory = len(spec.sweep()), spec.cluster.worker_memory_bytes
    tiles = {
        name: min(shape.queries, SCORE_TILE)
        if mode == "scores"
        else query_tile((shape.queries, train.rows, groups), train.block_rows, spec.contribute.dtype)
        for name, shape in queries.items()
        if name in names
    }
    alike = [[(name, tiles[name]) for name in of] for _, of in groupby(names, key=stack_of)]
    columns, members = 1 if mode == "scores" else groups, len(spec.model.etas)
    rows = max(sum(queries[name].queries for name, _ in stack) for stack in alike)
    built = BUFFERS * 4 * rows * train.block_rows * columns
    held = members * max(sum(_held_bytes(queries[name], columns) for name, _ in stack) for stack in alike)
    stacks = alike * (dampings * weights)
    parts, passes = query_passes(held, built, memory, len(stacks))
    return ContributePlan(
        queries=queries,
        stacks=stacks,
        columns=columns,
        parts=parts,
        passes=passes,
        moments=_moments(spec, sets, groups) if mode != "scores" and spec.contribute.second_moments else {},
        route=route_of(spec, (train.rows, sum(widths.full)))[0] if resolve_kernel(spec).across_groups else None,
    )


def building_plan(spec: RunSpec, cut: ContributePlan, train: SetPlan, name: str) -> ContributePlan:
    """How C of one set is built in the process that reads it, where C is not kept: every part in a pass of its own.

    Parts of what `contribute` sums are those that it has, so that products have the same bits.
    """
    shape, groups = cut.queries[name], cut.columns
    own = [stack for stack in cut.stacks if stack[0][0] == name]
    if own:
        parts = cut.parts
    else:
        own = [[(name, query_tile((shape.queries, train.rows, groups), train.block_rows, spec.contribute.dtype))]]
        held = len(spec.model.etas) * _held_bytes(shape, groups)
        built = BUFFERS * 4 * shape.queries * train.block_rows * groups
        parts, _ = query_passes(held, built, spec.cluster.worker_memory_bytes, 1)
    return replace(cut, stacks=own[:1], parts=parts, passes=parts, moments={})


def contributed_sets(spec: RunSpec) -> tuple[str, ...]:
    """The sets that contributions or scores are made of, in order."""
    of_mode = {"tensor": spec.data.query_sets(), "streamed": spec.data.learn_sets(), "scores": ("eval",)}
    return of_mode[spec.contribute.mode]


def preconditioned_sets(spec: RunSpec) -> tuple[str, ...]:
    """The sets whose queries are preconditioned, in order: where C is not kept, `score` builds it of the eval queries."""
    return ("eval",) if spec.contribute.mode == "scores" else spec.data.query_sets()


def stack_of(set_name: str) -> str:
    """What names the queries that those of a set are multiplied together with: learn and eval; of an aspect its own alone.

    So what is built of the others has the same bits whatever aspects there are.
    """
    return "" if set_name in SPLITS else set_name


def contribute_stage(spec: RunSpec, cut: ContributePlan, train: SetPlan, *, task_memory_bytes: int) -> StagePlan:
    """Plan the stage: one task per query set, member and damping, then one per span of blocks; in float16 one finds scales."""
    members, dampings, mode = len(spec.model.etas), len(spec.sweep()), spec.contribute.mode
    half = spec.contribute.dtype == "float16" and (mode == "tensor" or bool(cut.moments))
    objects, written = 1 + dampings, 0  # zarr.json of queries, and of every kernel in it
    for shape in cut.queries.values():
        made, taken = _query_objects(shape)
        objects += dampings * (1 + members * made)
        written += dampings * members * taken
    groups = len(next(iter(cut.queries.values())).groups)
    if mode == "scores":
        objects += 1  # zarr.json of score-matrices
        for name, _ in cut.targets:
            made, taken = matrix_sizes(train, cut.queries[name].queries)
            objects, written = objects + made, written + taken
    if mode == "tensor":
        objects += 1 + dampings
        for name, tile in cut.targets:
            queries, num_tiles = cut.queries[name].queries, math.ceil(cut.queries[name].queries / tile)
            # artifact.json, zarr.json of the set, of its folder and of C; the array of scales and its chunk.
            objects += 4 + train.blocks * (1 + num_tiles) + (2 if half else 0)
            chunk = tile * train.block_rows * groups * ITEM_BYTES[spec.contribute.dtype] + _CHECKSUM_BYTES
            written += train.blocks * num_tiles * chunk + (4 * queries + _CHECKSUM_BYTES if half else 0)
    spans = _spans(spec, cut, train)
    # zarr.json of moments, and of every kernel in it.
    objects += 1 + dampings if cut.moments else 0
    for moments in cut.moments.values():
        made, taken = _moments_objects(moments)
        objects += dampings * (made + (2 if half else 0))
        written += dampings * (taken + (4 * moments.queries + _CHECKSUM_BYTES if half else 0))
    return StagePlan(
        name="contribute",
        tasks=_query_tasks(spec, cut, groups) + half + spans,
        objects=objects,
        written_bytes=written,
        task_memory_bytes=task_memory_bytes,
    )


def matrix_sizes(train: SetPlan, queries: int) -> tuple[int, int]:
    """(Objects, bytes of chunks) of one score matrix: of every block a chunk of all queries, and its record."""
    # zarr.json of its kernel and weights, of its set, its folder and s, and artifact.json.
    return 5 + 2 * train.blocks, train.blocks * (4 * queries * train.block_rows + _CHECKSUM_BYTES)


def contribute_notes(cut: ContributePlan) -> list[str]:
    """What a reader is told of the passes over the features."""
    if cut.passes == 1:
        return []
    held = "queries of all sets, dampings and members, or C of blocks for them,"
    return [
        f"contribute reads the train features {cut.passes} times: {held} take more than a quarter of a worker's memory"
    ]


def building_notes(spec: RunSpec, cut: ContributePlan, train: SetPlan) -> list[str]:
    """What a reader is told of the passes over the features in place of reads of C that is not kept."""
    if spec.contribute.mode != "streamed":
        return []
    sets = (*spec.data.learn_sets(), "eval")
    passes = ", ".join(f"{building_plan(spec, cut, train, name).passes} for {name}" for name in sets)
    return [
        f"learn and score build C of the train features, {gigabytes(train.feature_bytes)}, in the process that runs the command; "
        f"passes over them in place of each read of C: {passes}"
    ]


def span_bytes(spec: RunSpec, cut: ContributePlan, widths: Widths, train: SetPlan) -> int:
    """Memory of a span's task beside its process and the features that it reads.

    Queries of one pass, and those of one set and group as they are read; C of two blocks, one of them as it is stored too;
    products of a tile; what is summed for the learner, and matrices of a tile's rank-c factors.
    """
    members, groups, item = len(spec.model.etas), len(widths.full), ITEM_BYTES[spec.contribute.dtype]
    share = cut.pass_rows / cut.rows
    across = resolve_kernel(spec).across_groups
    # Coefficients are cut by groups while they are still whole.
    queries = (2 if across else 1) * math.ceil(share * cut.query_bytes(members))
    queries += 4 * max(shape.queries for shape in cut.queries.values()) * max(widths.full)
    largest = min(cut.pass_rows, max(shape.queries for shape in cut.queries.values()))
    built = BUFFERS * 4 * cut.pass_rows * train.block_rows * cut.columns
    stored = largest * train.block_rows * cut.columns * item
    tile = tile_rows(cut.part_rows, cut.columns)
    at_once = cut.columns if across else min(cut.columns, GROUPS_AT_ONCE)
    portion = 4 * cut.part_rows * at_once * tile
    expanded = 4 * min(groups, GROUPS_AT_ONCE) * tile * max(widths.full) if widths.full != widths.stored else 0
    summed = 4 * groups**2 if cut.moments else 0
    for moments in cut.moments.values():
        kept = 4 * moments.queries * moments.candidates * groups
        summed += len(spec.sweep()) * (moments_bytes(moments.queries, groups) + 2 * kept)
    return queries + built + stored + portion + expanded + summed


def coefficient_bytes(spec: RunSpec, cut: ContributePlan, widths: Widths, train: SetPlan) -> int:
    """Memory of making the coefficients of one query set under a kernel across groups, beside a task's process.

    Features of all queries, as they are read, side by side and as they are kept; coefficients, and some of them in float64,
    four times over; of a primal kernel its matrix. Of a dual one, tasks before rotate the queries of a bundle of groups.
    """
    queries, groups = max(shape.queries for shape in cut.queries.values()), len(widths.full)
    features, size = sum(widths.full), max(shape.coefficients for shape in cut.queries.values())
    rows = max(queries, spec.features.block_rows or 0)
    made = 4 * features * (rows + 2 * queries) + 4 * queries * groups * size
    made += 4 * 8 * groups * size * min(queries, max(1, COEFFICIENT_TILE_BYTES // (8 * groups * size)))
    made += route_memory("primal", train.rows, features, 0) if cut.route == "primal" else 0
    if cut.route != "dual":
        return made
    bundle = math.ceil(groups / rotation_bundles(groups, (queries, size), spec.cluster.num_workers))
    of_bundle = bundle * (max(widths.full) * (4 * rows + 8 * queries + 8 * train.block_rows) + 8 * queries * size)
    return max(made, of_bundle + 8 * queries * size + 3 * 8 * train.block_rows * size)


def _query_shape(spec: RunSpec, widths: Widths, queries: int, rows: int) -> QueryShape:
    kernel, groups = resolve_kernel(spec), tuple(str(number) for number in range(len(widths.full)))
    kept = widths.full if kernel.needs_spectra else widths.stored
    coefficients = 0
    if kernel.across_groups:
        route, _ = route_of(spec, (rows, sum(widths.full)))
        _, coefficients = full_sizes(full_options(spec), route, (rows, sum(widths.full)))
        kept = widths.full if route == "low_rank" else ()
    of_groups = dict(zip(groups, kept, strict=False))
    return QueryShape(queries=queries, groups=groups, widths=of_groups, coefficients=coefficients)


def _held_bytes(shape: QueryShape, columns: int) -> int:
    return 4 * shape.queries * (sum(shape.widths.values()) + columns * shape.coefficients)


def _query_objects(shape: QueryShape) -> tuple[int, int]:
    """(Objects, bytes of arrays) of the queries of one set, member and damping."""
    groups, tiles = len(shape.groups), math.ceil(shape.queries / shape.coefficient_tile)
    # artifact.json, commit record, zarr.json of the member and of values; tau(q, q) and its chunk.
    objects, written = 6, 8 * shape.queries * groups + _CHECKSUM_BYTES
    if shape.widths:
        objects += 1 + 2 * len(shape.widths)
        written += 4 * shape.queries * sum(shape.widths.values()) + _CHECKSUM_BYTES * len(shape.widths)
    if shape.coefficients:
        objects += 1 + tiles
        chunk = 4 * shape.coefficient_tile * groups * shape.coefficients
        written += tiles * (chunk + _CHECKSUM_BYTES)
    return objects, written


def _moments(spec: RunSpec, sets: Mapping[str, SetPlan], groups: int) -> dict[str, MomentsShape]:
    from gradstore.numerics.moments import kept_rows

    train, queries = sets["train"], {name: sets[name].rows for name in spec.data.learn_sets()}
    refuse_moments(sum(queries.values()) * len(spec.sweep()), groups, spec.cluster.worker_memory_bytes)
    spans = split(range(train.blocks), num_spans(train.blocks, train.rows, groups))
    longest = max(min((span[-1] + 1) * train.block_rows, train.rows) - span[0] * train.block_rows for span in spans)
    return {
        name: MomentsShape(
            queries=count,
            groups=tuple(str(number) for number in range(groups)),
            spans=span_edges(spans),
            candidates=min(kept_rows(max(spec.learn.ks)), longest),
            dtype=spec.contribute.dtype,
        )
        for name, count in queries.items()
    }


def _moments_objects(shape: MomentsShape) -> tuple[int, int]:
    """(Objects, bytes of arrays) of what is summed under one damping, without scales."""
    # artifact.json, zarr.json of the set and of values, and records; arrays and their chunks.
    objects, written = 3 + shape.num_spans, 0
    for layout in shape.layouts().values():
        chunks = math.prod(layout.num_chunks)
        objects += 1 + chunks
        written += chunks * layout.chunk_bytes
    return objects, written


def rotation_bundles(groups: int, sizes: tuple[int, int], workers: int) -> int:
    """Bundles of groups that tasks of a dual kernel rotate queries in; ``sizes`` are those of a group's result, in float64."""
    return min(
        groups, max(BLOCKS_PER_WORKER * workers, math.ceil(8 * math.prod(sizes) * groups / COEFFICIENT_TILE_BYTES))
    )


def _query_tasks(spec: RunSpec, cut: ContributePlan, groups: int) -> int:
    """One task for every query set, member and damping; before them, of a dual kernel, passes that all dampings share."""
    members, workers = len(spec.model.etas), spec.cluster.num_workers
    sizes = [(shape.queries, shape.coefficients) for shape in cut.queries.values()] if cut.route == "dual" else []
    shared = members * sum(rotation_bundles(groups, of, workers) for of in sizes)
    return shared + len(cut.queries) * members * len(spec.sweep())


def _spans(spec: RunSpec, cut: ContributePlan, train: SetPlan) -> int:
    if cut.moments:
        return next(iter(cut.moments.values())).num_spans
    return num_spans(train.blocks, train.rows, len(next(iter(cut.queries.values())).groups))
