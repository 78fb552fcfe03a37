"""Contributions and scores out of core, against what the work itself takes on the same machine, in the same minutes.

Every limit is a sum of what cannot be avoided: one warm read of the stored bytes into buffers that are used again; the products'
operations at the rate of a large product; and for C, A_q's operations at the same rate and the encoder's time to write C. All
with one thread of computation, as workers have it. Ratios are of wall seconds, medians of alternating rounds. Beside each stands
the ratio to a limit whose products are those of 64 queries themselves, with rows that are in memory and not in cache: so few
queries are multiplied at two thirds of a large product's rate.
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gradstore.cluster import Engine, Task
from gradstore.cluster.tasks import one_thread
from gradstore.plan.sizes import query_tile
from gradstore.spec import ClusterSection, RunSpec
from gradstore.stages.contribute import contribute_span, precondition
from gradstore.stages.contribute.artifacts import create_outputs, create_queries
from gradstore.stages.contribute.queries import Target
from gradstore.stages.contribute.span import Work
from gradstore.store.artifacts import ContributionArtifact, remove_artifact
from gradstore.store.blocks import in_parallel
from gradstore.store.dtypes import DtypeName
from gradstore.store.features import FeatureArray, FeaturePart, FeatureSet, FeatureStore, SetInfo
from gradstore.store.layout import chunk_path
from tests.stores import inputs

QUERIES, GROUPS, WIDTH, ROWS, BLOCK_ROWS = 64, 48, (16, 16), 20_480, 1024
ROUNDS = 5
# As store/backend serves a directory.
THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of a pass, on the clock and of the processor."""

    seconds: float
    cpu_seconds: float


Pass = Callable[[], Cost]


def rows() -> Iterator[dict[str, Any]]:
    """The rows of bench.json."""
    folder = Path(tempfile.mkdtemp(prefix="gradstore-bench-"))
    try:
        yield from _of_dtype(
            folder, "float16", {"contributions-float16": ("tensor", 1.3), "scores-float16": ("scores", 1.3)}
        )
        yield from _of_dtype(folder, "float32", {"scores-float32": ("scores", 1.1)})
        yield _two_workers(folder)
    finally:
        shutil.rmtree(folder)


def _of_dtype(folder: Path, dtype: DtypeName, wanted: Mapping[str, tuple[str, float]]) -> Iterator[dict[str, Any]]:
    store = make_store(folder / f"store-{dtype}", dtype)
    for name, (mode, target) in wanted.items():
        spec = make_spec(store, mode)
        passes: dict[str, Pass] = {
            "read": lambda: _timed(_reader(store)),
            "peak": _product_of_peak,
            "alone": _products_alone,
        }
        if mode == "tensor":
            passes["write"] = lambda spec=spec: _write_alone(store, spec)  # type: ignore[misc]
        passes["ours"] = lambda spec=spec: _span(store, spec)  # type: ignore[misc]
        with one_thread():
            costs = _alternate(passes)
        yield _row(name, target, mode, costs)


def _row(name: str, target: float, mode: str, costs: Mapping[str, Sequence[Cost]]) -> dict[str, Any]:
    rate = 2 * PEAK**3 / _seconds(costs["peak"])
    width = WIDTH[0] * WIDTH[1]
    product = 2 * QUERIES * ROWS * GROUPS * width / rate
    moments = 2 * QUERIES * ROWS * GROUPS**2 / rate if mode == "tensor" else 0.0
    beside = _seconds(costs["read"]) + moments + (_seconds(costs["write"]) if "write" in costs else 0.0)
    limit = beside + product
    alone = ROWS / ALONE_ROWS * _seconds(costs["alone"])
    return {
        "name": name,
        "ratio": round(_seconds(costs["ours"]) / limit, 3),
        "target": target,
        "better": "lower",
        "peers": {"with the products alone": round(_seconds(costs["ours"]) / (beside + alone), 3)},
        "timed": {
            "shape": f"{QUERIES} queries, {ROWS} rows, {GROUPS} groups x {width}",
            "limit": round(limit, 3),
            "read": round(_seconds(costs["read"]), 3),
            "product": round(product, 3),
            "products_alone": round(alone, 3),
            "second_moments": round(moments, 3),
            "write": round(_seconds(costs["write"]), 3) if "write" in costs else 0.0,
            "gflops": round(rate / 1e9, 1),
            "ours": round(_seconds(costs["ours"]), 3),
            "ours_cpu": round(statistics.median(cost.cpu_seconds for cost in costs["ours"]), 3),
            "what": "wall seconds of one process",
        },
    }


PEAK = 2048


def _product_of_peak() -> Cost:
    """Time a large product of float32 matrices: as many operations a second as this machine gives one thread."""
    draw = np.random.default_rng(0)
    left, right = (draw.standard_normal((PEAK, PEAK), dtype=np.float32) for _ in range(2))
    out = np.empty((PEAK, PEAK), np.float32)
    return _timed(lambda: np.matmul(left, right, out=out))


ALONE_ROWS = 4 * BLOCK_ROWS


def _products_alone() -> Cost:
    """Time the products of the queries with the rows of some blocks, group by group, into one buffer."""
    width = WIDTH[0] * WIDTH[1]
    draw = np.random.default_rng(0)
    queries_GQK = draw.standard_normal((GROUPS, QUERIES, width), dtype=np.float32)
    rows_BGNK = draw.standard_normal((ALONE_ROWS // BLOCK_ROWS, GROUPS, BLOCK_ROWS, width), dtype=np.float32)
    out_NQ = np.empty((BLOCK_ROWS, QUERIES), np.float32)

    def multiply() -> None:
        for rows_GNK in rows_BGNK:
            for rows_NK, queries_QK in zip(rows_GNK, queries_GQK, strict=True):
                np.matmul(rows_NK, queries_QK.T, out=out_NQ)

    return _timed(multiply)


def _reader(store: FeatureStore) -> Callable[[], object]:
    """Return what reads every chunk of the train set into a few buffers, without looking at it."""
    train = store.open_set("train")
    info, root = train.info, Path(store.storage.url)
    arrays = [info.array_path("m0", array.name) for array in info.arrays]
    files = [root / info.folder / chunk_path(array, block, 0) for block in range(info.num_blocks) for array in arrays]
    size = files[0].stat().st_size
    buffers = [np.empty(size, np.uint8) for _ in range(64)]

    def read(index: int) -> None:
        with files[index].open("rb", buffering=0) as file:
            assert file.readinto(buffers[index % len(buffers)].data) == size

    return lambda: in_parallel(read, range(len(files)), threads=THREADS)


def _write_alone(store: FeatureStore, spec: RunSpec) -> Cost:
    """Time the store's own writer for C of random numbers."""
    _prepare(store, spec)
    artifact = ContributionArtifact.open(store.storage, spec.kernel.name, "learn")
    c_QNM = np.random.default_rng(0).standard_normal((QUERIES, BLOCK_ROWS, GROUPS), dtype=np.float32)

    def write() -> None:
        for block in range(artifact.shape.num_blocks):
            artifact.write_block(block, c_QNM, facts={})

    return _timed(write)


def _span(store: FeatureStore, spec: RunSpec) -> Cost:
    """Time one task over all blocks: C with what the learner needs of it, or scores."""
    work, targets = _prepare(store, spec)
    return _timed(lambda: contribute_span(store.storage.url, spec.model_dump(), targets, work))


def _prepare(store: FeatureStore, spec: RunSpec) -> tuple[Work, list[Target]]:
    """Make the artifacts anew."""
    blocks = range(store.open_set("train").info.num_blocks)
    scores = spec.contribute.mode == "scores"
    target = Target(kernel=spec.kernel.name, set_name="eval" if scores else "learn")
    for folder in (f"contributions/{spec.kernel.name}/learn", f"moments/{spec.kernel.name}/learn"):
        remove_artifact(store.storage, folder)
    remove_artifact(store.storage, f"score-matrices/{spec.kernel.name}.unweighted/eval")
    if not create_queries(spec, store, (target.set_name, "m0")).is_complete():
        precondition(store.storage.url, spec.model_dump(), (target.set_name, "m0"))
    scales = np.ones(QUERIES, np.float32)
    create_outputs(spec, store, [target], [blocks], {target: scales})
    tile = QUERIES if scores else query_tile((QUERIES, ROWS, GROUPS), BLOCK_ROWS, spec.contribute.dtype)
    return Work(blocks=tuple(blocks), tiles=((QUERIES, tile),), span=0), [target]


def _two_workers(folder: Path) -> dict[str, Any]:
    """Compare two workers of the embedded cluster with one, each of one core, at the same spans of C."""
    store = make_store(folder / "store-workers", "float16")
    spec = make_spec(store, "tensor")
    with _engine(1) as one, _engine(2) as two:
        costs = _alternate(
            {
                "one": lambda: _on_cluster(store, spec, one),
                "two": lambda: _on_cluster(store, spec, two),
            }
        )
    return {
        "name": "workers-2-vs-1",
        "ratio": round(_seconds(costs["one"]) / _seconds(costs["two"]), 3),
        "target": 1.6,
        "better": "higher",
        "timed": {name: round(_seconds(of), 3) for name, of in costs.items()} | {"what": "wall seconds"},
    }


@contextmanager
def _engine(workers: int) -> Iterator[Engine]:
    with Engine(ClusterSection(workers=workers, memory_per_worker="2GiB")) as engine:
        # Starts the cluster, and imports on every worker what tasks need.
        for _ in engine.run(
            [Task(name=f"warm-{number}", function=_warm, arguments=()) for number in range(4 * workers)]
        ):
            pass
        yield engine


def _warm() -> int:
    """Import what tasks need, and keep the worker to a core of its own.

    Otherwise one worker has both of two cores already: it reads and writes in threads beside its products.
    """
    from distributed import get_worker

    import gradstore.stages.contribute.span  # noqa: F401

    cores = sorted(os.sched_getaffinity(os.getpid()))
    # Of this thread, and of those that it starts: what a task runs in.
    os.sched_setaffinity(0, {cores[int(get_worker().name) % len(cores)]})
    time.sleep(0.5)
    return 0


def _on_cluster(store: FeatureStore, spec: RunSpec, engine: Engine) -> Cost:
    """Time four tasks of as many blocks each, which build C alone."""
    work, targets = _prepare(store, spec)
    tasks = [
        Task(
            name=f"span-{number}",
            function=contribute_span,
            arguments=(
                store.storage.url,
                spec.model_dump(),
                targets,
                Work(blocks=tuple(blocks.tolist()), tiles=work.tiles),
            ),
        )
        for number, blocks in enumerate(np.array_split(np.array(work.blocks), 4))
    ]
    return _timed(lambda: [*engine.run(tasks)])


def make_store(url: Path, dtype: DtypeName) -> FeatureStore:
    """Fill a store with random features: train in ``dtype``, and as many learn and eval queries in float32."""
    contract = {"model": {"adapter": "own", "output": "value", "source": "none"}, "projection": {"kind": "identity"}}
    store = FeatureStore.create(str(url), contract=contract, run={"run": {"name": "bench", "seed": 0}})
    for name, rows in {"train": ROWS, "learn": QUERIES, "eval": QUERIES}.items():
        info = SetInfo(
            name=name,
            rows=rows,
            block_rows=min(rows, BLOCK_ROWS),
            dtype=dtype if name == "train" else "float32",
            arrays=tuple(_array(number) for number in range(GROUPS)),
            data_hash=f"{name} of {rows}",
        )
        _fill(store.create_set(info, inputs(info)))
    return store


def _array(number: int) -> FeatureArray:
    part = FeaturePart(part=f"layers.{number}.weight[0:16,0:16]", start=0, shape=WIDTH)
    features = WIDTH[0] * WIDTH[1]
    return FeatureArray(
        name=f"layers.{number}", features=features, scale=1.0, depth=number, function="mlp", parts=(part,)
    )


def _fill(made: FeatureSet) -> None:
    info, draw = made.info, np.random.default_rng(0)
    for block in range(info.num_blocks):
        rows = range(*info.block_range(block))
        features = {array.name: draw.standard_normal((len(rows), array.features), np.float32) for array in info.arrays}
        table = pa.table({"row": pa.array(rows, pa.int64()), "valid": [True] * len(rows)})
        made.write_block(block, features, examples=table, statistics=pa.table({"group": ["all"]}), facts={})


def make_spec(store: FeatureStore, mode: str) -> RunSpec:
    """Return the run: TracIn, whose queries are as they are."""
    return RunSpec.model_validate(
        {
            "run": {"name": "bench", "store": store.storage.url},
            "model": {"source": "none"},
            "data": {name: {"source": f"{name}.txt"} for name in ("train", "learn", "eval")},
            "kernel": {"kind": "identity"},
            "contribute": {"mode": mode, "dtype": "float16"},
            "cluster": {"workers": 1, "memory_per_worker": "4GiB", "device": "cpu"},
        }
    )


def _timed(run: Callable[[], object]) -> Cost:
    gc.collect()
    cpu, clock = time.process_time(), time.perf_counter()
    run()
    return Cost(seconds=time.perf_counter() - clock, cpu_seconds=time.process_time() - cpu)


def _alternate(passes: Mapping[str, Pass]) -> dict[str, list[Cost]]:
    """Cost of every pass in every round, after one round that is not counted."""
    costs: dict[str, list[Cost]] = {name: [] for name in passes}
    for number in range(ROUNDS + 1):
        for name, run in passes.items():
            cost = run()
            if number:
                costs[name].append(cost)
    return costs


def _seconds(costs: Sequence[Cost]) -> float:
    return statistics.median(cost.seconds for cost in costs)
