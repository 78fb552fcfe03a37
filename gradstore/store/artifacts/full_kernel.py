"""The kernel across all groups: eigenvalues, and eigenvectors as the route that it was built by has them (ADR 0016)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt

from gradstore.spec import content_hash
from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo, only_chunks
from gradstore.store.backend import Storage
from gradstore.store.codecs import Payload, encode_chunk
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout, RowBlocks, chunk_path, group_array

_EIGENVALUES: Final = "spectrum/eigenvalues"
_ROTATION: Final = "spectrum/rotation"
_BASIS: Final = "basis"
_COORDINATES: Final = "coordinates"
# Unit of the basis in an artifact of many: the blocks come after it, and the spectrum last.
BASIS_UNIT: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FullKernelShape(RowBlocks):
    """What is stored of a full kernel.

    Attributes
    ----------
    route
        ``primal``: the eigenvectors of Phi^T Phi, a row of the basis for each feature. ``dual``: those of Phi Phi^T, as
        coordinates of rows. ``low_rank``: an orthonormal basis, the rows' coordinates in it, and what turns either into
        (coordinates in) eigenvectors.
    widths
        Features of every group.
    members
        Those whose rows have coordinates.
    eigenvalues
        How many are kept.
    dimensions
        Columns of the basis and of coordinates.
    dtype
        Stored type of all but eigenvalues.
    rows, block_rows, gaps
        As in the training set.
    """

    route: Literal["primal", "dual", "low_rank"]
    widths: Mapping[str, int]
    members: tuple[str, ...] = field(default=())
    eigenvalues: int
    dimensions: int
    dtype: Literal["float32", "float64"] = "float32"

    def basis_layout(self, group: str) -> ArrayLayout:
        """Layout of a group's rows of the basis: one chunk."""
        shape = (self.widths[group], self.dimensions)
        names = (f"feature:{group}", "dimension")
        return ArrayLayout(
            shape=shape, chunk_shape=shape, dtype=self.dtype, dimension_names=names, attributes={"group": group}
        )

    def coordinates_layout(self) -> ArrayLayout:
        """Layout of the coordinates of a member's rows, in chunks of a block."""
        return ArrayLayout(
            shape=(self.rows, self.dimensions),
            chunk_shape=(self.block_rows, self.dimensions),
            dtype=self.dtype,
            dimension_names=("example", "dimension"),
        )

    def spectrum_layouts(self) -> dict[str, ArrayLayout]:
        """Layouts of the eigenvalues, and of what turns the basis into eigenvectors where it is not of them."""
        values, rotation = (self.eigenvalues,), (self.dimensions, self.eigenvalues)
        found = {
            _EIGENVALUES: ArrayLayout(
                shape=values, chunk_shape=values, dtype="float64", dimension_names=("eigenvector",)
            )
        }
        if self.route == "low_rank":
            found[_ROTATION] = ArrayLayout(
                shape=rotation, chunk_shape=rotation, dtype="float64", dimension_names=("dimension", "eigenvector")
            )
        return found


class FullKernelArtifact(Artifact):
    """One member's kernel across groups, at ``full-kernels/<route>/<member>``.

    It is one unit; of the low-rank route the basis is the first, then come the blocks' coordinates, and last the spectrum.
    Each of these says in its facts from which attempt at the basis it comes.
    """

    kind: ClassVar[str] = "full_kernel"

    @classmethod
    def create(
        cls,
        storage: Storage,
        name: str,
        member: str,
        *,
        settings: Mapping[str, Any],
        shape: FullKernelShape,
        reason: str,
    ) -> FullKernelArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, name, member
            Where, the route (with its rank), and whose features it is built from.
        settings
            What is compared: the feature set and its snapshot, and what else the numbers depend on.
        shape
            What is stored; compared too.
        reason
            Why this route; recorded by the first creator.

        Raises
        ------
        ContractError
            If an artifact of that name is there with other settings.
        """
        info = ArtifactInfo(
            kind=cls.kind,
            num_units=shape.num_blocks + 2 if shape.route == "low_rank" else 1,
            settings={**settings, "shape": asdict(shape)},
            recorded={"reason": reason},
        )
        made = cls._create(storage, (name, member), info)
        made._publish_arrays()
        return made

    @classmethod
    def open(cls, storage: Storage, name: str, member: str) -> FullKernelArtifact:
        """Open the artifact; NotReadyError if there is none of that name."""
        return cls._open(storage, (name, member))

    @cached_property
    def shape(self) -> FullKernelShape:
        """What is stored."""
        values = self.settings["shape"]
        gaps = tuple((start, stop) for start, stop in values["gaps"])
        return FullKernelShape(**{**values, "members": tuple(values["members"]), "gaps": gaps})

    @property
    def reason(self) -> str:
        """Why it is of its route."""
        return str(self.info.recorded["reason"])

    @property
    def spectrum_unit(self) -> int:
        """The unit that holds the eigenvalues: the last."""
        return self.info.num_units - 1

    def block_unit(self, block: int) -> int:
        """The unit that holds the coordinates of a block's rows, in an artifact of many."""
        return block + 1

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        shape = self.shape
        return {**shape.spectrum_layouts(), **self._bases(), **self._coordinates()}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        shape = self.shape
        if shape.route != "low_rank":
            every = {
                chunk_path(path, block, 0): layout
                for path, layout in self._coordinates().items()
                for block in range(shape.num_blocks)
            }
            return only_chunks({**shape.spectrum_layouts(), **self._bases()}) | every
        if unit == BASIS_UNIT:
            return only_chunks(self._bases())
        if unit == self.spectrum_unit:
            return only_chunks(shape.spectrum_layouts())
        return {chunk_path(path, unit - 1, 0): layout for path, layout in self._coordinates().items()}

    @property
    def content(self) -> str:
        """Hash of the basis and the spectrum: another where the kernel was built anew and came out otherwise."""
        records = [self._record(unit) for unit in dict.fromkeys((BASIS_UNIT, self.spectrum_unit))]
        return content_hash({path: entry.crc32c for record in records for path, entry in record.objects.items()})

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of all D eigenvalues of Phi^T Phi, those that are not kept included: its trace by D."""
        trace: float = self.facts(self.spectrum_unit)["trace"]
        return trace / sum(self.shape.widths.values())

    def attempt(self, unit: int) -> str:
        """The attempt that wrote a unit; NotReadyError if it is not committed."""
        return self._record(unit).attempt

    def facts(self, unit: int) -> Mapping[str, Any]:
        """What was found of a unit; NotReadyError if it is not committed."""
        return self._record(unit).facts

    def begin(self, unit: int, basis: str | None = None) -> bool:
        """Whether a unit is to be made: it is not committed, or comes from another attempt at the basis, and goes then."""
        existing = self._committed(unit)
        if existing is not None and basis is not None and existing.facts["basis"] != basis:
            self.log.take_back(unit, "the basis that it comes from was made anew")
            return True
        return existing is None

    def outdated_units(self) -> list[int]:
        """Units that are missing, or come from another attempt at the basis than the one that is there."""
        latest = self._committed(BASIS_UNIT)
        if self.shape.route != "low_rank" or latest is None:
            return list(range(self.info.num_units)) if latest is None else self.missing_units()
        records = self.log.committed()
        return [
            unit
            for unit in range(self.info.num_units)
            if unit not in records or records[unit].facts.get("basis", latest.attempt) != latest.attempt
        ]

    def write_exact(
        self,
        eigenvalues: npt.NDArray[np.float64],
        *,
        basis: Mapping[str, npt.NDArray[Any]] | None = None,
        coordinates: npt.NDArray[Any] | None = None,
        facts: Mapping[str, Any],
    ) -> Record:
        """Write and commit a primal kernel with its ``basis``, or a dual one with the ``coordinates`` of all rows."""
        payloads = self._spectrum_payloads({_EIGENVALUES: eigenvalues})
        for group, values in (basis or {}).items():
            payloads |= self._basis_payload(group, values)
        if coordinates is not None:
            for block in range(self.shape.num_blocks):
                rows = coordinates[slice(*self.shape.block_range(block))]
                payloads |= self._block_payload(self.shape.members[0], block, rows)
        assert set(payloads) == set(self.unit_objects(0)), "what is written must be what the route stores"
        return self._write_unit(0, payloads, facts)

    def write_basis(self, basis: Mapping[str, npt.NDArray[Any]], *, facts: Mapping[str, Any]) -> Record:
        """Write and commit the basis, [d_j, dimensions] by group."""
        payloads: dict[str, Payload] = {}
        for group, values in basis.items():
            payloads |= self._basis_payload(group, values)
        assert set(payloads) == set(self.unit_objects(BASIS_UNIT)), "the basis must be that of all groups"
        return self._write_unit(BASIS_UNIT, payloads, facts)

    def write_block(self, block: int, rows: Mapping[str, npt.NDArray[Any]], *, facts: Mapping[str, Any]) -> Record:
        """Write and commit the coordinates of a block's rows, [rows of the block, dimensions] by member."""
        payloads: dict[str, Payload] = {}
        for member, values in rows.items():
            payloads |= self._block_payload(member, block, values)
        assert set(payloads) == set(self.unit_objects(self.block_unit(block))), "every member must have coordinates"
        return self._write_unit(self.block_unit(block), payloads, facts)

    def write_spectrum(
        self, eigenvalues: npt.NDArray[np.float64], rotation: npt.NDArray[np.float64], *, facts: Mapping[str, Any]
    ) -> Record:
        """Write and commit the eigenvalues, and the eigenvectors as columns in the coordinates of the basis."""
        payloads = self._spectrum_payloads({_EIGENVALUES: eigenvalues, _ROTATION: rotation})
        return self._write_unit(self.spectrum_unit, payloads, facts)

    def read_eigenvalues(self) -> npt.NDArray[np.float64]:
        """Eigenvalues, none negative; NotReadyError if they are not committed."""
        return self._read_chunk(self.spectrum_unit, _EIGENVALUES, self.shape.spectrum_layouts()[_EIGENVALUES])

    def read_rotation(self) -> npt.NDArray[np.float64]:
        """What turns the basis into eigenvectors, [dimensions, eigenvalues]; NotReadyError if it is not committed."""
        return self._read_chunk(self.spectrum_unit, _ROTATION, self.shape.spectrum_layouts()[_ROTATION])

    def read_basis(self, group: str) -> npt.NDArray[Any]:
        """A group's rows of the basis, [d_j, dimensions]; NotReadyError if it is not committed."""
        return self._read_chunk(BASIS_UNIT, group_array(_BASIS, group), self.shape.basis_layout(group))

    def read_coordinates(self, member: str, block: int) -> npt.NDArray[Any]:
        """Coordinates of a member's rows of a block; NaN where a row is not valid; NotReadyError if not committed."""
        layout = self.shape.coordinates_layout()
        record = self._record(self.block_unit(block) if self.shape.route == "low_rank" else 0)
        path = chunk_path(group_array(_COORDINATES, member), block, 0)
        start, stop = self.shape.block_range(block)
        return self._read_into(record, path, layout, np.empty(layout.buffer_bytes, np.uint8))[: stop - start]

    def _bases(self) -> dict[str, ArrayLayout]:
        groups = () if self.shape.route == "dual" else self.shape.widths
        return {group_array(_BASIS, group): self.shape.basis_layout(group) for group in groups}

    def _coordinates(self) -> dict[str, ArrayLayout]:
        members = () if self.shape.route == "primal" else self.shape.members
        return {group_array(_COORDINATES, member): self.shape.coordinates_layout() for member in members}

    def _spectrum_payloads(self, arrays: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, Payload]:
        layouts = self.shape.spectrum_layouts()
        assert {path: values.shape for path, values in arrays.items()} == {
            path: layout.shape for path, layout in layouts.items()
        }
        return {
            chunk_path(path, *(0 for _ in values.shape)): encode_chunk(values, layouts[path])
            for path, values in arrays.items()
        }

    def _basis_payload(self, group: str, values: npt.NDArray[Any]) -> dict[str, Payload]:
        layout = self.shape.basis_layout(group)
        assert values.shape == layout.shape
        return {chunk_path(group_array(_BASIS, group), 0, 0): encode_chunk(values, layout)}

    def _block_payload(self, member: str, block: int, values: npt.NDArray[Any]) -> dict[str, Payload]:
        start, stop = self.shape.block_range(block)
        assert values.shape == (stop - start, self.shape.dimensions)
        path = chunk_path(group_array(_COORDINATES, member), block, 0)
        return {path: encode_chunk(values, self.shape.coordinates_layout())}
