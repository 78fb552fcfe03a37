"""Building the kernel across groups: its route, and the graph of tasks that go that way (ADR 0016)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gradstore.cluster import Engine, Task
from gradstore.plan.full import full_options, full_sizes, route_of
from gradstore.plan.routes import Route, num_parts
from gradstore.plan.sizes import BLOCKS_PER_WORKER, split
from gradstore.spec import RunSpec
from gradstore.stages.full_kernel import find_full, find_route, lost_digits, route_name
from gradstore.stages.kernel.sums import (
    BASIS,
    GRAM,
    POWER,
    Place,
    decompose,
    finish_low_rank,
    orthonormalize_step,
    partials_names,
    project_blocks,
    sum_gram,
    sum_power,
)
from gradstore.stages.progress import Progress
from gradstore.stages.reading import full_width, members_of
from gradstore.store.artifacts import FullKernelArtifact, FullKernelShape, PartialsArtifact, remove_partials
from gradstore.store.features import FeatureSet, FeatureStore

# What is lost of C by rounding is told where it is more than this.
_TOLD_ROUNDING: Final = 1e-4


def build_full(spec: RunSpec, engine: Engine, progress: Progress, train: FeatureSet, members: Sequence[str]) -> None:
    """Write the full kernels of members, or of the mean of all, as far as the store does not hold them yet: by one route.

    Raises
    ------
    NotReadyError
        If blocks of the train set are missing.
    ContractError
        If such a kernel was built from other features or with other options.
    ResourceError
        If no route fits a worker, or the one that run.toml asks for does not.
    SpecError
        If the dual route is asked for where the kernel is of the mean of members.
    """
    route = find_route(FeatureStore.open(spec.run.store), spec)
    for member in members:
        artifact = _create(spec, train, member, route)
        route = artifact.shape.route
        _run(_Build(spec=spec, artifact=artifact, train=train, member=member), engine, progress)


def _run(build: _Build, engine: Engine, progress: Progress) -> None:
    """Run the tasks that are missing of one kernel, and remove its partial sums."""
    artifact, train, member = build.artifact, build.train, build.member
    outdated = artifact.outdated_units()
    if outdated:
        progress.note(f"kernel full {member}: {artifact.shape.route}: {artifact.reason}")
        tasks = [*(build.low_rank(outdated) if artifact.shape.route == "low_rank" else build.exact())]
        label = "kernel full" if len(train.info.members) == 1 else f"kernel full {member}"
        total = sum(task.rows for task in tasks)
        # Rows are counted as often as they are read.
        unit, passes = ("groups", 1.0) if artifact.shape.route == "dual" else ("rows", total / train.info.num_examples)
        with progress.stage(label, total, unit, total_bytes=int(passes * _feature_bytes(train, member))) as advance:
            for task, _ in engine.run(tasks):
                if task.rows:
                    advance(task.rows)
        progress.note(_told(artifact, member))
    _tell_rounding(build, progress)
    of, member, _ = partials_names(build.place, "")
    remove_partials(train.storage, of, member)


def _feature_bytes(train: FeatureSet, member: str) -> int:
    """Bytes of the features that the kernel is built from."""
    return len(members_of(train, member)) * train.info.num_examples * train.info.row_bytes


def _tell_rounding(build: _Build, progress: Progress) -> None:
    """Tell of dampings so small that what float32 rounds is much of C."""
    train = members_of(build.train, build.member)[0]
    for swept in build.spec.sweep():
        damping = full_options(swept).damped_by
        lost = lost_digits(build.artifact, train, damping)
        if lost > _TOLD_ROUNDING:
            progress.note(
                f"kernel full {build.member}: at damping {damping.value:g}, products in float32 may lose {lost:.0e} of C. Raise "
                'kernel.damping, or set kernel.route = "dual" with kernel.spectra = "float64" where that fits'
            )


def _told(artifact: FullKernelArtifact, member: str) -> str:
    facts = artifact.facts(artifact.spectrum_unit)
    kept = f"{artifact.shape.eigenvalues} eigenvalues hold {facts['captured']:.2%} of the trace {facts['trace']:.6g}"
    return f"kernel full {member}: {artifact.shape.route}: {kept}"


def _create(spec: RunSpec, train: FeatureSet, member: str, begun: Route | None) -> FullKernelArtifact:
    """Create the artifact: of the route that run.toml asks for, that kernels are ``begun`` by, or else that fits."""
    kernel, info = full_options(spec), train.info
    widths = {array.name: full_width(array) for array in info.arrays}
    trains = members_of(train, member)
    width, rank = sum(widths.values()), kernel.rank
    found = find_full(FeatureStore.open(spec.run.store), spec, member)
    if found is None or found.outdated_units():
        route, reason = route_of(spec, (info.rows, width), begun)
    else:
        route, reason = found.shape.route, found.reason
    eigenvalues, dimensions = full_sizes(kernel, route, (info.rows, width))
    settings: dict[str, Any] = {
        "kind": "full",
        "train": [item.snapshot().to_json() for item in trains],
        "data": info.data_hash,
    }
    if route == "low_rank":
        settings |= {
            "rank": rank,
            "oversample": kernel.oversample,
            "iterations": kernel.iterations,
            "seed": spec.run.seed,
        }
    return FullKernelArtifact.create(
        train.storage,
        route_name(route, rank),
        member,
        settings=settings,
        shape=FullKernelShape(
            route=route,
            widths=widths,
            members=() if route == "primal" else tuple(item.member for item in trains),
            eigenvalues=eigenvalues,
            dimensions=dimensions,
            dtype=kernel.spectra,
            rows=info.rows,
            block_rows=info.block_rows,
            gaps=info.gaps,
        ),
        reason=reason,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """The tasks that build one full kernel, each after those that it needs."""

    spec: RunSpec
    artifact: FullKernelArtifact
    train: FeatureSet
    member: str

    def exact(self) -> Iterator[Task]:
        """Partial sums of the Gram matrix over rows or groups, then its decomposition."""
        shape, info = self.artifact.shape, self.train.info
        primal = shape.route == "primal"
        side = shape.dimensions if primal else info.rows
        items: Sequence[Any] = range(info.num_blocks) if primal else [*shape.widths]
        partials = self._partials(GRAM, items, (side, side))
        sums = []
        for part, summed in enumerate(partials.parts):
            rows = self._rows(summed) if primal else len(summed)
            sums.append(self._task(GRAM, sum_gram, (part,), rows=rows, number=part))
        yield from sums
        yield self._task("decompose", decompose, after=tuple(task.name for task in sums))

    def low_rank(self, outdated: Sequence[int]) -> Iterator[Task]:
        """Power iterations where there is no basis yet; then the rows' coordinates in it, and the spectrum."""
        info, artifact = self.train.info, self.artifact
        ready: tuple[str, ...] = ()
        blocks: Sequence[int] = [block for block in range(info.num_blocks) if artifact.block_unit(block) in outdated]
        if 0 in outdated:
            blocks = range(info.num_blocks)
            for step in range(artifact.settings["iterations"]):
                yield from (steps := [*self._power(step, ready)])
                ready = (steps[-1].name,)
        projected = []
        for number, span in enumerate(split(blocks, BLOCKS_PER_WORKER * self.spec.cluster.num_workers)):
            arguments = ([*span],)
            projected.append(
                self._task("project", project_blocks, arguments, rows=self._rows(span), number=number, after=ready)
            )
        yield from projected
        yield self._task("finish", finish_low_rank, after=tuple(task.name for task in projected))

    def _power(self, step: int, ready: tuple[str, ...]) -> Iterator[Task]:
        """Tasks of one power iteration; the last of them makes it orthonormal."""
        phase, shape = f"{POWER}-{step}", self.artifact.shape
        basis = (sum(shape.widths.values()), shape.dimensions)
        partials = self._partials(phase, range(self.train.info.num_blocks), basis)
        if step:
            self._partials(f"{BASIS}-{step}", [step], basis)
        sums = [
            self._task(phase, sum_power, (step, part), rows=self._rows(blocks), number=part, after=ready)
            for part, blocks in enumerate(partials.parts)
        ]
        yield from sums
        yield self._task(f"{BASIS}-{step}", orthonormalize_step, (step,), after=tuple(task.name for task in sums))

    def _partials(self, phase: str, items: Sequence[Any], shape: tuple[int, int]) -> PartialsArtifact:
        parts = num_parts(len(items), self.spec.cluster.num_workers, 8 * shape[0] * shape[1])
        return PartialsArtifact.create(
            self.train.storage,
            partials_names(self.place, phase),
            settings={"of": dict(self.artifact.settings)},
            parts=split(items, parts),
            shape=shape,
        )

    def _task(
        self,
        phase: str,
        function: Any,
        arguments: tuple[Any, ...] = (),
        *,
        rows: int = 0,
        number: int = 0,
        after: tuple[str, ...] = (),
    ) -> Task:
        return Task(
            name=f"kernel-full-{self.member}-{phase}-{number:04d}",
            function=function,
            arguments=(self.spec.run.store, self.place, *arguments),
            rows=rows,
            after=after,
            lower=("kernel.rank", "features.block_rows"),
        )

    @property
    def place(self) -> Place:
        """Name and member of the kernel, and the run's name for it."""
        name = route_name(self.artifact.shape.route, self.artifact.settings.get("rank", 0))
        return name, self.member, self.spec.kernel.name

    def _rows(self, blocks: Sequence[int]) -> int:
        return sum(stop - start for start, stop in map(self.train.info.block_range, blocks))
