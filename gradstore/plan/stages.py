"""What every stage of a run writes, in how many tasks and objects, with how much memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gradstore.plan.contributions import (
    ContributePlan,
    building_plan,
    contribute_stage,
    matrix_sizes,
    plan_contribute,
)
from gradstore.plan.kernels import kernel_bytes, kernel_objects, kernel_tasks
from gradstore.plan.memory import TaskMemory
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.self_influence import influence_stage
from gradstore.plan.sizes import (
    ITEM_BYTES,
    SetPlan,
    StagePlan,
    Widths,
    block_tasks,
    row_scale_bytes,
    weightings,
)
from gradstore.spec import RunSpec

STORE_OBJECTS = 3  # gradstore.json, and zarr.json of the root and of features
COMPONENT_OBJECTS = 5  # artifact.json, and zarr.json of projections, of this one and of its two folders
TABLE_OBJECTS = 4  # artifact.json, commit record, and two tables or a table and a document
CHECKSUM_BYTES = 4


def stage_plans(
    spec: RunSpec,
    widths: Widths,
    sets: Mapping[str, SetPlan],
    memory: TaskMemory,
    *,
    spectra: bool,
    texts: bool,
) -> tuple[StagePlan, ...]:
    """Plan every stage, in the order of the path.

    Parameters
    ----------
    spec
        The run.
    widths
        Features of every group.
    sets
        Its feature sets.
    memory
        Memory of its tasks.
    spectra
        Whether its kernel needs the spectra of the train features.
    texts
        Whether eval queries have texts, by which BM25 ranks.
    """
    train = sets["train"]
    cut = plan_contribute(spec, widths, sets)
    influence = influence_stage(spec, widths, train, memory)
    return (
        _featurize(spec, widths, sets, memory),
        _kernel(spec, widths, train, memory),
        *([] if influence is None else [influence]),
        contribute_stage(spec, cut, train, task_memory_bytes=memory.contribute(train, cut, spectra=spectra)),
        *_later_stages(spec, cut, sets, memory, texts=texts),
    )


def _later_stages(
    spec: RunSpec, cut: ContributePlan, sets: Mapping[str, SetPlan], memory: TaskMemory, *, texts: bool
) -> Iterator[StagePlan]:
    """What follows contribute: weights are learned and rows ranked; scores alone are ranked as they are."""
    if spec.contribute.mode != "scores":
        yield _learn(spec, cut, sets, memory)
    yield _score(spec, cut, sets, memory, texts=texts)


def _featurize(spec: RunSpec, widths: Widths, sets: Mapping[str, SetPlan], memory: TaskMemory) -> StagePlan:
    """For every member one task hashes and probes it; then tasks of some blocks each compute and write them.

    Where principal components are needed, tasks of some parts each find those first.
    """
    members, stored, found = len(spec.model.etas), widths.stored, widths.components
    tasks = sum(len(block_tasks(range(planned.blocks), spec.cluster.num_workers)) for planned in sets.values())
    written = sum(_set_bytes(stored, planned) for planned in sets.values())
    return StagePlan(
        name="featurize",
        tasks=members * (1 + tasks) + (found.bundles if found else 0),
        # Of the pre-pass commit records, and array and chunk of two matrices of each part.
        objects=STORE_OBJECTS
        + sum(planned.objects for planned in sets.values())
        + (COMPONENT_OBJECTS + found.bundles + 4 * found.parts if found else 0),
        written_bytes=members * written + (found.matrix_bytes + 2 * CHECKSUM_BYTES * found.parts if found else 0),
        task_memory_bytes=memory.featurize([*sets.values()]),
    )


def _set_bytes(widths: Sequence[int], planned: SetPlan) -> int:
    """Bytes of the chunks of one member of a set, with those of its rows' scales."""
    scales = row_scale_bytes(planned.dtype, len(widths))
    a_row = sum(widths) * ITEM_BYTES[planned.dtype] + scales
    return planned.blocks * (planned.block_rows * a_row + CHECKSUM_BYTES * (len(widths) + (scales > 0)))


def _kernel(spec: RunSpec, widths: Widths, train: SetPlan, memory: TaskMemory) -> StagePlan:
    """For every kernel one task per bundle of groups; one more sums the covariances of all parts, where they are needed."""
    kernel, members = resolve_kernel(spec), len({spec.kernel.of_member(member) for member in spec.model.etas})
    if kernel.across_groups:
        from gradstore.plan.full import full_stage

        return full_stage(spec, widths, train, memory.kernel(train, kernel))
    return StagePlan(
        name="kernel",
        tasks=members * kernel_tasks(kernel.basis, widths),
        # zarr.json of kernels and of this one, beside those of its members.
        objects=members * kernel_objects(kernel.basis, widths) + (0 if kernel.basis is None else 2),
        written_bytes=members * kernel_bytes(kernel, widths),
        task_memory_bytes=memory.kernel(train, kernel),
    )


def _learn(spec: RunSpec, cut: ContributePlan, sets: Mapping[str, SetPlan], memory: TaskMemory) -> StagePlan:
    """No task: C is read in the process that runs the command, of one damping and one set of queries after another.

    Weights of every epoch, a row for every step, and where queries are held out one for every candidate.
    """
    learn, train, kernels = spec.learn, sets["train"], len(spec.sweep())
    learned, groups = [sets[name] for name, _ in spec.learn_targets()], cut.columns
    epochs, judged = learn.epochs if learn.solver == "algorithm_1" else 0, learn.share_held_out > 0
    steps = epochs * sum(queries.rows for queries in learned)
    candidates = len(learned) * learn.num_candidates * (8 * groups + 33) if judged else 0
    return StagePlan(
        name="learn",
        tasks=0,
        objects=kernels * len(learned) * (TABLE_OBJECTS + judged),
        written_bytes=kernels * (8 * groups * (epochs + 1) * len(learned) + 32 * steps + candidates),
        task_memory_bytes=0,
        client_memory_bytes=max(memory.learn(train, queries, _built(spec, cut, train, queries)) for queries in learned),
    )


def _built(spec: RunSpec, cut: ContributePlan, train: SetPlan, queries: SetPlan) -> ContributePlan | None:
    """How C is built by what reads it; None where it is kept."""
    return building_plan(spec, cut, train, queries.name) if spec.contribute.mode == "streamed" else None


def _score(
    spec: RunSpec, cut: ContributePlan, sets: Mapping[str, SetPlan], memory: TaskMemory, *, texts: bool
) -> StagePlan:
    """Ranks in the process that runs the command, under one damping after another; one tail-patch task per query of each.

    Rankings are unweighted and by weights that were learned or named, of every kernel; a random one, and where there are
    texts that of BM25. Of scores there are no parts. Score matrices are of the weightings alone.
    """
    train, queries, kernels = sets["train"], sets["eval"], len(spec.sweep())
    alone = spec.contribute.mode == "scores"
    methods = weightings(spec)
    tasks = min(spec.score.tail_patch.queries, queries.rows)
    made, taken, matrices = 0, 0, 0
    if spec.score.matrices and not alone:
        made, taken = matrix_sizes(train, queries.rows)
        matrices = memory.matrices(train, queries)
    parts = 0 if alone else cut.columns
    return StagePlan(
        name="score",
        tasks=kernels * tasks,
        # zarr.json of score-matrices stands beside those of every matrix.
        objects=(kernels * methods + 1 + texts) * TABLE_OBJECTS + kernels * methods * made + (made > 0),
        written_bytes=kernels * (memory.ranked_bytes(train, queries, parts) + methods * taken),
        task_memory_bytes=memory.patch(train) if tasks else 0,
        client_memory_bytes=max(memory.rank(train, queries, _built(spec, cut, train, queries), texts=texts), matrices),
    )
