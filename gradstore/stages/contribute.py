"""contribute: features + spectra -> C[q, n, j]. One task builds a span of consecutive blocks and commits each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np

from gradstore.cluster import Engine, Task
from gradstore.errors import NotReadyError
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
    _precondition_queries(spec, engine, store)
    artifacts = {name: _create_contributions(spec, engine, store, name) for name in QUERY_SETS}
    for name, artifact in artifacts.items():
        if artifact.shape.dtype != spec.contribute.dtype:
            kept = f"contributions/{spec.kernel.name}/{name}: keeps dtype {artifact.shape.dtype} from its creation"
            progress.note(f"{kept}, not {spec.contribute.dtype}")
    shape = artifacts["eval"].shape
    missing = sorted({block for artifact in artifacts.values() for block in artifact.missing_blocks()})
    tasks = []
    for span in split(missing, BLOCKS_PER_WORKER * spec.cluster.num_workers):
        rows = sum(stop - start for start, stop in map(shape.block_range, span))
        arguments = (spec.run.store, spec.kernel.name, list(span))
        name = f"contribute-{spec.kernel.name}-{span[0]:06d}"
        tasks.append(Task(name=name, function=contribute_span, arguments=arguments, rows=rows))
    done = shape.rows - sum(task.rows for task in tasks)
    with progress.stage(f"contribute {spec.kernel.name}", shape.rows if tasks else 0, "rows", done) as advance:
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
    if resolve_kernel(spec).needs_spectra:
        _require_spectra(store, spec.kernel.kind)
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


def _require_spectra(store: FeatureStore, kind: str) -> None:
    missing = KernelArtifact.open(store.storage, kind).missing_units()
    if missing:
        raise NotReadyError(
            f"kernels/{kind}: {len(missing)} bundles of groups are missing. Run `gradstore kernel` again: it builds those."
        )


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
    if dtype == "float16" and not _exists(store, spec.kernel.name, name):
        task = Task(name=f"scales-{name}", function=query_scales, arguments=(spec.run.store, spec.kernel.name, name))
        ((_, found),) = engine.run([task])
        scales = np.asarray(found, np.float32)
    elif dtype == "float16":
        scales = ContributionArtifact.open(store.storage, spec.kernel.name, name).scales
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


def _exists(store: FeatureStore, kernel: str, name: str) -> bool:
    try:
        ContributionArtifact.open(store.storage, kernel, name)
    except NotReadyError:
        return False
    return True


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


def contribute_span(store_url: str, kernel: str, blocks: Sequence[int]) -> int:
    """Task: build and commit C for the rows of some blocks and every query; return how many rows.

    Each block of features is read once, for the queries of all sets together.
    """
    store = FeatureStore.open(store_url)
    train = store.open_set("train")
    artifacts = {name: ContributionArtifact.open(store.storage, kernel, name) for name in QUERY_SETS}
    queries = {name: _queries(store_url, kernel, name, _attempt(store, kernel, name)) for name in QUERY_SETS}
    missing = {name: set(artifact.missing_blocks()) for name, artifact in artifacts.items()}
    total = 0
    for block in blocks:
        start, stop = train.info.block_range(block)
        lacking = {name: artifact for name, artifact in artifacts.items() if block in missing[name]}
        built = _build_block(train, block, {name: queries[name] for name in lacking})
        for name, artifact in lacking.items():
            artifact.write_block(block, built[name], facts={"rows": stop - start})
        total += stop - start
    return total


def _build_block(
    train: FeatureSet, block: int, queries: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """C [Q, n, M] of every query set for one block of rows."""
    from gradstore.numerics.contributions import contributions

    start, stop = train.info.block_range(block)
    widths = {array.name: array.features for array in train.info.arrays}
    built = {
        name: np.empty((len(next(iter(preconditioned.values()))), stop - start, len(widths)), np.float32)
        for name, preconditioned in queries.items()
    }
    first = 0
    for bundle in _bundles(widths, train.info.block_rows):
        rows = train.read_block(block, bundle)
        last = first + len(bundle)
        for name, preconditioned in queries.items():
            built[name][:, :, first:last] = contributions(preconditioned, rows, bundle)
        first = last
    return built


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


def _attempt(store: FeatureStore, kernel: str, set_name: str) -> str:
    """The attempt that wrote a set's preconditioned queries: another one where a store was made anew."""
    return QueryArtifact.open(store.storage, kernel, set_name).log.require(0, f"queries/{kernel}/{set_name}").attempt


@lru_cache(maxsize=len(QUERY_SETS))
def _queries(store_url: str, kernel: str, set_name: str, attempt: str) -> Mapping[str, np.ndarray]:
    """The preconditioned queries of a set, read once per process."""
    del attempt  # it tells this store from another one that was at the same place
    return QueryArtifact.open(FeatureStore.open(store_url).storage, kernel, set_name).read_all()
