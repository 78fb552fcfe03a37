"""The sketch stage: which sketches a run asks for, the tasks that make what is missing of them, and their recall."""

from __future__ import annotations

from gradstore.cluster import Engine, Task
from gradstore.errors import NotReadyError, SpecError
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.sizes import block_tasks, gigabytes
from gradstore.plan.sketch import refuse_large_sketch, sample_rows, sketch_bytes, sketch_rank
from gradstore.spec import RunSpec
from gradstore.stages.contribute.rows import prepare_rows, score_transform
from gradstore.stages.progress import Progress
from gradstore.stages.reading import full_width
from gradstore.stages.sketch.basis import build_basis
from gradstore.stages.sketch.recall import update_recall
from gradstore.stages.sketch.rows import sketch_blocks
from gradstore.stages.sketches import sketch_settings
from gradstore.stages.spectra import open_spectra
from gradstore.store.artifacts import QueryArtifact, SketchArtifact, SketchShape
from gradstore.store.features import FeatureStore

_LOWER = ("sketch.rank", "features.block_rows")


def sketch(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write the sketches that the store does not hold yet, one for each kernel of a sweep, and measure their recall.

    Recall is measured again where weights were learned since. How surely candidates are to hold the best rows is no setting
    of a sketch: it counts as the last call has it.

    Raises
    ------
    NotReadyError
        If features or spectra are missing, or the preconditioned learn queries, which recall is measured on.
    ContractError
        If a sketch of this name was made with other settings, or the kernel is stale.
    SpecError
        If the kernel or the output function has no sketch.
    ResourceError
        If a worker has no memory for it.
    """
    store = FeatureStore.open(spec.run.store)
    _refuse(spec, store)
    prepare_rows(spec, engine, progress)
    for run in spec.sweep():
        artifact = _create(run, store, progress)
        tasks = _tasks(run, store, artifact)
        total = artifact.shape.num_examples
        done = total - sum(task.rows for task in tasks)
        with progress.stage(f"sketch {run.kernel.name}", total if tasks else 0, "rows", done) as advance:
            for task, _ in engine.run(tasks):
                advance(task.rows)
        update_recall(run, store, artifact, progress)


def _refuse(spec: RunSpec, store: FeatureStore) -> None:
    if resolve_kernel(spec).across_groups:
        raise SpecError(
            f"kernel.kind: found {spec.kernel.kind!r}, of which there is no sketch: it mixes groups, so weights would be on the "
            "side of the rows. A sketch is of identity, diagonal, block and ekfac; `gradstore query` answers exactly without."
        )
    output = str(store.contract["model"].get("output"))
    if score_transform(output) != "none":
        raise SpecError(
            f"model.output: found {output!r}, of which there is no sketch: scores are squares, and the lowest are of rows that "
            "an estimate cannot tell apart. `gradstore query` answers exactly without."
        )
    for run in spec.sweep():
        for member in spec.model.etas:
            queries = QueryArtifact.find_named(store.storage, run.kernel.name, "learn", member)
            if queries is None or not queries.is_complete():
                raise NotReadyError(
                    f"{store.storage.url}/queries/{run.kernel.name}/learn/{member}: is missing or not whole; recall is measured "
                    "on these queries. Run `gradstore contribute` first."
                )


def _create(spec: RunSpec, store: FeatureStore, progress: Progress) -> SketchArtifact:
    info, members = store.open_set("train").info, tuple(spec.model.etas)
    if resolve_kernel(spec).needs_spectra:
        for member in members:
            open_spectra(store, spec, member)
    widths = {array.name: full_width(array) for array in info.arrays}
    features = len(members) * sum(widths.values())
    existing = SketchArtifact.find_named(store.storage, spec.kernel.name)
    if existing is not None and spec.sketch.rank == "auto":
        rank = existing.shape.rank
    else:
        rank = sketch_rank(spec, info, features)
    refuse_large_sketch(spec, rank, tuple(widths.values()), len(members), sample_rows(rank, info.num_examples))
    stored = info.num_examples * len(members) * info.row_bytes
    taken = sketch_bytes(rank, info.rows, features)
    progress.note(
        f"sketch {spec.kernel.name}: {rank} numbers a row, {gigabytes(taken)}, {taken / stored:.1%} of the features"
    )
    return SketchArtifact.create(
        store.storage,
        spec.kernel.name,
        settings=sketch_settings(spec, store),
        recorded={"seed": spec.run.seed},
        shape=SketchShape(
            rows=info.rows,
            block_rows=info.block_rows,
            gaps=info.gaps,
            rank=rank,
            members=members,
            widths=widths,
        ),
    )


def _tasks(spec: RunSpec, store: FeatureStore, artifact: SketchArtifact) -> list[Task]:
    """The basis, if it is missing, and then some blocks each."""
    info, arguments = store.open_set("train").info, (spec.run.store, spec.model_dump())
    tasks = []
    if 0 in artifact.missing_units():
        tasks.append(
            Task(
                name=f"sketch-basis-{spec.kernel.name}-0",
                function=build_basis,
                arguments=arguments,
                rows=0,
                lower=_LOWER,
            )
        )
    before = tuple(task.name for task in tasks)
    for blocks in block_tasks(artifact.missing_blocks(), spec.cluster.num_workers):
        tasks.append(
            Task(
                name=f"sketch-{spec.kernel.name}-{blocks[0]:06d}",
                function=sketch_blocks,
                arguments=(*arguments, list(blocks)),
                rows=sum(stop - start for start, stop in map(info.block_range, blocks)),
                after=before,
                lower=_LOWER,
            )
        )
    return tasks
