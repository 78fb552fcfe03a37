"""contribute: features + spectra -> C[q, n, j]. One task builds a span of consecutive blocks and commits each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np

from gradstore.cluster import Engine, Task
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.sizes import BLOCKS_PER_WORKER, query_tile, split
from gradstore.spec import RunSpec
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import ContributionArtifact, ContributionShape, KernelArtifact, QueryArtifact
from gradstore.store.features import FeatureSet, FeatureStore

QUERY_SETS = ("learn", "eval")
# Bytes of train features that a task holds at once: groups are read in bundles of about this size.
READ_BYTES = 64 * 2**20


def contribute(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write the preconditioned queries and C of the learn and eval sets, where the store does not hold them yet.

    Raises
    ------
    NotReadyError
        If features or spectra are missing.
    ContractError
        If contributions of this name were built with other settings.
    """
    store = FeatureStore.open(spec.run.store)
    train = store.open_set("train")
    _precondition_queries(spec, engine, store)
    tasks, total = [], 0
    for name in QUERY_SETS:
        artifact = _create_contributions(spec, engine, store, name)
        missing = artifact.missing_blocks()
        total += train.info.rows
        for span in split(missing, BLOCKS_PER_WORKER * spec.cluster.num_workers):
            rows = sum(stop - start for start, stop in map(artifact.shape.block_range, span))
            arguments = (spec.run.store, spec.kernel.name, name, list(span))
            task_name = f"contribute-{spec.kernel.name}-{name}-{span[0]:06d}"
            tasks.append(Task(name=task_name, function=contribute_span, arguments=arguments, rows=rows))
    done = total - sum(task.rows for task in tasks)
    with progress.stage(f"contribute {spec.kernel.name}", total if tasks else 0, "rows", done) as advance:
        for task, _ in engine.run(tasks):
            advance(task.rows)


def _settings(spec: RunSpec, store: FeatureStore, name: str) -> dict[str, Any]:
    """What queries and contributions are made from: the kernel with its damping, and the sets as they are now."""
    train, queries = store.open_set("train"), store.open_set(name)
    return {
        "kernel": {"kind": spec.kernel.kind, **asdict(resolve_kernel(spec))},  # type: ignore[call-overload]
        "train": {"data": train.info.data_hash, **train.snapshot().to_json()},
        "queries_from": {"data": queries.info.data_hash, **queries.snapshot().to_json()},
    }


def _precondition_queries(spec: RunSpec, engine: Engine, store: FeatureStore) -> None:
    """Run one task per query set whose preconditioned queries are missing."""
    tasks = []
    for name in QUERY_SETS:
        queries = store.open_set(name)
        artifact = QueryArtifact.create(
            store.storage,
            spec.kernel.name,
            name,
            settings=_settings(spec, store, name),
            queries=queries.info.rows,
            widths={array.name: array.features for array in queries.info.arrays},
        )
        if not artifact.is_complete():
            arguments = (spec.run.store, spec.model_dump(), name)
            tasks.append(Task(name=f"queries-{spec.kernel.name}-{name}", function=precondition, arguments=arguments))
    for _ in engine.run(tasks):
        pass


def precondition(store_url: str, run: Mapping[str, Any], set_name: str) -> int:
    """Task: write K_j psi for every query psi of a set and every group j; return the number of queries."""
    spec = RunSpec.model_validate(run)
    kernel = resolve_kernel(spec)
    store = FeatureStore.open(store_url)
    queries = store.open_set(set_name)
    artifact = QueryArtifact.open(store.storage, spec.kernel.name, set_name)
    spectra = KernelArtifact.open(store.storage, spec.kernel.kind) if kernel.needs_spectra else None
    preconditioned = {}
    for array in queries.info.arrays:
        spectrum = () if spectra is None else spectra.read(array.name)
        preconditioned[array.name] = kernel.precondition(_all_rows(queries, array.name), *spectrum)
    artifact.write(preconditioned, facts={"queries": queries.info.rows})
    return queries.info.rows


def _all_rows(feature_set: FeatureSet, group: str) -> np.ndarray:
    """All rows [n, k_j] of one group of a small set."""
    blocks = range(feature_set.info.num_blocks)
    return np.concatenate([feature_set.read_block(block, [group])[group] for block in blocks])


def _create_contributions(spec: RunSpec, engine: Engine, store: FeatureStore, name: str) -> ContributionArtifact:
    train, queries = store.open_set("train").info, store.open_set(name).info
    groups = tuple(array.name for array in train.arrays)
    dtype = spec.contribute.dtype
    scales = None
    if dtype == "float16":
        task = Task(name=f"scales-{name}", function=query_scales, arguments=(spec.run.store, spec.kernel.name, name))
        ((_, found),) = engine.run([task])
        scales = np.asarray(found, np.float32)
    return ContributionArtifact.create(
        store.storage,
        spec.kernel.name,
        name,
        settings=_settings(spec, store, name),
        shape=ContributionShape(
            queries=queries.rows,
            rows=train.rows,
            groups=groups,
            block_rows=train.block_rows,
            query_tile=query_tile((queries.rows, train.rows, len(groups)), train.block_rows, dtype),
            dtype=dtype,
        ),
        scales=scales,
    )


def query_scales(store_url: str, kernel: str, set_name: str) -> list[float]:
    """Task: return a power of two per query that brings its stored float16 contributions near 1.

    A contribution to group j is about ||psi_qj|| rms_n ||phi_nj|| / sqrt(k_j), as for directions at random; the largest of
    these over the groups is stored as about 1, which leaves a factor of 65504 above it.
    """
    store = FeatureStore.open(store_url)
    artifact = QueryArtifact.open(store.storage, kernel, set_name)
    table = store.open_set("train").read_statistics().group_by("group")
    sums = table.aggregate([("sum_squares", "sum"), ("rows", "sum")]).to_pydict()
    energy = {
        group: squares / rows
        for group, squares, rows in zip(sums["group"], sums["sum_squares_sum"], sums["rows_sum"], strict=True)
    }
    typical_Q = np.zeros(artifact.settings["queries"])
    for group, width in artifact.widths.items():
        norms_Q = np.linalg.norm(artifact.read(group).astype(np.float64), axis=1)
        typical_Q = np.maximum(typical_Q, norms_Q * np.sqrt(energy[group] / width))
    return [float(2.0 ** np.round(np.log2(typical))) if typical > 0 else 1.0 for typical in typical_Q]


def contribute_span(store_url: str, kernel: str, set_name: str, blocks: Sequence[int]) -> int:
    """Task: build and commit C for every query of a set and the rows of some blocks; return how many rows."""
    from gradstore.numerics.contributions import contributions

    store = FeatureStore.open(store_url)
    train = store.open_set("train")
    artifact = ContributionArtifact.open(store.storage, kernel, set_name)
    shape = artifact.shape
    queries = _queries(store_url, kernel, set_name)
    widths = {array.name: array.features for array in train.info.arrays}
    bundles = _bundles(widths, shape.block_rows)
    total = 0
    for block in blocks:
        start, stop = shape.block_range(block)
        c_QNM = np.empty((shape.queries, stop - start, len(shape.groups)), np.float32)
        first = 0
        for bundle in bundles:
            rows = train.read_block(block, bundle)
            c_QNM[:, :, first : first + len(bundle)] = contributions(queries, rows, bundle)
            first += len(bundle)
        artifact.write_block(block, c_QNM, facts={"rows": stop - start})
        total += stop - start
    return total


def _bundles(widths: Mapping[str, int], block_rows: int) -> list[list[str]]:
    """Cut groups, in order, into bundles of about READ_BYTES a block, each of at least one group."""
    bundles: list[list[str]] = []
    filled = READ_BYTES
    for group, width in widths.items():
        if filled + 4 * width * block_rows > READ_BYTES:
            bundles.append([])
            filled = 0
        bundles[-1].append(group)
        filled += 4 * width * block_rows
    return bundles


@lru_cache(maxsize=1)
def _queries(store_url: str, kernel: str, set_name: str) -> Mapping[str, np.ndarray]:
    """The preconditioned queries of a set, read once per process."""
    return QueryArtifact.open(FeatureStore.open(store_url).storage, kernel, set_name).read_all()
