"""Kernels: the spectrum of every group, from which any damping is applied later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo, only_chunks
from gradstore.store.backend import Storage
from gradstore.store.codecs import encode_chunk
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout, chunk_path, group_array


class KernelArtifact(Artifact):
    """Eigenvalues and eigenvectors of every group's Gram matrix, at ``kernels/<name>/<member>``; one unit is a bundle of groups.

    A kernel that needs no spectra, such as identity, has no bundle and is complete when it is created.
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
        widths: Mapping[str, int],
        bundles: Sequence[Sequence[str]],
    ) -> KernelArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, name, member
            Where, under which name, and whose features it is built from.
        settings
            What is compared: kind and options of the kernel, the feature set and its snapshot.
        widths
            Features of every group that has a spectrum.
        bundles
            The groups of every bundle; of an artifact that is there, its own bundles count.

        Raises
        ------
        ContractError
            If an artifact of that name is there with other settings.
        """
        assert sorted(group for bundle in bundles for group in bundle) == sorted(widths), (
            "bundles must partition groups"
        )
        info = ArtifactInfo(
            kind=cls.kind,
            num_units=len(bundles),
            settings={**settings, "widths": dict(widths)},
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

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        return self._arrays_of(self.settings["widths"])

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        return only_chunks(self._arrays_of(self.bundles[unit]))

    def write_bundle(
        self,
        bundle: int,
        spectra: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]],
        *,
        facts: Mapping[str, Any],
    ) -> Record:
        """Write and commit a bundle: (eigenvalues [d], eigenvectors [d, d], one a column) of each of its groups.

        Eigenvalues are stored in float64, eigenvectors in float32.
        """
        existing = self._committed(bundle)
        if existing is not None:
            return existing
        assert set(spectra) == set(self.bundles[bundle]), "the spectra must be those of the bundle's groups"
        payloads = {}
        for group, (values, vectors) in spectra.items():
            value_layout, vector_layout = _layouts(group, self.settings["widths"][group])
            assert values.shape == value_layout.shape
            assert vectors.shape == vector_layout.shape
            payloads[chunk_path(group_array("eigenvalues", group), 0)] = encode_chunk(values, value_layout)
            payloads[chunk_path(group_array("eigenvectors", group), 0, 0)] = encode_chunk(vectors, vector_layout)
        return self._write_unit(bundle, payloads, facts)

    def read(self, group: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
        """(eigenvalues float64 [d], eigenvectors float32 [d, d], one a column) of a group.

        Raises
        ------
        NotReadyError
            If the group's bundle is not committed.
        """
        bundle = next(index for index, groups in enumerate(self.bundles) if group in groups)
        value_layout, vector_layout = _layouts(group, self.settings["widths"][group])
        values = self._read_chunk(bundle, group_array("eigenvalues", group), value_layout)
        vectors = self._read_chunk(bundle, group_array("eigenvectors", group), vector_layout)
        return values, vectors

    def _arrays_of(self, groups: Iterable[str]) -> dict[str, ArrayLayout]:
        found = {}
        for group in groups:
            values, vectors = _layouts(group, self.settings["widths"][group])
            found[group_array("eigenvalues", group)] = values
            found[group_array("eigenvectors", group)] = vectors
        return found


def _layouts(group: str, width: int) -> tuple[ArrayLayout, ArrayLayout]:
    attributes = {"group": group}
    values = ArrayLayout(
        shape=(width,),
        chunk_shape=(width,),
        dtype="float64",
        dimension_names=(f"eigenvector:{group}",),
        attributes=attributes,
    )
    vectors = ArrayLayout(
        shape=(width, width),
        chunk_shape=(width, width),
        dtype="float32",
        dimension_names=(f"feature:{group}", f"eigenvector:{group}"),
        attributes=attributes,
    )
    return values, vectors
