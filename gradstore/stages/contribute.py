"""contribute: features + spectra -> C[q, n, j]. One task builds a span of consecutive blocks and commits each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np

from gradstore.cluster import Engine, Task
from gradstore.errors import NotReadyError, SupersededError
from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.sizes import BLOCKS_PER_WORKER, query_tile, split
from gradstore.spec import RunSpec
from gradstore.stages.featurize.tables import MARGIN
from gradstore.stages.progress import Progress
from gradstore.stages.reading import full_rows, full_width, inner_products, is_factored
from gradstore.store.artifacts import ContributionArtifact, ContributionShape, KernelArtifact, QueryArtifact
from gradstore.store.dtypes import nearest_scale
from gradstore.store.features import BlockReader, FeatureArray, FeatureSet, FeatureStore, Piece

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
        arguments = (spec.run.store, spec.kernel.name, spec.model.etas, list(span))
        name = f"contribute-{spec.kernel.name}-{span[0]:06d}"
        tasks.append(Task(name=name, function=contribute_span, arguments=arguments, rows=rows))
    total = shape.num_examples
    done = total - sum(task.rows for task in tasks)
    with progress.stage(f"contribute {spec.kernel.name}", total if tasks else 0, "rows", done) as advance:
        for task, _ in engine.run(tasks):
            advance(task.rows)


def _settings(spec: RunSpec, store: FeatureStore, name: str, members: Sequence[str]) -> dict[str, Any]:
    """What queries and contributions are made from: the kernel with its damping, and the sets as they are now."""
    mean = spec.kernel.members == "mean"
    return {
        "kernel": _kernel_settings(spec),
        "kernel_of": spec.kernel.members,
        "train": store.describe("train", None if mean else members),
        "queries_from": store.describe(name, members),
    }


def _kernel_settings(spec: RunSpec) -> dict[str, Any]:
    return {"kind": spec.kernel.kind, **asdict(resolve_kernel(spec))}  # type: ignore[call-overload]


def _precondition_queries(spec: RunSpec, engine: Engine, store: FeatureStore) -> None:
    """Run one task per query set and member whose preconditioned queries are missing.

    Without spectra there is nothing to precondition, and rank-c factors stay what they are.
    """
    spectra = resolve_kernel(spec).needs_spectra
    tasks = []
    for name in QUERY_SETS:
        info = store.open_set(name).info
        for member in info.members:
            if spectra:
                _require_spectra(store, spec.kernel.kind, spec.kernel.of_member(member))
            artifact = QueryArtifact.create(
                store.storage,
                spec.kernel.name,
                (name, member),
                settings=_settings(spec, store, name, [member]),
                queries=info.rows,
                widths={array.name: full_width(array) if spectra else array.features for array in info.arrays},
            )
            if not artifact.is_complete():
                arguments = (spec.run.store, spec.model_dump(), (name, member))
                task_name = f"queries-{spec.kernel.name}-{name}-{member}"
                tasks.append(Task(name=task_name, function=precondition, arguments=arguments))
    for _ in engine.run(tasks):
        pass


def _require_spectra(store: FeatureStore, kind: str, member: str) -> None:
    missing = KernelArtifact.open(store.storage, kind, member).missing_units()
    if missing:
        raise NotReadyError(
            f"kernels/{kind}/{member}: {len(missing)} bundles of groups are missing. Run `gradstore kernel` again: it "
            "builds those."
        )


def precondition(store_url: str, run: Mapping[str, Any], place: tuple[str, str]) -> int:
    """Task: write K_j psi for every query psi of a (set, member) and every group j; return the number of queries."""
    from gradstore.numerics.kernel import zero_invalid

    spec = RunSpec.model_validate(run)
    kernel = resolve_kernel(spec)
    store = FeatureStore.open(store_url)
    queries = store.open_set(*place)
    artifact = QueryArtifact.open(store.storage, spec.kernel.name, place)
    # A task of an earlier run must not fill an artifact that was pruned and made anew since.
    if artifact.settings["kernel"] != _kernel_settings(spec):
        raise SupersededError(
            f"{artifact.folder}: is of another kernel than this task's. Run `gradstore contribute` again."
        )
    built = spec.kernel.of_member(queries.member)
    spectra = KernelArtifact.open(store.storage, spec.kernel.kind, built) if kernel.needs_spectra else None
    preconditioned = {}
    for array in queries.info.arrays:
        spectrum = () if spectra is None else spectra.read(array.name)
        rows = _all_rows(queries, array)
        rows = rows if spectra is None else full_rows(array, rows)
        # A query that is not valid is answered by nothing; the learner takes no step for it.
        zero_invalid(rows)
        preconditioned[array.name] = kernel.precondition(rows, *spectrum)
    artifact.write(preconditioned, facts={"queries": queries.info.rows})
    return queries.info.rows


def _all_rows(feature_set: FeatureSet, array: FeatureArray) -> np.ndarray:
    """All rows [n, k_j] of one group of a small set, as they are stored; NaN in gaps."""
    info = feature_set.info
    rows = np.full((info.rows, array.features), np.nan, np.float32)
    for block in range(info.num_blocks):
        place = rows[slice(*info.block_range(block))]
        feature_set.read_block(block, [array.name], out={array.name: place})
    return rows


def _has_spectra(store: FeatureStore, kernel: str, place: tuple[str, str]) -> bool:
    """Whether queries were preconditioned, and so are whole matrices."""
    from gradstore.numerics.kernel import KERNELS

    kind = QueryArtifact.open(store.storage, kernel, place).settings["kernel"]["kind"]
    return KERNELS[kind].needs_spectra


def _create_contributions(spec: RunSpec, engine: Engine, store: FeatureStore, name: str) -> ContributionArtifact:
    train, queries = store.open_set("train").info, store.open_set(name).info
    etas = spec.model.etas
    groups = tuple(array.name for array in train.arrays)
    dtype = spec.contribute.dtype
    scales = None
    if dtype == "float16" and not _exists(store, spec.kernel.name, name):
        arguments = (spec.run.store, spec.kernel.name, name, etas)
        task = Task(name=f"scales-{name}", function=query_scales, arguments=arguments)
        ((_, found),) = engine.run([task])
        scales = np.asarray(found, np.float32)
    elif dtype == "float16":
        scales = ContributionArtifact.open(store.storage, spec.kernel.name, name).scales
    return ContributionArtifact.create(
        store.storage,
        spec.kernel.name,
        name,
        settings={**_settings(spec, store, name, train.members), "etas": etas},
        shape=ContributionShape(
            queries=queries.rows,
            rows=train.rows,
            gaps=train.gaps,
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


def query_scales(store_url: str, kernel: str, set_name: str, etas: Mapping[str, float]) -> list[float]:
    """Task: return a power of two per query that brings its stored float16 contributions near 1.

    A contribution to group j is about ||psi_qj|| rms_n ||phi_nj|| / sqrt(k_j), as for directions at random; the largest of
    these over the groups, and members with their eta, is stored as about 1, which leaves a factor of 65504 above it.
    """
    store = FeatureStore.open(store_url)
    typical_Q = np.zeros(store.open_set(set_name).info.rows)
    for member, eta in etas.items():
        artifact = QueryArtifact.open(store.storage, kernel, (set_name, member))
        train = store.open_set("train", member)
        sums = train.read_statistics().group_by("group").aggregate([("sum_squares", "sum")]).to_pydict()
        energy = dict(zip(sums["group"], sums["sum_squares_sum"], strict=True))
        spectra = _has_spectra(store, kernel, (set_name, member))
        for array in train.info.arrays:
            rows = artifact.read(array.name) if spectra else full_rows(array, artifact.read(array.name))
            norms_Q = np.linalg.norm(rows.astype(np.float64), axis=1)
            size_Q = abs(eta) * norms_Q * np.sqrt(energy[array.name] / train.info.num_examples / full_width(array))
            typical_Q = np.maximum(typical_Q, size_Q)
    return [nearest_scale(typical) for typical in typical_Q.tolist()]


def contribute_span(store_url: str, kernel: str, etas: Mapping[str, float], blocks: Sequence[int]) -> int:
    """Task: build and commit C for the rows of some blocks and every query; return how many rows.

    Each block of features is read once, for the queries of all sets together; members add up, each eta times. Where the
    output function is TRAK's margin, a train example n counts 1 - p_n times (arXiv 2303.14186, its matrix Q).
    """
    store = FeatureStore.open(store_url)
    artifacts = {name: ContributionArtifact.open(store.storage, kernel, name) for name in QUERY_SETS}
    missing = {name: set(artifact.missing_blocks()) for name, artifact in artifacts.items()}
    train = store.open_set("train")
    trains = {member: train.of_member(member) for member in etas}
    places = [(name, member) for name in QUERY_SETS for member in etas]
    queries = _queries(store_url, kernel, tuple((*place, _attempt(store, kernel, place)) for place in places))
    info, spectra = train.info, _has_spectra(store, kernel, places[0])
    widths = {array.name: full_width(array) for array in info.arrays}
    reader = BlockReader(list(trains.values()), _bundles(widths, info.block_rows))
    total = 0
    with closing(reader.read(blocks)) as stream:
        for block, pieces in groupby(stream, key=lambda piece: piece.block):
            lacking = {name: artifact for name, artifact in artifacts.items() if block in missing[name]}
            start, stop = info.block_range(block)
            built = {
                name: np.zeros((artifact.shape.queries, stop - start, len(info.arrays)), np.float32)
                for name, artifact in lacking.items()
            }
            factors_N1 = {member: _factor(store, trains[member], block, eta) for member, eta in etas.items()}
            for piece in pieces:
                of_member = {name: queries[name, piece.member] for name in lacking}
                _add_piece(built, info.arrays, piece, of_member, factors_N1[piece.member], spectra=spectra)
            for name, artifact in lacking.items():
                artifact.write_block(block, built[name], facts={"rows": stop - start})
            total += stop - start
    return total


def _attempt(store: FeatureStore, kernel: str, place: tuple[str, str]) -> str:
    """The attempt that wrote the preconditioned queries of a (set, member): another one where a store was made anew."""
    artifact = QueryArtifact.open(store.storage, kernel, place)
    return artifact.log.require(0, f"{artifact.folder}: not written. Run `gradstore contribute` again.").attempt


@lru_cache(maxsize=1)
def _queries(
    store_url: str, kernel: str, attempts: tuple[tuple[str, str, str], ...]
) -> Mapping[tuple[str, str], Mapping[str, np.ndarray]]:
    """The preconditioned queries by (set, member), read once per process."""
    storage = FeatureStore.open(store_url).storage
    return {
        (name, member): QueryArtifact.open(storage, kernel, (name, member)).read_all() for name, member, _ in attempts
    }


def _factor(store: FeatureStore, train: FeatureSet, block: int, eta: float) -> np.ndarray:
    """What a member's C of a block counts, [n, 1]: eta, times 1 - p_n where features are those of a margin.

    1 - p_n turns a margin's gradient into minus that of the loss.
    """
    start, stop = train.info.block_range(block)
    factor_N1 = np.full((stop - start, 1), eta, np.float32)
    if store.contract["model"]["output"] == MARGIN:
        p_N: np.ndarray = train.read_examples(["p"], block=block)["p"].to_numpy()
        factor_N1 *= (1 - p_N).astype(np.float32)[:, None]
    return factor_N1


def _add_piece(
    built: Mapping[str, np.ndarray],
    arrays: Sequence[FeatureArray],
    piece: Piece,
    queries: Mapping[str, Mapping[str, np.ndarray]],
    factor_N1: np.ndarray,
    *,
    spectra: bool,
) -> None:
    """Add the C of a piece, times a factor of every row, to C [Q, n, M] of every query set.

    Rank-c factors are multiplied out where queries are preconditioned, since those have no factors any more.
    """
    from gradstore.numerics.contributions import contributions

    groups = list(piece.rows)
    first = next(index for index, array in enumerate(arrays) if array.name == groups[0])
    last = first + len(groups)
    of_groups = dict(zip(groups, arrays[first:last], strict=True))
    rows: Mapping[str, np.ndarray] = piece.rows
    if spectra:
        rows = {name: full_rows(of_groups[name], values) for name, values in rows.items()}
    for name, preconditioned in queries.items():
        if spectra or not any(map(is_factored, of_groups.values())):
            c_QNM = contributions(preconditioned, rows, groups)
        else:
            products = [inner_products(array, preconditioned[group], rows[group]) for group, array in of_groups.items()]
            c_QNM = np.stack(products, 2)
        built[name][:, :, first:last] += factor_N1 * c_QNM


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
