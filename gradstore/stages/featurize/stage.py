"""The stage: make the store and its sets, then have workers compute the blocks that are missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from gradstore.cluster import Engine, Task
from gradstore.errors import DataError, SpecError
from gradstore.groups import ParameterGroup
from gradstore.plan import Plan, make_plan
from gradstore.plan.resolve import make_adapter
from gradstore.plan.sizes import SetPlan, block_tasks
from gradstore.spec import ClusterSection, RunSpec, content_hash, differences
from gradstore.stages.featurize.append import extend_if_grown, input_tables
from gradstore.stages.featurize.block import featurize_blocks
from gradstore.stages.featurize.components import find_components
from gradstore.stages.featurize.prepare import prepare
from gradstore.stages.featurize.tables import statistics_of
from gradstore.stages.loading import THREADS
from gradstore.stages.progress import Progress
from gradstore.store.backend import open_storage
from gradstore.store.dtypes import DTYPES
from gradstore.store.examples import Example, data_hash
from gradstore.store.features import FeatureArray, FeaturePart, FeatureSet, FeatureStore, SetInfo, finish_erasure

if TYPE_CHECKING:
    from gradstore.numerics.projection import Projection

# What each member may have for itself beside its weights: the noised copies in which it sees an example.
OWN = ("copies",)
# Examples whose features fix the scale of a float16 set before its first block is written.
PROBE_ROWS = 16


def featurize(spec: RunSpec, engine: Engine, progress: Progress, *, append: bool = False) -> None:
    """Write the features of every split that the store does not hold yet.

    With ``append`` a split may have grown since: what it has beyond the stored examples is appended to its set.

    Raises
    ------
    SpecError, DataError, ResourceError
        Before any work starts, if the run or its data cannot be used as they are.
    ContractError
        If the store was made with another model, grouping or projection, or a set with other data.
    """
    # A store that cannot be reached is found now, not after the data is read and the model loaded.
    open_storage(spec.run.store).list_folders("")
    adapter = make_adapter(spec)
    identity = _identity(spec)
    progress.note(f"reading {spec.data.train.source}")
    examples = adapter.examples()
    progress.note(examples.facts.describe())
    plan = make_plan(spec, examples.splits)
    for note in plan.notes:
        progress.note(note)
    probe = list(examples.splits["train"][:PROBE_ROWS])
    progress.note(f"loading {spec.model.source} and hashing its weights")
    components = find_components(spec, plan, engine, progress, examples.splits["train"])
    prepared = _prepare_on_workers(spec, engine, probe)
    contract = feature_contract(spec, plan, identity, prepared)
    if components is not None:
        contract["projection"]["components"] = components
    store = FeatureStore.create(spec.run.store, contract=contract, run=spec.model_dump())
    for name, planned in plan.sets.items():
        rows = examples.splits[name]
        info = _set_info(plan, planned, data_hash(rows), prepared)
        extend_if_grown(store, name, rows, progress, append=append)
        feature_set = store.create_set(info, input_tables(rows, planned.block_rows))
        _note_what_stays(progress, info, feature_set.info)
        # An erasure that died is finished before blocks are computed that hold such rows no more.
        finish_erasure(feature_set, statistics_of)
        for member in feature_set.info.members:
            _write_missing_blocks(spec, engine, progress, feature_set.of_member(member))


def _identity(spec: RunSpec) -> dict[str, Any]:
    """What the adapter says of the run; its members may differ in their weights, and in OWN, which is told of each.

    Raises
    ------
    SpecError
        If they differ in anything else.
    """
    found = {member: make_adapter(spec, member).identity() for member in spec.model.etas}
    first, *others = found
    shared = {member: {key: value for key, value in said.items() if key not in OWN} for member, said in found.items()}
    for other in others:
        if differing := differences(shared[first], shared[other]):
            key, ours, theirs = differing[0]
            raise SpecError(
                f"model.members: {key} of {first} is {ours!r}, of {other} {theirs!r}. Members are checkpoints of one "
                "model: they may differ in their weights only."
            )
    own = [key for key in OWN if any(found[other].get(key) != found[first].get(key) for other in others)]
    return {**found[first], **{key: {member: said[key] for member, said in found.items()} for key in own}}


def feature_contract(
    spec: RunSpec, plan: Plan, identity: Mapping[str, Any], prepared: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What features must share to be compared: model, grouping, projection and output function (docs/format.md)."""
    first = next(iter(prepared.values()))
    return {
        "model": {"precision": first["precision"], **identity},
        "members": {member: found["identity"] for member, found in prepared.items()},
        "groups": content_hash([[group.name, [part.key for part in group.parts]] for group in plan.partition.groups]),
        "projection": {
            "kind": spec.features.projection["kind"],
            **asdict(plan.projection),  # type: ignore[call-overload]
            "seed": spec.run.seed,
        },
    }


def _note_what_stays(progress: Progress, asked: SetInfo, stored: SetInfo) -> None:
    """Tell of settings that a set keeps from its creation, because they do not change what its numbers mean."""
    kept = {
        "dtype": (asked.dtype, stored.dtype),
        "compression": (asked.compression, stored.compression),
        "block_rows": (asked.block_rows, stored.block_rows),
        "token_budget": (asked.recorded["token_budget"], stored.recorded["token_budget"]),
    }
    for name, (wanted, found) in kept.items():
        if wanted != found:
            progress.note(f"features/{stored.name}: keeps {name} {found} from its creation, not {wanted}")


def _prepare_on_workers(spec: RunSpec, engine: Engine, probe: Sequence[Example]) -> dict[str, Mapping[str, Any]]:
    """Hash every member of the model and probe the scale of its features where it fits: on a worker.

    The probe's few thousand token ids are the one argument of a task that is more than names and numbers: the store that
    could hold them needs the scales first.
    """
    run = spec.model_dump()
    tasks = [
        Task(
            name=f"prepare-{member}",
            function=prepare,
            arguments=(run, member, list(probe)),
            resources=spec.cluster.model_resources,
        )
        for member in spec.model.etas
    ]
    found = {task.arguments[1]: result for task, result in engine.run(tasks)}
    return {member: found[member] for member in spec.model.etas}


def _set_info(plan: Plan, planned: SetPlan, hash_of_data: str, prepared: Mapping[str, Mapping[str, Any]]) -> SetInfo:
    found = [*prepared.values()]
    scaled = DTYPES[planned.dtype].scaled == "array"

    def array(group: ParameterGroup) -> FeatureArray:
        return FeatureArray(
            name=group.name,
            features=plan.projection.width(group),
            # One for all members: checkpoints of one model have features of one size.
            scale=max(item["scales"][group.name] for item in found) if scaled else 1.0,
            depth=group.depth,
            function=group.function,
            parts=_parts(group, plan.projection),
        )

    return SetInfo(
        name=planned.name,
        rows=planned.rows,
        block_rows=planned.block_rows,
        dtype=planned.dtype,
        compression=planned.compression,
        arrays=tuple(array(group) for group in plan.partition.groups),
        data_hash=hash_of_data,
        members=tuple(prepared),
        recorded={
            "token_budget": min(item["token_budget"] for item in found),
            "precision": found[0]["precision"],
            "threads": THREADS,
        },
    )


def _parts(group: ParameterGroup, projection: Projection) -> tuple[FeaturePart, ...]:
    """The matrices that a group's features are made of, side by side."""
    from gradstore.numerics.projection import Finishing

    found: list[FeaturePart] = []
    start = 0
    for part in group.parts:
        shape = projection.shape(part)
        if shape is None:
            return ()
        factors = projection.factors_of(part) if isinstance(projection, Finishing) else None
        found.append(FeaturePart(part=part.key, start=start, shape=shape, factors=factors))
        start += found[-1].features
    return tuple(found)


def _write_missing_blocks(spec: RunSpec, engine: Engine, progress: Progress, feature_set: FeatureSet) -> None:
    info = feature_set.info
    missing = feature_set.missing_blocks()
    label = info.name if len(info.members) == 1 else f"{info.name} {feature_set.member}"
    run = spec.model_dump()
    tasks = [_task(run, feature_set, label, blocks) for blocks in block_tasks(missing, spec.cluster.num_workers)]
    done = info.num_examples - sum(task.rows for task in tasks)
    size = info.num_examples * info.row_bytes
    saturated = 0
    with progress.stage(f"featurize {label}", info.num_examples, "rows", done, size) as advance:
        for task, lost in engine.run(tasks):
            saturated += lost["saturated"]
            advance(task.rows)
    if saturated:
        progress.note(
            f"features/{info.name}: {saturated:,} values were too large for {info.dtype} and are stored as its largest"
        )
    _count_invalid_rows(spec, progress, feature_set)


def _task(run: Mapping[str, Any], feature_set: FeatureSet, label: str, blocks: Sequence[int]) -> Task:
    """The task of some blocks; if it takes the lives of its workers, one task of each block.

    Alone, a block is not written while another is computed: one of them is in memory instead of two. Its batches stay as
    they are: smaller ones would give other last bits, and equal token budgets promise equal bits.
    """
    info = feature_set.info
    alone = len(blocks) == 1
    prefix = f"featurize-{label.replace(' ', '-')}"
    return Task(
        name=f"{prefix}-block-{blocks[0]:06d}" if alone else f"{prefix}-{blocks[0]:06d}",
        function=featurize_blocks,
        arguments=(run["run"]["store"], run, (info.name, feature_set.member), list(blocks)),
        rows=sum(stop - start for start, stop in map(info.block_range, blocks)),
        smaller=None if alone else lambda: [_task(run, feature_set, label, [block]) for block in blocks],
        # Both are those of the set, from its creation on.
        lower=("features.token_budget or features.block_rows (of another run.store)",),
        resources=ClusterSection.model_validate(run["cluster"]).model_resources,
    )


def _count_invalid_rows(spec: RunSpec, progress: Progress, feature_set: FeatureSet) -> None:
    """Tell how many rows are not valid; refuse to go on with more than features.max_invalid.

    Raises
    ------
    DataError
        If there are more.
    """
    info = feature_set.info
    invalid = feature_set.invalid_blocks()
    if not invalid:
        return
    rows: dict[str, int] = {}
    for block in invalid:
        table = feature_set.read_examples(["example_id", "valid"], block=block).to_pydict()
        pairs = zip(table["example_id"], table["valid"], strict=True)
        rows |= {name: block for name, valid in pairs if name is not None and not valid}
    if not rows:
        return
    progress.count("invalid_rows", len(rows))
    told = f"features/{info.name}: {len(rows):,} of {info.num_examples:,} rows are not finite: {', '.join([*rows][:3])}"
    if len(rows) > spec.features.max_invalid * info.num_examples:
        raise DataError(
            f"{told}. features.max_invalid allows {spec.features.max_invalid:.2%}. Raise it to go on without them, or "
            'mend the data or the model (model.precision = "float32"?) and choose another run.store.'
        )
    progress.note(f"{told}; they take no part in kernels, scores and weights")
