"""The kernel across groups as stages find it, and features as it takes them: those of all groups side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from gradstore.errors import NotReadyError
from gradstore.plan.full import full_options
from gradstore.plan.routes import Route
from gradstore.spec import RunSpec
from gradstore.stages.reading import full_width, next_mean
from gradstore.stages.spectra import require_current
from gradstore.store.artifacts import FullKernelArtifact
from gradstore.store.features import BlockReader, FeatureSet, FeatureStore

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Damping

# Half a unit in the last place of float32, in which products of C are taken.
_ROUNDING: Final = 2.0**-24
# In the order in which one is taken that is there, where the run leaves the route open.
ROUTES: Final[tuple[Route, ...]] = ("primal", "dual", "low_rank")


def route_name(route: str, rank: int) -> str:
    """Name under which the kernel of a route is stored: kernels of several routes and ranks have room in one store."""
    return f"low_rank-{rank}" if route == "low_rank" else route


def find_route(store: FeatureStore, spec: RunSpec) -> Route | None:
    """Return the one route by which all members have their kernels; None if the run leaves it open and none is begun.

    Of several that are there it is the one by which most members' kernels are complete, or else begun.
    """
    asked = full_options(spec).route
    if asked != "auto":
        return asked
    names = store.open_set("train").info.members
    members = dict.fromkeys(spec.kernel.of_member(name) for name in names)
    begun = {route: [kernel for member in members if (kernel := _find(store, spec, route, member))] for route in ROUTES}

    def there(route: Route) -> tuple[int, int]:
        return sum(not kernel.outdated_units() for kernel in begun[route]), len(begun[route])

    best = max(ROUTES, key=there)
    return best if begun[best] else None


def find_full(store: FeatureStore, spec: RunSpec, member: str) -> FullKernelArtifact | None:
    """Return the full kernel that the run names and the store holds, built or begun, of the features of ``member``.

    It is of the route that all members share: their coefficients and coordinates add up to one C.
    """
    route = find_route(store, spec)
    return None if route is None else _find(store, spec, route, member)


def _find(store: FeatureStore, spec: RunSpec, route: Route, member: str) -> FullKernelArtifact | None:
    return FullKernelArtifact.find_named(store.storage, route_name(route, full_options(spec).rank), member)


def open_full(store: FeatureStore, spec: RunSpec, member: str) -> FullKernelArtifact:
    """Open the kernel that applies to a member: its own, or that of the mean of all.

    Raises
    ------
    NotReadyError
        If it is not there, or not complete.
    ContractError
        If the train set has changed since it was built.
    """
    built = spec.kernel.of_member(member)
    found = find_full(store, spec, built)
    if found is None:
        raise NotReadyError(
            f"{store.storage.url}/full-kernels: there is no full kernel of {built} by kernel.route = "
            f'"{find_route(store, spec) or "auto"}". Run `gradstore kernel` first.'
        )
    require_current(found, store)
    missing = found.outdated_units()
    if missing:
        raise NotReadyError(
            f"{store.storage.url}/{found.folder}: {len(missing)} of {found.info.num_units} parts are missing. Run `gradstore "
            "kernel` again: it goes on from there."
        )
    return found


def kernel_settings(store: FeatureStore, spec: RunSpec) -> dict[str, Any]:
    """What artifacts keep of the full kernel of a run: its options, with the route that it is of, as far as they count."""
    kernel, members = full_options(spec), store.open_set("train").info.members
    route = open_full(store, spec, members[0]).shape.route
    options = {"kind": spec.kernel.kind, **asdict(kernel), "route": route}
    if route != "low_rank":
        options = {key: value for key, value in options.items() if key not in ("rank", "iterations", "oversample")}
    return options


def built(store: FeatureStore, spec: RunSpec, members: Sequence[str]) -> dict[str, str]:
    """Hash of what every member's kernel came out as: coefficients of another build do not fit its coordinates."""
    return {member: open_full(store, spec, member).content for member in members}


def rows_held(kernel: FullKernelArtifact, train: FeatureSet, damping: Damping) -> int | None:
    """How many of the largest eigenvectors of Phi^T Phi are to count where the kernel meets a member's rows; None for all.

    The kernel of the mean of members is built from other rows than theirs.
    """
    from gradstore.numerics.kernel.full import hold_rows

    if kernel.folder.rpartition("/")[2] != train.member:
        return None
    eigenvalues = kernel.read_eigenvalues()
    num_rows = min(int(valid_rows([train]).sum()), sum(kernel.shape.widths.values()))
    held = hold_rows(eigenvalues, num_rows, damping.shift(eigenvalues, kernel.mean_eigenvalue))
    return num_rows if held else None


def lost_digits(kernel: FullKernelArtifact, train: FeatureSet, damping: Damping) -> float:
    """About how much of C, relative to its largest, products in float32 may lose: see docs/kernels.md."""
    shape, eigenvalues = kernel.shape, np.sort(kernel.read_eigenvalues())[::-1]
    shift, held = damping.shift(eigenvalues, kernel.mean_eigenvalue), rows_held(kernel, train, damping)
    if shift == 0 or (shape.route == "dual" and shape.dtype == "float64"):
        return 0.0
    least = 0.0 if held is None else float(eigenvalues[held - 1])
    lost = float(eigenvalues[0]) / (least + shift)
    if held is None and shape.route == "low_rank":
        # What is not captured counts 1 / lambda too, and C is no smaller than that.
        beside = 1 - float(kernel.facts(kernel.spectrum_unit)["captured"])
        lost = min(lost, 1 / max(beside, _ROUNDING))
    return _ROUNDING * lost


class SideBySide:
    """Features of groups side by side, as kernels see them; what is not valid is zero.

    Parameters
    ----------
    sets
        The set as one member has it, or as several have it of whose mean the features are.
    dtype
        Type that the features are given in.
    groups
        The groups, in the order of the set; all by default.
    """

    def __init__(self, sets: Sequence[FeatureSet], dtype: str, groups: Sequence[str] | None = None) -> None:
        self.sets = sets
        self.info = sets[0].info
        self._arrays = [array for array in self.info.arrays if groups is None or array.name in groups]
        self.widths = {array.name: full_width(array) for array in self._arrays}
        self.edges = [0, *accumulate(self.widths.values())]
        self.dtype = np.dtype(dtype)

    def slices(self) -> dict[str, slice]:
        """Columns of every group."""
        return {group: slice(*edges) for group, edges in zip(self.widths, pairwise(self.edges), strict=True)}

    def of(self, group: str) -> SideBySide:
        """Return the features of one of the groups alone."""
        return SideBySide(self.sets, self.dtype.name, [group])

    def blocks(self, blocks: Sequence[int]) -> Iterator[tuple[int, npt.NDArray[np.floating]]]:
        """(block, features [rows of the block, D]) one after another, each in the place of the one before."""
        from gradstore.numerics.kernel import zero_invalid

        invalid = {block for each in self.sets for block in each.invalid_blocks()}
        buffer = np.empty((self.info.block_rows, self.edges[-1]), self.dtype)
        ahead = max(len(self.sets), self.sets[0].storage.concurrency)
        reader = BlockReader(self.sets, [[array.name] for array in self._arrays], ahead=ahead)
        columns = self.slices()
        with closing(reader.read(blocks)) as pieces:
            for block in blocks:
                start, stop = self.info.block_range(block)
                for array in self._arrays:
                    rows = next_mean(pieces, array, len(self.sets))
                    if block in invalid:
                        zero_invalid(rows)
                    buffer[: stop - start, columns[array.name]] = rows
                yield block, buffer[: stop - start]


def valid_rows(sets: Sequence[FeatureSet]) -> npt.NDArray[np.bool_]:
    """Which rows [rows] are of an example that is valid in every one of the sets."""
    return np.asarray(np.logical_and.reduce([each.valid_rows() for each in sets]))


def query_features(queries: FeatureSet, groups: Sequence[str] | None = None) -> npt.NDArray[np.float32]:
    """Features [Q, D] of groups of a small set side by side; zero of queries that are not valid, and in gaps."""
    read = SideBySide([queries], "float32", groups)
    found = np.zeros((queries.info.rows, read.edges[-1]), np.float32)
    for block, rows in read.blocks(range(queries.info.num_blocks)):
        found[slice(*queries.info.block_range(block))] = rows
    return found
