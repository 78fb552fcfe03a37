"""featurize: model + data -> features. One task writes and commits one block."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.cluster import Engine, Task
from gradstore.errors import DataError
from gradstore.groups import ParameterGroup
from gradstore.plan import Plan, make_plan
from gradstore.plan.resolve import make_adapter
from gradstore.plan.sizes import SetPlan
from gradstore.spec import RunSpec, content_hash
from gradstore.stages.loading import THREADS, load_first, load_for, weights_hash
from gradstore.stages.progress import Progress
from gradstore.store.backend import open_storage
from gradstore.store.examples import Example, data_hash, from_table, to_table
from gradstore.store.features import FeatureArray, FeatureSet, FeatureStore, SetInfo

if TYPE_CHECKING:
    import pyarrow as pa

    from gradstore.adapters import Adapter

# Examples whose features fix the scale of a float16 set before its first block is written.
PROBE_ROWS = 16


def featurize(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write the features of every split that the store does not hold yet.

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
    progress.note(f"reading {spec.data.train.source}")
    examples = adapter.examples()
    progress.note(examples.facts.describe())
    plan = make_plan(spec, {name: len(rows) for name, rows in examples.splits.items()})
    for note in plan.notes:
        progress.note(note)
    probe = list(examples.splits["train"][:PROBE_ROWS])
    progress.note(f"loading {spec.model.source} and hashing its weights")
    prepared = _prepare_on_a_worker(spec, engine, probe)
    store = FeatureStore.create(
        spec.run.store, contract=feature_contract(spec, plan, adapter, prepared), run=spec.model_dump()
    )
    for name, planned in plan.sets.items():
        rows = examples.splits[name]
        info = _set_info(spec, plan, planned, data_hash(rows), prepared)
        feature_set = store.create_set(info, _input_tables(rows, planned.block_rows))
        _note_what_stays(progress, info, feature_set.info)
        _write_missing_blocks(spec, engine, progress, feature_set)


def feature_contract(spec: RunSpec, plan: Plan, adapter: Adapter, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """What features must share to be compared: model, grouping, projection and output function (docs/format.md)."""
    return {
        "model": {"weights": prepared["weights"], "precision": prepared["precision"], **adapter.identity()},
        "groups": content_hash(
            [[group.name, group.out_features, group.in_features] for group in plan.partition.groups]
        ),
        "projection": {
            "kind": spec.features.projection["kind"],
            **asdict(plan.projection),  # type: ignore[call-overload]
            "seed": spec.run.seed,
        },
        "bias": False,
    }


def _note_what_stays(progress: Progress, asked: SetInfo, stored: SetInfo) -> None:
    """Tell of settings that a set keeps from its creation, because they do not change what its numbers mean."""
    kept = {
        "dtype": (asked.dtype, stored.dtype),
        "block_rows": (asked.block_rows, stored.block_rows),
        "token_budget": (asked.recorded["token_budget"], stored.recorded["token_budget"]),
    }
    for name, (wanted, found) in kept.items():
        if wanted != found:
            progress.note(f"features/{stored.name}: keeps {name} {found} from its creation, not {wanted}")


def _prepare_on_a_worker(spec: RunSpec, engine: Engine, probe: Sequence[Example]) -> dict[str, Any]:
    """Hash the model and probe the scale of its features where the model fits: on a worker.

    The probe's few thousand token ids are the one argument of a task that is more than names and numbers: the store that
    could hold them needs the scales first.
    """
    task = Task(name="prepare", function=prepare, arguments=(spec.model_dump(), list(probe)))
    (_, prepared), *_ = engine.run([task])
    return dict(prepared)


def prepare(run: Mapping[str, Any], probe: Sequence[Example]) -> dict[str, Any]:
    """Task: return the hash of the model's weights, the precision in use, and a scale per group.

    The scale is the power of two nearest to the root mean square of the group's features over the probe, so that stored
    values are near 1, the middle of float16's range.
    """
    spec = RunSpec.model_validate(run)
    loaded = load_first(spec)
    squares: dict[str, list[float]] = {}
    for batch in batches([example.size for example in probe], spec.features.token_budget):
        for name, rows in loaded.features([probe[index] for index in batch])[1].items():
            squares.setdefault(name, []).extend(np.square(rows, dtype=np.float64).mean(1).tolist())
    scales = {}
    for name, found in squares.items():
        mean_square = math.fsum(found) / len(found)
        usable = 0 < mean_square < math.inf
        scales[name] = 2.0 ** round(math.log2(mean_square) / 2) if usable else 1.0
    return {"weights": weights_hash(loaded.model), "precision": loaded.precision, "scales": scales}


def _set_info(spec: RunSpec, plan: Plan, planned: SetPlan, hash_of_data: str, prepared: Mapping[str, Any]) -> SetInfo:
    def array(group: ParameterGroup) -> FeatureArray:
        return FeatureArray(
            name=group.name,
            features=plan.projection.width(group),
            scale=prepared["scales"][group.name] if planned.dtype == "float16" else 1.0,
            depth=group.depth,
            function=group.function,
            out_features=group.out_features,
            in_features=group.in_features,
        )

    return SetInfo(
        name=planned.name,
        rows=planned.rows,
        block_rows=planned.block_rows,
        dtype=planned.dtype,
        arrays=tuple(array(group) for group in plan.partition.groups),
        data_hash=hash_of_data,
        recorded={"token_budget": spec.features.token_budget, "precision": prepared["precision"], "threads": THREADS},
    )


def _input_tables(examples: Sequence[Example], block_rows: int) -> Iterator[pa.Table]:
    for first in range(0, len(examples), block_rows):
        yield to_table(examples[first : first + block_rows], first)


def _write_missing_blocks(spec: RunSpec, engine: Engine, progress: Progress, feature_set: FeatureSet) -> None:
    info = feature_set.info
    missing = feature_set.missing_blocks()
    tasks = []
    for block in missing:
        start, stop = info.block_range(block)
        arguments = (spec.run.store, spec.model_dump(), info.name, block)
        name = f"featurize-{info.name}-{block:06d}"
        tasks.append(Task(name=name, function=featurize_block, arguments=arguments, rows=stop - start))
    done = info.rows - sum(task.rows for task in tasks)
    saturated = 0
    with progress.stage(f"featurize {info.name}", info.rows, "rows", done) as advance:
        for task, lost in engine.run(tasks):
            saturated += lost
            advance(task.rows)
    if saturated:
        progress.note(
            f"features/{info.name}: {saturated:,} values were too large for float16 and are stored as its largest"
        )


def featurize_block(store_url: str, run: Mapping[str, Any], set_name: str, block: int) -> int:
    """Task: compute and commit one block; return how many of its values float16 could not hold."""
    started = time.monotonic()
    store = FeatureStore.open(store_url)
    feature_set = store.open_set(set_name)
    examples = from_table(feature_set.read_inputs(block))
    loaded = load_for(store, RunSpec.model_validate(run))
    start, stop = feature_set.info.block_range(block)
    names = [array.name for array in feature_set.info.arrays]
    features = {array.name: np.empty((stop - start, array.features), np.float32) for array in feature_set.info.arrays}
    losses = np.empty(stop - start)
    for batch in batches([example.size for example in examples], int(feature_set.info.recorded["token_budget"])):
        losses[batch], rows = loaded.features([examples[index] for index in batch])
        for name in names:
            features[name][batch] = rows[name]
    _refuse_non_finite(examples, losses, features)
    record = feature_set.write_block(
        block,
        features,
        examples=_example_table(start, examples, losses, features),
        statistics=_statistics_table(features),
        facts={"seconds": time.monotonic() - started, **loaded.facts()},
    )
    return int(record.facts["saturated"])


def batches(sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut rows into batches of similar length with at most ``token_budget`` tokens, pads counted.

    They depend on the sizes of these rows alone, so a block is cut in the same way whoever computes it; a row longer than
    the budget is a batch of its own.
    """
    cut: list[list[int]] = []
    # Longest first: the first batch shows whether the budget fits the memory.
    for index in sorted(range(len(sizes)), key=lambda row: (-sizes[row], row)):
        if cut and (len(cut[-1]) + 1) * sizes[cut[-1][0]] <= token_budget:
            cut[-1].append(index)
        else:
            cut.append([index])
    return cut


def _refuse_non_finite(examples: Sequence[Example], losses: np.ndarray, features: Mapping[str, np.ndarray]) -> None:
    for row in np.flatnonzero(~np.isfinite(losses)).tolist():
        raise DataError(f"{examples[row].example_id}: its loss is {losses[row]}. Remove the example or mend the model.")
    for name, rows in features.items():
        for row in np.flatnonzero(~np.isfinite(rows).all(1)).tolist():
            raise DataError(
                f"{examples[row].example_id}: its gradient in group {name} is not finite. Remove the example, or set "
                f'model.precision = "float32".'
            )


def _example_table(
    start: int, examples: Sequence[Example], losses: np.ndarray, features: Mapping[str, np.ndarray]
) -> pa.Table:
    import pyarrow as pa

    norms_NM = np.stack([np.linalg.norm(rows.astype(np.float64), axis=1) for rows in features.values()], 1)
    return pa.table(
        {
            "row": pa.array(range(start, start + len(examples)), pa.int64()),
            "example_id": pa.array([example.example_id for example in examples], pa.string()),
            "source": pa.array([example.source for example in examples], pa.string()),
            "label": pa.array([example.label for example in examples], pa.string()),
            "content_hash": pa.array([example.content_hash for example in examples], pa.string()),
            "tokens": pa.array([example.size for example in examples], pa.int64()),
            "loss": pa.array(losses, pa.float64()),
            "gradient_norm": pa.array(np.sqrt(np.square(norms_NM).sum(1)), pa.float64()),
            "group_norms": pa.array(list(norms_NM.astype(np.float32)), pa.list_(pa.float32())),
            "valid": pa.array([True] * len(examples), pa.bool_()),
        }
    )


def _statistics_table(features: Mapping[str, np.ndarray]) -> pa.Table:
    import pyarrow as pa

    return pa.table(
        {
            "group": pa.array(list(features), pa.string()),
            "rows": pa.array([len(rows) for rows in features.values()], pa.int64()),
            "sum_squares": pa.array(
                [float(np.square(rows, dtype=np.float64).sum()) for rows in features.values()], pa.float64()
            ),
        }
    )
