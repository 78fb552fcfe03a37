"""Reading kernels that act inside a group: from the arrays of an artifact to what the numerics apply."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.errors import ContractError, NotReadyError
from gradstore.plan.resolve import resolve_kernel
from gradstore.spec import RunSpec
from gradstore.store.artifacts import ArtifactStatus, KernelArtifact, stale_blocks
from gradstore.store.artifacts.artifact import VERBS, Artifact
from gradstore.store.artifacts.staleness import stale_error
from gradstore.store.features import FeatureStore, Room

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Basis, Spectrum
    from gradstore.store.artifacts.kernel import Arrays


def open_spectra(store: FeatureStore, spec: RunSpec, member: str) -> KernelArtifact:
    """Open the kernel of a member of the train set, or that of the mean of all members, as [kernel] says.

    Raises
    ------
    NotReadyError
        If it is not there, or not complete.
    ContractError
        If it is stale: the train set has changed since it was built.
    """
    artifact = KernelArtifact.open(store.storage, spec.kernel.kind, spec.kernel.of_member(member))
    missing = artifact.missing_units()
    if missing:
        raise NotReadyError(
            f"{store.storage.url}/{artifact.folder}: {len(missing)} of {artifact.info.num_units} bundles of groups are "
            "missing. Run `gradstore kernel` again: it builds those."
        )
    require_current(artifact, store)
    return artifact


def kernel_settings(spec: RunSpec) -> dict[str, Any]:
    """What artifacts keep of the kernel of a run, of a kind that acts inside a group: its kind and options."""
    return {"kind": spec.kernel.kind, **asdict(resolve_kernel(spec))}  # type: ignore[call-overload]


def require_current(artifact: Artifact, store: FeatureStore) -> None:
    """Make sure that the sets that an artifact was made from are still what they were.

    Raises
    ------
    ContractError
        If it is stale: blocks of a set were appended, erased or repaired since, or the train set is of other examples.
    """
    where, url = f"{store.storage.url}/{artifact.folder}", store.storage.url
    name = artifact.folder.partition("/")[2]
    status = ArtifactStatus(
        kind=artifact.kind, name=name, committed=0, total=artifact.info.num_units, settings=artifact.settings
    )
    for places in stale_blocks(store, [status]).values():
        for place, blocks in places.items():
            raise stale_error(where, url, place, blocks)
    made_of, now = artifact.settings.get("data"), store.open_set("train").info.data_hash
    if made_of not in (None, now):
        raise ContractError(
            f"{where}: was made from other examples: their data hash was {made_of}, that of the train set is {now}. Run "
            f"`gradstore prune {url} {artifact.folder}`, then `gradstore {VERBS[artifact.kind]}`: it makes it anew."
        )


def read_spectrum(artifact: KernelArtifact, group: str) -> Spectrum:
    """Read the spectrum of a group.

    Raises
    ------
    NotReadyError
        If the group's bundle is not committed.
    """
    return _spectrum(artifact, artifact.read(group))


class KeptSpectra:
    """Spectra that stay in memory once they were read, as far as it goes.

    Parameters
    ----------
    room
        Memory for them.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._found: dict[tuple[str, str, str], Spectrum] = {}

    def read(self, artifact: KernelArtifact, group: str) -> Spectrum:
        """See `read_spectrum`."""
        key = artifact.folder, group, artifact.attempt(group)
        if key in self._found:
            return self._found[key]
        arrays = artifact.read(group)
        spectrum, num_bytes = _spectrum(artifact, arrays), sum(array.nbytes for array in arrays)
        if self._room.has(num_bytes):
            self._room.take(num_bytes)
            self._found[key] = spectrum
        return spectrum


def _spectrum(artifact: KernelArtifact, arrays: Arrays) -> Spectrum:
    from gradstore.numerics.kernel import Spectrum

    eigenvalues, *matrices = arrays
    return Spectrum(eigenvalues=eigenvalues, basis=_basis(artifact, matrices))


def _basis(artifact: KernelArtifact, matrices: list[np.ndarray]) -> Basis:
    from gradstore.numerics.kernel import Kronecker, Standard, Vectors

    name = artifact.shape.basis
    if name == "standard":
        return Standard()
    if name == "vectors":
        return Vectors(*matrices)
    return Kronecker(tuple(zip(matrices[::2], matrices[1::2], strict=True)))
