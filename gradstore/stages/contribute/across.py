"""The kernel across groups, as contributions are made with it: coefficients of queries, coordinates of rows (ADR 0016)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gradstore.cluster import Task
from gradstore.errors import ContractError, SupersededError
from gradstore.plan.contributions import COEFFICIENT_TILE_BYTES, rotation_bundles
from gradstore.plan.full import full_options, refuse_coefficients
from gradstore.plan.sizes import split
from gradstore.spec import RunSpec
from gradstore.stages.contribute.products import InGroup, Product, Rows, weights_of
from gradstore.stages.contribute.queries import Slab, open_slabs, stacked
from gradstore.stages.full_kernel import SideBySide, kernel_settings, open_full, query_features, rows_held
from gradstore.stages.reading import full_rows, full_width
from gradstore.store.artifacts import FullKernelArtifact, PartialsArtifact, QueryArtifact, QueryShape, remove_partials
from gradstore.store.features import FeatureArray, FeatureSet, FeatureStore

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Damping
    from gradstore.numerics.kernel.full import Coefficients

Place = tuple[str, str]
"""A query set and its member."""

_ROTATED: Final = "rotated"


def query_shape(store: FeatureStore, spec: RunSpec, place: Place) -> QueryShape:
    """What is kept of the queries of a (set, member).

    Raises
    ------
    NotReadyError
        If the member's kernel is not built.
    ResourceError
        If a worker has no memory for their coefficients.
    """
    queries, kernel = store.open_set(*place), open_full(store, spec, place[1])
    shape = kernel.shape
    refuse_coefficients(spec, place[0], (queries.info.rows, len(shape.widths), shape.dimensions))
    return QueryShape(
        queries=queries.info.rows,
        groups=tuple(shape.widths),
        widths=dict(shape.widths) if shape.route == "low_rank" else {},
        coefficients=shape.dimensions,
    )


def query_tasks(store: FeatureStore, spec: RunSpec, places: Sequence[Place]) -> list[Task]:
    """Tasks that the coefficients of some (set, member) wait for: of a dual kernel, a pass over the features of each group.

    All dampings of a sweep share what they make.
    """
    tasks = []
    for place in places:
        kernel = open_full(store, spec, place[1])
        if kernel.shape.route != "dual":
            continue
        queries = store.open_set(*place)
        groups = [*kernel.shape.widths]
        partials = PartialsArtifact.create(
            store.storage,
            _partials_names(place, spec.kernel.name),
            settings={
                "of": dict(kernel.settings),
                "built": kernel.content,
                "queries_from": queries.snapshot().to_json(),
                "groups": groups,
            },
            parts=[[group] for group in groups],
            shape=(queries.info.rows, kernel.shape.eigenvalues),
        )
        missing = [groups[unit] for unit in partials.missing_units()]
        sizes = queries.info.rows, kernel.shape.eigenvalues
        bundles = rotation_bundles(len(missing), sizes, spec.cluster.num_workers)
        for number, bundle in enumerate(split(missing, bundles)):
            name = f"queries-full-{place[0]}-{place[1]}-{number:04d}"
            arguments = (spec.run.store, spec.model_dump(), place, [*bundle])
            tasks.append(Task(name=name, function=rotate_queries, arguments=arguments, rows=0))
    return tasks


def remove_rotated(store: FeatureStore, spec: RunSpec, places: Sequence[Place]) -> None:
    """Remove what the tasks of `query_tasks` made, when the coefficients are there."""
    for place in places:
        of, name, _ = _partials_names(place, spec.kernel.name)
        remove_partials(store.storage, of, name)


def rotate_queries(store_url: str, run: Mapping[str, Any], place: Place, groups: Sequence[str]) -> int:
    """Task: commit psi_j Phi_j^T U of all queries of a (set, member) for some groups; return how many groups.

    U are the eigenvectors of the train rows' inner products: a dual kernel.
    """
    spec, store = RunSpec.model_validate(run), FeatureStore.open(store_url)
    kernel = open_full(store, spec, place[1])
    partials = PartialsArtifact.open(store.storage, _partials_names(place, spec.kernel.name))
    units = {group: [*kernel.shape.widths].index(group) for group in groups}
    lacking = [group for group in groups if not partials.is_written(units[group])]
    dtype = kernel.shape.dtype
    read = SideBySide([store.open_set("train", place[1])], dtype, lacking)
    psi = {group: query_features(store.open_set(*place), [group]).astype(dtype, copy=False) for group in lacking}
    found = {group: np.zeros((len(psi[group]), kernel.shape.eigenvalues)) for group in lacking}
    if lacking:
        for block, rows in read.blocks(range(read.info.num_blocks)):
            vectors = _finite(kernel.read_coordinates(place[1], block))
            for group, columns in read.slices().items():
                found[group] += (psi[group] @ rows[:, columns].T) @ vectors
    for group in lacking:
        partials.write(units[group], found[group], facts={})
    return len(groups)


def precondition(store_url: str, run: Mapping[str, Any], place: Place, swept: str) -> int:
    """Task: write the coefficients and self-contributions of all queries of a (set, member); return how many queries.

    ``run`` is one of the sweep of the kernel called ``swept``, for all of which the tasks of `query_tasks` ran.
    """
    spec, store = RunSpec.model_validate(run), FeatureStore.open(store_url)
    queries = store.open_set(*place)
    artifact = QueryArtifact.open(store.storage, spec.kernel.name, place)
    kernel = open_full(store, spec, place[1])
    asked = (kernel_settings(store, spec), spec.kernel.members)
    if (artifact.settings["kernel"], artifact.settings["kernel_of"]) != asked:
        raise SupersededError(
            f"{artifact.folder}: is of another kernel than this task's. Run `gradstore contribute` again."
        )
    if artifact.is_complete():
        return queries.info.rows
    shape, psi = artifact.shape, query_features(queries)
    values = np.empty((shape.queries, len(shape.groups), shape.coefficients), np.float32)
    selves = np.empty((shape.queries, len(shape.groups)))
    scale = 0.0
    train, damping = store.open_set("train", place[1]), full_options(spec).damped_by
    for tile, made in _coefficients(kernel, psi, (train, damping), _partials_names(place, swept)):
        values[tile], selves[tile], scale = made.values, made.selves, made.scale
    columns = SideBySide([queries], "float32").slices()
    features = {group: np.asarray(scale * psi[:, columns[group]], np.float32) for group in shape.widths}
    artifact.write(features, selves, values, facts={"queries": queries.info.rows, "kernel": kernel.content})
    return queries.info.rows


def _coefficients(
    kernel: FullKernelArtifact, psi: np.ndarray, of: tuple[FeatureSet, Damping], partials: tuple[str, str, str]
) -> Iterator[tuple[slice, Coefficients]]:
    """Coefficients of some queries at a time, as coordinates of the train rows are stored, under a damping."""
    from gradstore.numerics.kernel.full import dual_coefficients, kernel_matrix, primal_coefficients

    shape, (train, damping) = kernel.shape, of
    held = None if shape.route == "dual" else rows_held(kernel, train, damping)
    edges = [0, *accumulate(shape.widths.values())]
    step = max(1, COEFFICIENT_TILE_BYTES // (8 * len(shape.widths) * shape.dimensions))
    tiles = [slice(start, start + step) for start in range(0, len(psi), step)]
    if shape.route == "primal":
        vectors = np.concatenate([kernel.read_basis(group).astype(np.float64) for group in shape.widths])
        inverse = damping.inverse(kernel.read_eigenvalues())
        first = 0 if held is None else len(inverse) - held
        matrix = kernel_matrix(vectors[:, first:], inverse[first:])
        for tile in tiles:
            yield tile, primal_coefficients(psi[tile], edges, vectors, inverse, matrix)
    else:
        for tile in tiles:
            parts = [psi[tile, first:last].astype(np.float64) for first, last in pairwise(edges)]
            if shape.route == "dual":
                stored = PartialsArtifact.open(kernel.storage, partials)
                rotated = np.stack([stored.read(unit)[tile] for unit in range(len(parts))], 1)
                eigenvalues, mean = kernel.read_eigenvalues(), kernel.mean_eigenvalue
                yield tile, dual_coefficients(rotated, _squares(parts), eigenvalues, mean, damping)
            else:
                yield tile, _low_rank(kernel, parts, damping, held=held)


def _squares(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Squared norms [Q, M] of queries by group."""
    return np.stack([np.einsum("qd,qd->q", part, part) for part in parts], 1)


def _low_rank(
    kernel: FullKernelArtifact, parts: Sequence[np.ndarray], damping: Damping, *, held: int | None
) -> Coefficients:
    """Coefficients of queries whose features are given by group, under a low-rank kernel."""
    from gradstore.numerics.kernel.full import low_rank_coefficients

    eigenvalues, rotation = kernel.read_eigenvalues(), kernel.read_rotation()
    shift = damping.shift(eigenvalues, kernel.mean_eigenvalue)
    pairs = zip(parts, kernel.shape.widths, strict=True)
    rotated = np.stack([part @ kernel.read_basis(group) @ rotation for part, group in pairs], 1)
    made = low_rank_coefficients(rotated, _squares(parts), eigenvalues, shift, held=held)
    # Rows have their coordinates in the basis, not in the eigenvectors.
    return made._replace(values=made.values @ rotation.T)


def make_products(
    store: FeatureStore, spec: RunSpec, member: str, stacks: Sequence[Sequence[Slab]]
) -> Sequence[Product]:
    """Make the products of a member of the train set and the coefficients of some stacks of slabs, which are read.

    Raises
    ------
    ContractError
        If they are of a kernel that was built anew since.
    """
    coordinates = _Coordinates(open_full(store, spec, member), member)
    return [_make_product(store, spec, coordinates, slabs) for slabs in stacks]


def _make_product(store: FeatureStore, spec: RunSpec, coordinates: _Coordinates, slabs: Sequence[Slab]) -> Product:
    kernel, member = coordinates.kernel, coordinates.member
    arrays = store.open_set("train", member).info.arrays
    weights = [weights_of(store, slab.target, spec) for slab in slabs]
    opened = open_slabs(store, spec, member, slabs)
    for item in opened:
        _refuse_another_build(item.artifact, kernel)
    values = stacked(opened, lambda artifact, first, last: artifact.read_coefficients(first, last))
    summed = weights[0] is not None
    if summed:
        parts = [weight_M @ part for part, weight_M in _by_slab(values, slabs, weights) if weight_M is not None]
        values = np.concatenate(parts).astype(np.float32)[:, None]
    if kernel.shape.route == "primal":
        return _Streamed(arrays, values)
    if kernel.shape.route == "dual":
        return _Stored(coordinates, values)
    queries = {}
    for place, array in enumerate(arrays):

        def read(artifact: QueryArtifact, first: int, last: int, group: str = array.name) -> np.ndarray:
            return artifact.read(group)[first:last]

        queries[array.name] = stacked(opened, read)
        for part, weight_M in _by_slab(queries[array.name], slabs, weights):
            part[...] *= 1 if weight_M is None else np.float32(weight_M[place])
    in_group = InGroup(arrays, queries, summed=summed, factored=False)
    return _Stored(coordinates, values, in_group)


def _by_slab(
    stack: np.ndarray, slabs: Sequence[Slab], weights: Sequence[np.ndarray | None]
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """What is stacked of each slab, with its weights."""
    start = 0
    for slab, weight_M in zip(slabs, weights, strict=True):
        yield stack[start : start + slab.queries], weight_M
        start += slab.queries


class _Streamed:
    """Of a primal kernel: coefficients [Q, M, D] meet the features of all groups, which are the coordinates."""

    def __init__(self, arrays: Sequence[FeatureArray], values_QMD: np.ndarray) -> None:
        edges = [0, *accumulate(map(full_width, arrays))]
        self._arrays = {array.name: array for array in arrays}
        self._columns = values_QMD.shape[1]
        self._values = {
            array.name: _by_group(values_QMD[:, :, first:last])
            for array, (first, last) in zip(arrays, pairwise(edges), strict=True)
        }

    @property
    def reads_features(self) -> bool:
        """See `Product`."""
        return True

    def begin(self, block: int) -> None:
        """See `Product`."""

    def columns(self, groups: Sequence[str]) -> slice:
        """See `Product`: features of any group give something to all."""
        return slice(0, self._columns)

    def write(self, rows: Rows, out_NGQ: np.ndarray) -> None:
        """See `Product`."""
        from gradstore.numerics.contributions import summed_products

        full = [full_rows(self._arrays[group], values) for group, values in rows.items()]
        summed_products([self._values[group] for group in rows], full, out_NGQ.reshape(len(out_NGQ), -1))

    def finish(self, rows: slice, out_NMQ: np.ndarray) -> bool:
        """See `Product`."""
        return False


def _by_group(values_QMP: np.ndarray) -> np.ndarray:
    """Coefficients [M Q, P], the order in which products with them are C's portions."""
    return np.ascontiguousarray(values_QMP.transpose(1, 0, 2)).reshape(-1, values_QMP.shape[2])


class _Coordinates:
    """Stored coordinates of the block begun last: the products of all stacks take them, and they are read once."""

    def __init__(self, kernel: FullKernelArtifact, member: str) -> None:
        self.kernel = kernel
        self.member = member
        self._block = -1
        self._values = np.zeros((0, 0), np.float32)

    def of(self, block: int) -> np.ndarray:
        """Coordinates [n, P] of the rows of a block."""
        if block != self._block:
            self._values = self.kernel.read_coordinates(self.member, block).astype(np.float32, copy=False)
            self._block = block
        return self._values


class _Stored:
    """Of a dual or low-rank kernel: coefficients [Q, M, P] meet stored coordinates; of the latter, features each other too.

    Parameters
    ----------
    coordinates
        Those of the rows.
    values_QMP
        Coefficients; of scores, summed over groups.
    in_group
        What a low-rank kernel is beside its eigenvectors: a multiple of the identity.
    """

    def __init__(self, coordinates: _Coordinates, values_QMP: np.ndarray, in_group: InGroup | None = None) -> None:
        self._stored = coordinates
        self._values = _by_group(values_QMP)
        self._in_group = in_group
        self._coordinates = np.zeros((0, 0), np.float32)

    @property
    def reads_features(self) -> bool:
        """See `Product`."""
        return self._in_group is not None

    def begin(self, block: int) -> None:
        """See `Product`."""
        self._coordinates = self._stored.of(block)

    def columns(self, groups: Sequence[str]) -> slice:
        """See `Product`."""
        assert self._in_group is not None, "a dual kernel takes no features"
        return self._in_group.columns(groups)

    def write(self, rows: Rows, out_NGQ: np.ndarray) -> None:
        """See `Product`."""
        assert self._in_group is not None, "a dual kernel takes no features"
        self._in_group.write(rows, out_NGQ)

    def finish(self, rows: slice, out_NMQ: np.ndarray) -> bool:
        """See `Product`."""
        np.matmul(self._coordinates[rows], self._values.T, out=out_NMQ.reshape(-1, len(self._values)))
        return True


def _refuse_another_build(artifact: QueryArtifact, kernel: FullKernelArtifact) -> None:
    """Make sure that coefficients are of the kernel whose coordinates they are to meet."""
    facts = artifact.log.require(0, f"{artifact.folder}: not written. Run `gradstore contribute` again.").facts
    if facts["kernel"] != kernel.content:
        url = artifact.storage.url
        raise ContractError(
            f"{url}/{artifact.folder}: was made with another build of {kernel.folder}. Run `gradstore prune {url} "
            f"{artifact.folder}`, then `gradstore contribute`: it makes it anew."
        )


def _partials_names(place: Place, swept: str) -> tuple[str, str, str]:
    """Names of what queries are made from; two runs at once, of kernels of other names, have theirs apart."""
    return f"queries-{swept}", f"{place[0]}.{place[1]}", _ROTATED


def _finite(rows: np.ndarray) -> np.ndarray:
    """Coordinates with zeros for rows that are not valid."""
    return np.where(np.isfinite(rows).all(1)[:, None], rows, 0)
