"""Kernels that act inside a group: the spectrum of every group, from which any damping is applied later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

import numpy.typing as npt

from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo, only_chunks
from gradstore.store.backend import Storage
from gradstore.store.blocks import in_parallel
from gradstore.store.codecs import encode_chunk
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout, chunk_path, group_array

BasisName = Literal["standard", "vectors", "kronecker"]
# (eigenvalues, then the matrices of their basis) of a group, in the order of `SpectraShape.arrays`.
Arrays = tuple[npt.NDArray[Any], ...]

_SIDES = ("left", "right")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectraShape:
    """What the spectra of a kernel are made of.

    Attributes
    ----------
    widths
        Features of every group that has a spectrum.
    basis
        What the eigenvalues [d] of a group belong to: its features (``standard``), eigenvectors [d, d] (``vectors``), or
        the Kronecker products of two bases of each part (``kronecker``).
    dtype
        Type of the vectors; eigenvalues are float64.
    parts
        Name and matrix (r_o, r_i) of every part of every group, in the order of their features, for ``kronecker``.
    """

    widths: Mapping[str, int]
    basis: BasisName = "vectors"
    dtype: Literal["float32", "float64"] = "float32"
    parts: Mapping[str, Sequence[tuple[str, tuple[int, int]]]] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What an artifact keeps among its settings; where there is no spectrum, only that."""
        if not self.widths:
            return {"widths": {}}
        found: dict[str, Any] = {"widths": dict(self.widths), "basis": self.basis}
        if self.basis != "standard":
            found["spectra"] = self.dtype
        return found | ({"parts": dict(self.parts)} if self.parts else {})

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Return what `settings` made, as an artifact has it."""
        parts = {group: [(name, (r, s)) for name, (r, s) in of] for group, of in settings.get("parts", {}).items()}
        return cls(
            widths=settings["widths"],
            basis=settings.get("basis", "vectors"),
            dtype=settings.get("spectra", "float32"),
            parts=parts,
        )

    def arrays(self, group: str) -> dict[str, ArrayLayout]:
        """Layout, by path, of a group's eigenvalues, then of the matrices of their basis."""
        width, of = self.widths[group], {"group": group}
        vector = f"eigenvector:{group}"
        found = {group_array("eigenvalues", group): _one_chunk((width,), (vector,), "float64", of)}
        if self.basis == "vectors":
            names = f"feature:{group}", vector
            found[group_array("eigenvectors", group)] = _one_chunk((width, width), names, self.dtype, of)
        for part, shape in self.parts.get(group, ()):
            for side, length in zip(_SIDES, shape, strict=True):
                names = f"{side}:{part}", f"eigenvector:{side}:{part}"
                found[group_array(side, part)] = _one_chunk(
                    (length, length), names, self.dtype, {**of, "part": part, "side": side}
                )
        return found

    def covariances(self) -> dict[str, ArrayLayout]:
        """Layout, by path, of the two covariances of every part, summed over the train set."""
        return {
            group_array(f"{side}_covariances", part): _one_chunk(
                (length, length),
                (f"{side}:{part}", f"other:{side}:{part}"),
                "float64",
                {"group": group, "part": part, "side": side},
            )
            for group, parts in self.parts.items()
            for part, shape in parts
            for side, length in zip(_SIDES, shape, strict=True)
        }


class KernelArtifact(Artifact):
    """The spectrum of every group, at ``kernels/<kind>/<member>``; one unit is a bundle of groups.

    With Kronecker bases one more unit, the last, holds the covariances that the bases are of. A kernel that needs no
    spectra, identity, has no unit and is complete when it is created.
    """

    kind: ClassVar[str] = "kernel"

    @classmethod
    def create(
        cls,
        storage: Storage,
        name: str,
        member: str,
        *,
        settings: Mapping[str, Any],
        shape: SpectraShape,
        bundles: Sequence[Sequence[str]],
    ) -> KernelArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, name, member
            Where, under which name, and whose features it is built from.
        settings
            What is compared, beside the shape: kind and options of the kernel, the feature set and its snapshot.
        shape
            What its spectra are made of.
        bundles
            The groups of every bundle; of an artifact that is there, its own bundles count.

        Raises
        ------
        ContractError
            If an artifact of that name is there with other settings, or was built from other features.
        """
        assert sorted(group for bundle in bundles for group in bundle) == sorted(shape.widths), (
            "bundles must partition groups"
        )
        info = ArtifactInfo(
            kind=cls.kind,
            num_units=len(bundles) + bool(shape.parts),
            settings={**settings, **shape.settings()},
            recorded={"bundles": [list(bundle) for bundle in bundles]},
        )
        made = cls._create(storage, (name, member), info)
        made._publish_arrays()
        return made

    @classmethod
    def open(cls, storage: Storage, name: str, member: str) -> KernelArtifact:
        """Open the artifact; NotReadyError if there is none of that name."""
        return cls._open(storage, (name, member))

    @property
    def bundles(self) -> list[list[str]]:
        """The groups of every bundle."""
        return [list(bundle) for bundle in self.info.recorded["bundles"]]

    @cached_property
    def shape(self) -> SpectraShape:
        """What its spectra are made of."""
        return SpectraShape.of(self.settings)

    @property
    def covariances_unit(self) -> int | None:
        """The unit of the covariances, if its bases need any."""
        return len(self.bundles) if self.shape.parts else None

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        return {**self._arrays_of(self.settings["widths"]), **self.shape.covariances()}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        if unit == self.covariances_unit:
            return only_chunks(self.shape.covariances())
        return only_chunks(self._arrays_of(self.bundles[unit]))

    def write_bundle(self, bundle: int, spectra: Mapping[str, Arrays], *, facts: Mapping[str, Any]) -> Record:
        """Write and commit a bundle: of each of its groups the eigenvalues [d], then the matrices of their basis.

        The matrices are [d, d], one vector a column; or for each part [r_o, r_o] and [r_i, r_i]; or none.
        """
        existing = self._committed(bundle)
        if existing is not None:
            return existing
        assert set(spectra) == set(self.bundles[bundle]), "the spectra must be those of the bundle's groups"
        shape = self.shape
        arrays = {}
        for group, values in spectra.items():
            arrays.update(_with_layouts(values, shape.arrays(group)))
        return self._write_arrays(bundle, arrays, facts)

    def write_covariances(self, sums: Arrays, *, facts: Mapping[str, Any]) -> Record:
        """Write and commit the covariances, float64: left [r_o, r_o], then right [r_i, r_i] of every part of every group."""
        unit = self._covariances()
        return self._committed(unit) or self._write_arrays(unit, _with_layouts(sums, self.shape.covariances()), facts)

    def read(self, group: str) -> Arrays:
        """(eigenvalues float64 [d], then the matrices of their basis) of a group, as `write_bundle` took them.

        Raises
        ------
        NotReadyError
            If the group's bundle is not committed.
        """
        bundle = self._bundle_of(group)
        return tuple(self._read_chunk(bundle, path, layout) for path, layout in self.shape.arrays(group).items())

    def attempt(self, group: str) -> str:
        """Return the attempt that wrote the spectrum of a group: another one where it was made anew.

        Raises
        ------
        NotReadyError
            If the group's bundle is not committed.
        """
        return self.log.require(self._bundle_of(group), f"{self.folder}: {group} is not built.").attempt

    def read_covariances(self, groups: Iterable[str]) -> dict[str, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]]:
        """(left, right) float64 covariances of every part of some groups; NotReadyError if they are not committed."""
        unit, shape = self._covariances(), self.shape
        layouts = shape.covariances()

        def read(part: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
            left, right = (
                self._read_chunk(unit, path, layouts[path])
                for path in (group_array(f"{side}_covariances", part) for side in _SIDES)
            )
            return left, right

        parts = [(group, part) for group in groups for part, _ in shape.parts[group]]
        pairs = in_parallel(read, [part for _, part in parts], threads=self.storage.concurrency)
        found: dict[str, list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]] = {group: [] for group in groups}
        for (group, _), pair in zip(parts, pairs, strict=True):
            found[group].append(pair)
        return found

    def _bundle_of(self, group: str) -> int:
        return next(index for index, groups in enumerate(self.info.recorded["bundles"]) if group in groups)

    def _covariances(self) -> int:
        unit = self.covariances_unit
        assert unit is not None, "a kernel without Kronecker bases has no covariances"
        return unit

    def _write_arrays(
        self, unit: int, arrays: Mapping[str, tuple[npt.NDArray[Any], ArrayLayout]], facts: Mapping[str, Any]
    ) -> Record:
        payloads = {
            chunk_path(path, *(0 for _ in layout.shape)): encode_chunk(values, layout)
            for path, (values, layout) in arrays.items()
        }
        return self._write_unit(unit, payloads, facts)

    def _arrays_of(self, groups: Iterable[str]) -> dict[str, ArrayLayout]:
        shape, found = self.shape, {}
        for group in groups:
            found.update(shape.arrays(group))
        return found


def _with_layouts(
    values: Arrays, layouts: Mapping[str, ArrayLayout]
) -> dict[str, tuple[npt.NDArray[Any], ArrayLayout]]:
    """Arrays and their layouts, by path."""
    assert [array.shape for array in values] == [layout.shape for layout in layouts.values()]
    return dict(zip(layouts, zip(values, layouts.values(), strict=True), strict=True))


def _one_chunk(
    shape: tuple[int, ...], names: tuple[str, ...], dtype: str, attributes: Mapping[str, Any]
) -> ArrayLayout:
    """Layout of an array of one chunk."""
    return ArrayLayout(shape=shape, chunk_shape=shape, dtype=dtype, dimension_names=names, attributes=attributes)
