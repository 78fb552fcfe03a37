"""Stores in memory with features that a kernel across groups can be built from, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, cast

import numpy as np

from gradstore.cluster import Engine, Task
from gradstore.spec import RunSpec
from gradstore.stages.contribute import across
from gradstore.stages.contribute.queries import Slab, Target
from gradstore.stages.full_kernel import built, kernel_settings
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import (
    QueryArtifact,
)
from gradstore.store.features import FeatureSet, FeatureStore, SetInfo
from tests import oracle, stores
from tests.runs import InThisProcess

GROUPS = {"layers.0.mlp": 6, "layers.1.mlp": 4, "head/μ": 2}
CONTRACT = {"model": {"hash": "abc", "source": "tiny", "output": "cross_entropy"}}
ROUTES = ("primal", "dual", "low_rank")
DAMPING = 0.2
_NAMES = count()


def make_store(
    *, rows: int = 30, block_rows: int = 8, members: tuple[str, ...] = ("m0",), invalid: Sequence[int] = ()
) -> str:
    """A store in memory of a train, a learn and an eval set, of which some train rows are not valid; return its URL."""
    url = f"memory://full-kernel-{next(_NAMES)}"
    store = FeatureStore.create(url, contract=CONTRACT, run=stores.RUN)
    for name, length in (("train", rows), ("learn", 4), ("eval", 5)):
        info = replace(stores.set_info(name, rows=length, block_rows=block_rows, groups=GROUPS), members=members)
        made = store.create_set(info, stores.inputs(info))
        for member in members:
            for block in range(info.num_blocks):
                lost = [row for row in invalid if name == "train" and row // block_rows == block]
                write_block(made.of_member(member), block, lost)
    return url


def write_block(feature_set: FeatureSet, block: int, invalid: Sequence[int] = ()) -> None:
    """Write a block of a member, with NaN in rows that are not valid."""
    info = feature_set.info
    start, stop = info.block_range(block)
    features = {group: features_of(info, feature_set.member, group)[start:stop] for group in GROUPS}
    examples = stores.examples(info, block)
    if invalid:
        for rows in features.values():
            rows[[row - start for row in invalid]] = np.nan
        valid = [row not in invalid for row in range(start, stop)]
        examples = examples.set_column(examples.column_names.index("valid"), "valid", [valid])
    feature_set.write_block(block, features, examples=examples, statistics=stores.statistics(info, block), facts={})


def features_of(info: SetInfo, member: str, group: str) -> np.ndarray:
    """Features of all rows, whatever the blocks; those of some groups are much smaller than those of others."""
    seed = [*f"{info.name} {member} {group}".encode()]
    scale = np.float32(0.1 ** [*GROUPS].index(group))
    return scale * np.random.default_rng(seed).standard_normal((info.rows, GROUPS[group]), dtype=np.float32)


def make_spec(url: str, *, workers: int = 2, memory: str = "4GiB", members: str = "each", **options: Any) -> RunSpec:
    names = FeatureStore.open(url).open_set("train").info.members
    several = [{"name": name, "eta": 1.0, "weights": name} for name in names] if len(names) > 1 else []
    return RunSpec.model_validate(
        {
            "run": {"name": "full", "store": url, "seed": 3},
            "model": {"source": "nowhere", "members": several},
            "data": {"source": "nowhere", "train": {"rows": 30}, "learn": {"rows": 4}, "eval": {"rows": 5}},
            "kernel": {"kind": "full", "members": members, "damping": DAMPING, **options},
            "cluster": {"workers": workers, "memory_per_worker": memory},
        }
    )


class Counting:
    """An engine without a cluster that counts tasks and stops before the nth."""

    def __init__(self, stop_before: int | None = None) -> None:
        self.done: list[str] = []
        self._stop_before = stop_before

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        for task in tasks:
            if len(self.done) == self._stop_before:
                raise KeyboardInterrupt
            self.done.append(task.name)
            yield task, task.function(*task.arguments)


class StopsBefore:
    """An engine without a cluster that stops before the first task of a name that begins so."""

    def __init__(self, name: str) -> None:
        self._name = name

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        for task in tasks:
            if task.name.startswith(self._name):
                raise KeyboardInterrupt
            yield task, task.function(*task.arguments)


class Beside:
    """An engine without a cluster that has another run go by after its first task."""

    def __init__(self, other: Callable[[], None]) -> None:
        self._other = other

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        for number, task in enumerate(tasks):
            if number == 1:
                self._other()
            yield task, task.function(*task.arguments)


def build(spec: RunSpec, engine: Any = None) -> None:
    build_kernel(spec, cast(Engine, engine or InThisProcess()), Progress(quiet=True))


def make_queries(spec: RunSpec, member: str = "m0", *, sweep: RunSpec | None = None) -> QueryArtifact:
    """Queries under a kernel: of a ``sweep``, for all of which what they come from is kept."""
    store, place = FeatureStore.open(spec.run.store), ("eval", member)
    artifact = QueryArtifact.create(
        store.storage,
        spec.kernel.name,
        place,
        settings={
            "kernel": kernel_settings(store, spec),
            "kernel_of": spec.kernel.members,
            "built": built(store, spec, [member]),
        },
        shape=across.query_shape(store, spec, place),
    )
    for task in across.query_tasks(store, sweep or spec, [place]):
        task.function(*task.arguments)
    across.precondition(spec.run.store, spec.model_dump(), place, (sweep or spec).kernel.name)
    if sweep is None:
        across.remove_rotated(store, spec, [place])
    return artifact


def contributions(spec: RunSpec, member: str = "m0") -> np.ndarray:
    """C of a member, as a span builds it."""
    store = FeatureStore.open(spec.run.store)
    train = store.open_set("train", member)
    queries = make_queries(spec, member).shape.queries
    slab = Slab(target=Target(kernel=spec.kernel.name, set_name="eval"), first=0, last=queries)
    [product] = across.make_products(store, spec, member, [[slab]])
    c = np.zeros((train.info.rows, len(GROUPS), queries), np.float32)
    for block in range(train.info.num_blocks):
        start, stop = train.info.block_range(block)
        product.begin(block)
        portion = np.zeros((stop - start, len(GROUPS), queries), np.float32)
        if product.reads_features:
            for group in GROUPS:
                columns = product.columns([group])
                written = np.ascontiguousarray(np.full_like(portion[:, columns], 7))
                product.write(train.read_block(block, [group]), written)
                portion[:, columns] += written
        c[start:stop] = portion
        if product.finish(slice(0, stop - start), portion):
            c[start:stop] += portion
    return c.transpose(2, 0, 1)


def stored(url: str, name: str, member: str = "m0") -> dict[str, np.ndarray]:
    info = FeatureStore.open(url).open_set(name).info
    return {group: features_of(info, member, group) for group in GROUPS}


def expected(url: str, damping: float = DAMPING) -> np.ndarray:
    return oracle.full_contributions(stored(url, "train"), stored(url, "eval"), [*GROUPS], damping=damping)


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def options(route: str, **others: Any) -> dict[str, Any]:
    return {"route": route, **({"rank": 12} if route == "low_rank" else {}), **others}


def records(url: str) -> dict[str, bytes]:
    """Commit records of everything but feature sets."""
    storage = FeatureStore.open(url).storage
    return {info.path: storage.read(info.path) for info in storage.list_objects("") if "/commits/" in info.path}
