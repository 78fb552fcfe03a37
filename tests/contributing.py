"""Stores of random features that contributions can be made of, and what they are then to be, by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, cast

import numpy as np
import pyarrow as pa

from gradstore.cluster import Engine, Task
from gradstore.spec import RunSpec
from gradstore.stages.contribute import contribute
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import ContributionArtifact, WeightsArtifact
from gradstore.store.dtypes import DtypeName
from gradstore.store.features import FeatureArray, FeaturePart, FeatureSet, FeatureStore, SetInfo
from tests import oracle
from tests.runs import InThisProcess
from tests.stores import inputs

GROUPS = {"a": (2, 3), "b": (4, 2), "c": (1, 2), "d": (3, 3)}
ROWS = {"train": 23, "learn": 5, "eval": 4}
KERNEL = {"kind": "block", "damping": 0.3, "mode": "relative"}
_NAMES = count()


def make_store(
    *,
    dtype: DtypeName = "float32",
    block_rows: int = 8,
    members: Sequence[str] = ("m0",),
    rows: Mapping[str, int] = ROWS,
    invalid: Sequence[int] = (),
    invalid_queries: Sequence[int] = (),
    groups: Mapping[str, Mapping[str, tuple[int, int]]] | None = None,
) -> FeatureStore:
    """Fill a store in memory with features from one generator for each row, so that blocks can be of any size.

    ``invalid`` are train rows whose features are NaN, ``invalid_queries`` rows of learn; ``groups`` are those of a set, where
    they are not GROUPS.
    """
    contract = {"model": {"adapter": "own", "output": "value", "source": "none"}, "projection": {"kind": "identity"}}
    run = {"run": {"name": "test", "seed": 0}}
    store = FeatureStore.create(f"memory://contributing-{next(_NAMES)}", contract=contract, run=run)
    for name, total in rows.items():
        shapes = (groups or {}).get(name, GROUPS)
        info = SetInfo(
            name=name,
            rows=total,
            block_rows=block_rows if name == "train" else total,
            dtype=dtype if name == "train" else "float32",
            arrays=tuple(
                FeatureArray(
                    name=group,
                    features=shape[0] * shape[1],
                    scale=1.0,
                    depth=0,
                    function="mlp",
                    parts=(FeaturePart(part=f"{group}.weight[0:8,0:8]", start=0, shape=shape),),
                )
                for group, shape in shapes.items()
            ),
            members=tuple(members),
            data_hash=f"{name} of {total}",
        )
        made = store.create_set(info, inputs(info))
        for member in members:
            fill(made.of_member(member), {"train": invalid, "learn": invalid_queries}.get(name, ()))
    return store


def fill(feature_set: FeatureSet, invalid: Sequence[int] = ()) -> None:
    """Write the blocks that are missing of a member of a set."""
    info = feature_set.info
    for block in feature_set.missing_blocks():
        rows = range(*info.block_range(block))
        features = {
            array.name: np.stack([draw(info.name, feature_set.member, array, row) for row in rows])
            for array in info.arrays
        }
        valid = [row not in invalid for row in rows]
        for values in features.values():
            values[~np.array(valid)] = np.nan
        norms = np.sqrt(sum(np.square(values.astype(np.float64)).sum(1) for values in features.values()))
        table = pa.table(
            {
                "row": pa.array(rows, pa.int64()),
                "example_id": [f"example {row}" for row in rows],
                "label": pa.array([None for _ in rows], pa.string()),
                "valid": valid,
                "p": pa.array([None for _ in rows], pa.float64()),
                "residual": pa.array([None for _ in rows], pa.float64()),
                "gradient_norm": pa.array(norms, pa.float64()),
            }
        )
        statistics = pa.table({"group": [array.name for array in info.arrays], "rows": [len(rows)] * len(info.arrays)})
        feature_set.write_block(block, features, examples=table, statistics=statistics, facts={})


def draw(set_name: str, member: str, array: FeatureArray, row: int) -> np.ndarray:
    """Features of one row of a group; groups differ in size by orders of magnitude."""
    seed = [*set_name.encode(), *member.encode(), *array.name.encode(), row]
    scale = 10.0 ** (len(array.parts[0].part) % 3 - ord(array.name[0]) % 3)
    return (scale * np.random.default_rng(seed).standard_normal(array.features)).astype(np.float32)


def make_spec(store: FeatureStore, **changes: Mapping[str, Any]) -> RunSpec:
    """Return the run of a store, with some tables changed."""
    tables: dict[str, Any] = {
        "run": {"name": "test", "store": store.storage.url},
        "model": {"source": "none"},
        "data": {name: {"source": f"{name}.txt"} for name in ROWS},
        "kernel": dict(KERNEL),
        "learn": {"k": 2, "epochs": 2},
        "cluster": {"workers": 1, "memory_per_worker": "4GiB", "device": "cpu"},
    }
    for table, values in changes.items():
        tables[table] = dict(values) if table == "kernel" else {**tables.get(table, {}), **values}
    return RunSpec.model_validate(tables)


def run(spec: RunSpec, engine: object | None = None) -> None:
    """Build the kernel and contribute, in this process."""
    build_kernel(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    contribute(spec, cast(Engine, engine or InThisProcess()), Progress(quiet=True))


def give_weights(store: FeatureStore, weights: Mapping[str, float], name: str = "given") -> None:
    """Put weights by group into a store, as if they had been learned; without any, as if learning had been stopped."""
    settings = {"kernel": "block", "queries": "learn", "learner": {}}
    artifact = WeightsArtifact.create(store.storage, name, settings=settings)
    if weights:
        table = pa.table({"group": [*weights], "weight": [*weights.values()]})
        artifact.write(table, pa.table({"step": pa.array([], pa.int64())}), facts={})


class Interrupted(Exception):
    """What an engine raises when it has had enough."""


class Interrupting:
    """An engine that dies before the first task of which it is told so."""

    def __init__(self, dies: Callable[[Task], bool]) -> None:
        self._dies = dies

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Run tasks in this process."""
        for task in tasks:
            if self._dies(task):
                raise Interrupted
            yield task, task.function(*task.arguments)


def stored_c(store: FeatureStore, set_name: str, kernel: str = "block") -> np.ndarray:
    """C as it is stored, [Q, N, M]."""
    artifact = ContributionArtifact.open(store.storage, kernel, set_name)
    return np.concatenate([*artifact.read_blocks(0, artifact.shape.queries)], axis=1)


def stored_features(store: FeatureStore, set_name: str, member: str | None = None) -> dict[str, np.ndarray]:
    """All features of a set by group."""
    feature_set = store.open_set(set_name, member)
    blocks = [feature_set.read_block(block) for block in range(feature_set.info.num_blocks)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def expected_c(store: FeatureStore, set_name: str, member: str | None = None, **kernel: Any) -> np.ndarray:
    """C by the oracle, of a kernel that acts inside a group; NaN in train rows that are not valid."""
    kernel = kernel or KERNEL
    train, queries = (stored_features(store, name, member) for name in ("train", set_name))
    valid = np.isfinite(train["a"]).all(1)
    kept = {group: rows[valid] for group, rows in train.items()}
    options = {"damping": 0.0, "mode": "absolute", **kernel}
    preconditioned = {group: oracle.precondition(kept[group], queries[group], **options) for group in kept}
    c = np.full((len(queries["a"]), len(valid), len(train)), np.nan)
    c[:, valid] = oracle.contributions(preconditioned, kept, [*kept])
    return c
