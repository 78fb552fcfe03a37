"""The arithmetic of a plan: how rows are cut into blocks, groups into bundles and queries into tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Self, TypeVar

from gradstore.groups import ParameterGroup, Part
from gradstore.plan.combinations import LOWEST_OBJECTIVES
from gradstore.plan.resolve import ModelShape
from gradstore.spec import FeaturesSection, RunSpec
from gradstore.store.dtypes import DTYPES, DtypeName

if TYPE_CHECKING:
    from gradstore.numerics.projection import Projection

T = TypeVar("T")
ITEM_BYTES: Mapping[str, int] = {name: dtype.item_bytes for name, dtype in DTYPES.items()}
# Where every row of a group has a scale of its own: one float32.
SCALE_BYTES = 4
MIN_BLOCK_ROWS = 16
MAX_CHUNK_BYTES = 8 * 2**20
REFUSED_CHUNK_BYTES = 64 * 2**20
BLOCKS_PER_WORKER = 4
BLOCK_SECONDS = 300
MAX_OBJECTS = 1_000_000
# Tokens of a batch where run.toml leaves it open: on a CPU the rate is flat from here; on a GPU a probe goes on from here.
AUTO_TOKEN_BUDGET = 4096
PUT_DOLLARS = 5e-6
# Floating point operations a second that a worker is assumed to reach; used for the five-minute rule of blocks only.
ASSUMED_RATE = {"cpu": 1e11, "cuda": 2e14}
# Part of a worker's memory that the features of one block may take.
BLOCK_MEMORY_SHARE = 0.25
KERNEL_BUNDLES = 32
BUNDLE_BYTES = 2**30
CONTRIBUTION_CHUNK_BYTES = 8 * 2**20, 32 * 2**20
LEARNER_TILE_BYTES = 2 * 2**30
# Blocks of C that certifying weights holds: one is worked on while the next is read; and what each may take.
LEARNER_BUFFERS = 2
LEARNER_BUFFER_BYTES = 2**25
BLOCK_OBJECTS = 3  # of a member: example part, statistics, commit record; the inputs come on top
SET_OBJECTS = 3  # claim.0.json, set.0.json, and zarr.json of the set
# Blocks that one task of featurize computes, writing one while the next is computed; fewer where workers would run out.
BLOCKS_PER_TASK = 4
TASKS_PER_WORKER = 8
# Rows that a ranking keeps at least: precision is measured at 10.
RANKED_ROWS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentPlan:
    """The pre-pass for principal components.

    Attributes
    ----------
    bundles
        Its tasks, each of some parts.
    parts
        Parts of all groups.
    matrix_bytes
        Bytes of the matrices that it finds.
    moment_bytes
        Bytes of the second moments of the largest bundle.
    longest_side
        The longest side of a part: what the largest decomposition is of.
    """

    bundles: int
    parts: int
    matrix_bytes: int
    moment_bytes: int
    longest_side: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """What a projection makes of every group.

    Attributes
    ----------
    stored
        k_j, its features as they are stored.
    full
        Its features as kernels see them: of rank-c factors those of the matrices that they stand for.
    sides
        (r_o, r_i) of each of its parts, where features are matrices of them.
    components
        The pre-pass that the projection needs, if any.
    """

    stored: tuple[int, ...]
    full: tuple[int, ...]
    sides: tuple[tuple[tuple[int, int], ...], ...]
    components: ComponentPlan | None = None

    @classmethod
    def of(cls, projection: Projection, groups: Sequence[ParameterGroup]) -> Self:
        """Return those of a projection and the groups of a model."""
        from gradstore.numerics.projection import Finishing

        stored = full = tuple(projection.width(group) for group in groups)
        if isinstance(projection, Finishing):
            full = tuple(projection.summed_width(group) for group in groups)
        components = _component_plan(projection, groups) if projection.needs_matrices else None
        shapes = [[projection.shape(part) for part in group.parts] for group in groups]
        sides = tuple(tuple(shape for shape in of if shape is not None) for of in shapes)
        return cls(stored=stored, full=full, sides=sides, components=components)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPlan:
    """One feature set: its rows, blocks, objects and bytes.

    ``feature_bytes`` are those of its features alone and of the scales of their rows, of all members, before any compression;
    stored chunks are padded to whole blocks, and end in a checksum.
    """

    name: str
    rows: int
    length: int
    dtype: DtypeName
    compression: str
    block_rows: int
    blocks: int
    objects: int
    feature_bytes: int
    largest_chunk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage.

    Attributes
    ----------
    name
        Its verb.
    tasks
        Tasks that run on workers.
    objects
        Objects that it writes; exact.
    written_bytes
        Bytes that it writes: of arrays exactly, before any compression, of the tables of learn and score about; metadata,
        records and the tables of feature sets come on top.
    task_memory_bytes
        Memory of one task at its highest; 0 where there is none.
    client_memory_bytes
        Memory that the stage takes in the process that runs the command; 0 where it only waits for tasks.
    """

    name: str
    tasks: int
    objects: int
    written_bytes: int
    task_memory_bytes: int
    client_memory_bytes: int = 0


class Sizes:
    """The division of a run's work, from shapes.

    Parameters
    ----------
    spec
        The run.
    model
        Names and shapes of the model.
    widths
        k_j, the features of every group.
    device
        Where features are computed.
    """

    def __init__(self, spec: RunSpec, model: ModelShape, widths: Sequence[int], device: str) -> None:
        self._spec = spec
        self._model = model
        self._groups = model.partition.groups
        self._parameters = model.partition.total_parameters
        self.widths = widths
        self.device = device
        self.workers = spec.cluster.num_workers
        self.members = len(spec.model.etas)
        self.worker_memory = spec.cluster.worker_memory_bytes

    def set_plan(self, name: str, rows: int, length: int) -> SetPlan:
        """Plan one feature set of ``rows`` examples of at most ``length`` tokens."""
        dtype = stored_dtype(name, self._spec.features)
        item = ITEM_BYTES[dtype]
        block_rows = self._spec.features.block_rows or self._block_rows(rows, length, dtype)
        blocks = math.ceil(rows / block_rows)
        return SetPlan(
            name=name,
            rows=rows,
            length=length,
            dtype=dtype,
            compression=self._spec.features.compression if name == "train" else "none",
            block_rows=block_rows,
            blocks=blocks,
            objects=self._objects(rows, block_rows, dtype),
            feature_bytes=self.feature_bytes(dtype, rows),
            largest_chunk_bytes=block_rows * max(self.widths) * item,
        )

    def feature_bytes(self, dtype: str, rows: int) -> int:
        """Bytes of the features of ``rows`` examples in a type, of all members."""
        return self.members * rows * (sum(self.widths) * ITEM_BYTES[dtype] + row_scale_bytes(dtype, len(self.widths)))

    def _block_rows(self, rows: int, length: int, dtype: DtypeName) -> int:
        """Return the largest power of two within the four rules of architecture.md, and at least MIN_BLOCK_ROWS."""
        # A block takes the same memory before it is rounded, so int8 has no more rows than the types of 16 bits.
        item = max(ITEM_BYTES[dtype], 2)
        widest = max(self.widths) * item
        in_memory = self.worker_memory * BLOCK_MEMORY_SHARE / (sum(self.widths) * (4 + item))
        in_chunk = MAX_CHUNK_BYTES / widest
        seconds_a_row = 4 * self._parameters * length / ASSUMED_RATE[self.device]
        bound = min(in_memory, in_chunk, BLOCK_SECONDS / seconds_a_row, rows / (BLOCKS_PER_WORKER * self.workers))
        block_rows = max(_power_of_two(bound), MIN_BLOCK_ROWS)
        # Many objects cost requests and listings: give up the last two rules, never memory or chunk size.
        while self._objects(rows, block_rows, dtype) > MAX_OBJECTS and 2 * block_rows <= min(in_memory, in_chunk):
            block_rows *= 2
        return block_rows

    def _objects(self, rows: int, block_rows: int, dtype: DtypeName) -> int:
        # Scales of rows are one more array of every member, in a folder of theirs.
        scaled = has_row_scales(dtype)
        arrays = len(self._groups) + scaled
        of_a_block = 1 + self.members * (arrays + BLOCK_OBJECTS)
        return math.ceil(rows / block_rows) * of_a_block + self.members * (arrays + 1) + SET_OBJECTS + scaled


def block_tasks(blocks: Sequence[int], workers: int) -> list[Sequence[int]]:
    """Cut blocks into the consecutive ones of each task of featurize."""
    return split(blocks, max(TASKS_PER_WORKER * workers, math.ceil(len(blocks) / BLOCKS_PER_TASK)))


def component_bundles(groups: Sequence[ParameterGroup]) -> list[list[str]]:
    """The parts of each task of the pre-pass for principal components: their second moments take about BUNDLE_BYTES.

    The moments of a part [O, I] take 8 (O^2 + I^2) bytes, but those of an embedding's rows, which are counts.
    """
    bundles: list[list[str]] = []
    held = BUNDLE_BYTES
    for group in groups:
        for part in group.parts:
            taken = moment_bytes(part)
            if held + taken > BUNDLE_BYTES:
                bundles.append([])
                held = 0
            bundles[-1].append(part.key)
            held += taken
    return bundles


def _component_plan(projection: Projection, groups: Sequence[ParameterGroup]) -> ComponentPlan:
    parts = {part.key: part for group in groups for part in group.parts}
    bundles = component_bundles(groups)
    ranks = {key: projection.shape(part) or (0, 0) for key, part in parts.items()}
    return ComponentPlan(
        bundles=len(bundles),
        parts=len(parts),
        matrix_bytes=sum(
            4 * (ranks[key][0] * part.out_features + ranks[key][1] * part.in_features) for key, part in parts.items()
        ),
        moment_bytes=max(sum(moment_bytes(parts[key]) for key in bundle) for bundle in bundles),
        longest_side=max(max(part.out_features, part.in_features) for part in parts.values()),
    )


def moment_bytes(part: Part) -> int:
    """Bytes of the two second moments of a part."""
    return 8 * (part.out_features**2 + part.in_features**2)


def learner_tile(contributions: tuple[int, int, int]) -> int:
    """Queries that the learner holds at once, where C has the shape ``contributions`` [Q, N, M].

    The order of its visits, and so the weights, depend on it: it follows from the shape alone, never from how C is stored.
    """
    queries, rows, groups = contributions
    return max(1, min(queries, LEARNER_TILE_BYTES // (4 * rows * groups)))


def weightings(spec: RunSpec) -> int:
    """How many rankings a run makes under each kernel: unweighted, and by every weight vector."""
    if spec.contribute.mode == "scores":
        return 1 if spec.contribute.weights is None else 2
    return 1 + len({*(name for _, name in spec.learn_targets()), *spec.score.weights})


def certifies(spec: RunSpec) -> bool:
    """Whether learn certifies weights; else it streams C once for every epoch."""
    return spec.learn.method == "certified" and spec.learn.objective not in LOWEST_OBJECTIVES


def verified_queries(contributions: tuple[int, int], block_rows: int, tile: int) -> int:
    """Queries whose C, of one block, is verified at once: whole tiles of C's chunks, of [Q, M] = ``contributions`` queries."""
    queries, groups = contributions
    tiles = max(1, LEARNER_BUFFER_BYTES // (4 * tile * block_rows * groups))
    return min(queries, tiles * tile)


def query_tile(contributions: tuple[int, int, int], block_rows: int, dtype: DtypeName) -> int:
    """Queries in one chunk of C, in tiles of about as many: chunks are of 8 to 32 MiB where there are queries enough.

    Between these it is about a multiple of what the learner holds at once, so that it reads little that it does not need.
    """
    queries, _, groups = contributions
    a_query = groups * ITEM_BYTES[dtype] * block_rows
    least, most = (max(1, size // a_query) for size in CONTRIBUTION_CHUNK_BYTES)
    learned = learner_tile(contributions)
    multiple = learned * math.ceil(least / learned)
    tiles = math.ceil(queries / (multiple if multiple <= most and learned < queries else most))
    return math.ceil(queries / tiles)


def stored_dtype(set_name: str, features: FeaturesSection) -> DtypeName:
    """Return the dtype a set is stored in: train as the run says, queries always in float32 (they are few)."""
    return features.dtype if set_name == "train" else "float32"


def has_row_scales(dtype: str) -> bool:
    """Whether every row of a group has a scale of its own."""
    return DTYPES[dtype].scaled == "row"


def row_scale_bytes(dtype: str, groups: int) -> int:
    """Bytes of the scales of one row."""
    return SCALE_BYTES * groups if has_row_scales(dtype) else 0


def split(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Cut a sequence into consecutive runs, ``parts`` or as many as it has items, of lengths that differ by at most one."""
    parts = min(parts, len(items))
    edges = [len(items) * part // max(parts, 1) for part in range(parts + 1)]
    return [items[first:last] for first, last in pairwise(edges)]


def _power_of_two(bound: float) -> int:
    return 2 ** int(math.log2(bound)) if bound >= 1 else 1


def gigabytes(count: float) -> str:
    """Format a number of bytes for a reader, in decimal units as storage is sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size < 1000 else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"
