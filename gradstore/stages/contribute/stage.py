"""contribute: features + spectra -> C[q, n, j], what the learner needs of it, or scores; of all sets and dampings at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gradstore.cluster import Engine, Task
from gradstore.plan.contributions import preconditioned_sets
from gradstore.plan.resolve import resolve_kernel
from gradstore.spec import RunSpec
from gradstore.stages.contribute.artifacts import (
    Place,
    create_outputs,
    create_queries,
    new_spans,
    passes_of,
    refuse_sums,
    spans_of,
    stored_as,
    targets_of,
    tiles_of,
)
from gradstore.stages.contribute.outputs import is_kept, score_name, wants_moments
from gradstore.stages.contribute.products import refuse_weights
from gradstore.stages.contribute.queries import Stack, Target, precondition, refuse_other_groups
from gradstore.stages.contribute.rows import prepare_rows
from gradstore.stages.contribute.scales import query_scales
from gradstore.stages.contribute.span import Work, contribute_span, slabs_of
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import ContributionArtifact, MomentsArtifact, ScoreMatrixArtifact, span_edges
from gradstore.store.features import FeatureStore

# What to lower where a worker has too little memory for a task.
_LOWER = ("data.learn.rows", "data.eval.rows", "features.block_rows")


def contribute(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write what [contribute] asks for, where the store does not hold it yet, for all dampings of a sweep in one pass.

    That is C of all queries and what the learner needs of it (``mode = "tensor"``), the latter alone
    (``"streamed"``, where C is built again by what reads it), or scores of the eval queries under given weights (``"scores"``).

    Raises
    ------
    NotReadyError
        If features, spectra or weights are missing.
    ContractError
        If something of this name was made with other settings, or from sets that have changed, or queries or weights have
        other groups.
    ResourceError
        If a worker has no memory for it.
    """
    store = FeatureStore.open(spec.run.store)
    targets = targets_of(spec)
    for name in preconditioned_sets(spec):
        refuse_other_groups(store, name)
    refuse_weights(store, spec, targets)
    prepare_rows(spec, engine, progress)
    before = _query_tasks(spec, store)
    refuse_sums(spec, store, targets)
    if any(_lacks_scales(spec, store, target) for target in targets):
        arguments = (spec.run.store, spec.model_dump(), targets, _cut(spec, store, targets))
        name = f"scales-{spec.kernel.name}"
        after = tuple(task.name for task in before)
        before.append(Task(name=name, function=create_scaled, arguments=arguments, rows=0, after=after, lower=_LOWER))
    else:
        create_outputs(spec, store, targets, new_spans(store), {})
        _tell_kept_dtypes(spec, store, targets, progress)
    alike = _alike(spec, store, targets)
    tasks = [task for together in alike for task in _span_tasks(spec, store, together, before)]
    total = len(alike) * store.open_set("train").info.num_examples
    done = total - sum(task.rows for task in tasks)
    label = f"contribute {spec.kernel.name}"
    with progress.stage(label, total, "rows", done, len(alike) * _feature_bytes(spec, store)) as advance:
        for task, _ in engine.run([*before, *tasks]):
            advance(task.rows)
    _remove_partials(spec, store)


def create_scaled(store_url: str, run: Mapping[str, Any], targets: Sequence[Target], cut: Work) -> int:
    """Task: find the scales of what is to be stored in float16, and create all artifacts; return how many were scaled.

    ``cut`` tells how queries are cut.
    """
    spec, store = RunSpec.model_validate(run), FeatureStore.open(store_url)
    unscaled = [target for target in targets if _lacks_scales(spec, store, target)]
    scales = query_scales(store, spec, slabs_of(targets, cut)) if unscaled else {}
    create_outputs(spec, store, targets, new_spans(store), scales)
    return len(unscaled)


def _query_tasks(spec: RunSpec, store: FeatureStore) -> list[Task]:
    """Create all preconditioned queries; one task for each (set, member) and damping that is missing."""
    kernel, lacking, tasks = resolve_kernel(spec), dict[Place, None](), []
    function: Callable[..., int] = precondition
    swept: tuple[str, ...] = ()
    if kernel.across_groups:
        from gradstore.stages.contribute import across

        function, swept = across.precondition, (spec.kernel.name,)
    for run in spec.sweep():
        for name in preconditioned_sets(spec):
            for member in store.open_set(name).info.members:
                if create_queries(run, store, (name, member)).is_complete():
                    continue
                lacking[name, member] = None
                arguments = (spec.run.store, run.model_dump(), (name, member), *swept)
                task = f"queries-{run.kernel.name}-{name}-{member}"
                tasks.append(Task(name=task, function=function, arguments=arguments, rows=0, lower=_LOWER))
    before = across.query_tasks(store, spec, [*lacking]) if kernel.across_groups else []
    return [*before, *(replace(task, after=tuple(first.name for first in before)) for task in tasks)]


def _remove_partials(spec: RunSpec, store: FeatureStore) -> None:
    """Remove what queries were made from on the way, if they were."""
    if resolve_kernel(spec).across_groups:
        from gradstore.stages.contribute import across

        names = preconditioned_sets(spec)
        across.remove_rotated(
            store, spec, [(name, member) for name in names for member in store.open_set(name).info.members]
        )


def _lacks_scales(spec: RunSpec, store: FeatureStore, target: Target) -> bool:
    if not is_kept(spec, target) or spec.contribute.dtype != "float16":
        return False
    return stored_as(store, target) is None


def _tell_kept_dtypes(spec: RunSpec, store: FeatureStore, targets: Sequence[Target], progress: Progress) -> None:
    for target in targets:
        kept = stored_as(store, target) if is_kept(spec, target) else None
        if kept is not None and kept.dtype != spec.contribute.dtype:
            name = f"contributions/{target.kernel}/{target.set_name}"
            progress.note(f"{name}: keeps dtype {kept.dtype} from its creation, not {spec.contribute.dtype}")


def _cut(spec: RunSpec, store: FeatureStore, targets: Sequence[Target]) -> Work:
    """How the queries of some targets are cut, of no blocks yet."""
    parts, passes = passes_of(spec, store, targets)
    tiles = tuple(tiles_of(spec, store, target) for target in targets)
    return Work(blocks=(), tiles=tiles, parts=parts, passes=passes)


def _alike(spec: RunSpec, store: FeatureStore, targets: Sequence[Target]) -> list[list[Target]]:
    """Targets of which something is missing, with all others of their stacks, that are built together: those of equal spans.

    Queries of a stack are multiplied together, and what goes on is to have the bits that it was begun with.
    """
    stacks: dict[Stack, list[Target]] = defaultdict(list)
    for target in targets:
        stacks[target.stack].append(target)
    found: dict[tuple[int, ...], list[Target]] = defaultdict(list)
    for of in stacks.values():
        if any(blocks or sums for blocks, sums in (_lacking(spec, store, target) for target in of)):
            found[span_edges(spans_of(spec, store, of))] += of
    return [*found.values()]


def _span_tasks(spec: RunSpec, store: FeatureStore, targets: Sequence[Target], before: Sequence[Task]) -> list[Task]:
    """One task for every span of which something is missing, of targets of equal spans."""
    info, cut = store.open_set("train").info, _cut(spec, store, targets)
    lacking = [_lacking(spec, store, target) for target in targets]
    after, tasks = tuple(task.name for task in before), []
    for number, span in enumerate(spans_of(spec, store, targets)):
        if not any(blocks & set(span) or number in sums for blocks, sums in lacking):
            continue
        work = replace(cut, blocks=tuple(span), span=number)
        task = Task(
            name=f"contribute-{targets[0].kernel}-{targets[0].set_name}-{span[0]:06d}",
            function=contribute_span,
            arguments=(spec.run.store, spec.model_dump(), targets, work),
            rows=sum(stop - start for start, stop in map(info.block_range, span)),
            after=after,
            lower=_LOWER,
        )
        tasks.append(replace(task, smaller=partial(_smaller, spec, task, work)))
    return tasks


def _smaller(spec: RunSpec, task: Task, work: Work) -> list[Task]:
    """What to run instead of a task that took its workers' lives: its blocks one by one, with their rows in halves.

    What is summed of them follows, from what was stored; where nothing is, all blocks stay in one task.
    """
    store_url, run, targets, _ = task.arguments
    halves = replace(work, row_parts=2 * work.row_parts)
    if spec.contribute.mode == "streamed":
        return [
            replace(
                task, name=f"{task.name}-halves", arguments=(store_url, run, targets, halves), smaller=None, after=()
            )
        ]
    info = FeatureStore.open(store_url).open_set("train").info
    tasks = []
    for block in work.blocks:
        start, stop = info.block_range(block)
        arguments = (store_url, run, targets, replace(halves, blocks=(block,), span=None))
        name = f"{task.name}-block-{block:06d}"
        tasks.append(replace(task, name=name, arguments=arguments, rows=stop - start, after=(), smaller=None))
    if any(wants_moments(spec, target) for target in targets):
        after = tuple(made.name for made in tasks)
        arguments = (store_url, run, targets, halves)
        tasks.append(replace(task, name=f"{task.name}-sums", arguments=arguments, rows=0, after=after, smaller=None))
    return tasks


def _lacking(spec: RunSpec, store: FeatureStore, target: Target) -> tuple[set[int], set[int]]:
    """Blocks and spans of a target that are missing."""
    every = set(range(store.open_set("train").info.num_blocks))
    if spec.contribute.mode == "scores":
        scores = ScoreMatrixArtifact.find_named(store.storage, score_name(target), target.set_name)
        return every if scores is None else set(scores.missing_units()), set()
    blocks, sums, names = set[int](), set[int](), (target.kernel, target.set_name)
    if spec.contribute.mode == "tensor":
        stored = ContributionArtifact.find_named(store.storage, *names)
        blocks = every if stored is None else set(stored.missing_blocks())
    if wants_moments(spec, target):
        moments = MomentsArtifact.find_named(store.storage, *names)
        sums = every if moments is None else set(moments.missing_units())
    return blocks, sums


def _feature_bytes(spec: RunSpec, store: FeatureStore) -> int:
    """Bytes of all features that are read."""
    info = store.open_set("train").info
    return info.row_bytes * info.num_examples * len(spec.model.etas)
