"""The matrices of a projection that come from data: found once, frozen, and read by every worker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo, only_chunks
from gradstore.store.backend import Storage
from gradstore.store.blocks import in_parallel
from gradstore.store.codecs import encode_chunk
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout, chunk_path, group_array

SIDES = ("left", "right")

Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


class MatricesArtifact(Artifact):
    """P_o [r_o, O] and P_i [r_i, I] of every part, float32, at ``projections/<name>``; one unit is a bundle of parts."""

    kind: ClassVar[str] = "projection"

    @classmethod
    def create(
        cls,
        storage: Storage,
        name: str,
        *,
        settings: Mapping[str, Any],
        shapes: Mapping[str, tuple[tuple[int, int], tuple[int, int]]],
        bundles: Sequence[Sequence[str]],
    ) -> MatricesArtifact:
        """Create the artifact, or open the one that is there if its settings are equal.

        Parameters
        ----------
        storage, name
            Where, and under which name.
        settings
            What is compared: the model and the data that the matrices come from.
        shapes
            By part, the shapes of P_o and P_i.
        bundles
            The parts of every bundle; of an artifact that is there, its own bundles count.

        Raises
        ------
        ContractError
            If an artifact of that name is there with other settings.
        """
        info = ArtifactInfo(
            kind=cls.kind,
            num_units=len(bundles),
            settings={**settings, "shapes": dict(shapes)},
            recorded={"bundles": [list(bundle) for bundle in bundles]},
        )
        made = cls._create(storage, (name,), info)
        made._publish_arrays()
        return made

    @classmethod
    def open(cls, storage: Storage, name: str) -> MatricesArtifact:
        """Open the artifact; NotReadyError if there is none of that name."""
        return cls._open(storage, (name,))

    @property
    def bundles(self) -> list[list[str]]:
        """The parts of every bundle."""
        return [list(bundle) for bundle in self.info.recorded["bundles"]]

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`."""
        return self._arrays_of(self.settings["shapes"])

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        return only_chunks(self._arrays_of(self.bundles[unit]))

    def write_bundle(self, bundle: int, matrices: Mapping[str, Pair], *, facts: Mapping[str, Any]) -> Record:
        """Write and commit a bundle: (P_o, P_i) of each of its parts."""
        existing = self._committed(bundle)
        if existing is not None:
            return existing
        assert set(matrices) == set(self.bundles[bundle]), "the matrices must be those of the bundle's parts"
        payloads = {}
        for part, pair in matrices.items():
            for place, (side, values) in enumerate(zip(SIDES, pair, strict=True)):
                layout = _layout(part, side, self.settings["shapes"][part][place])
                assert values.shape == layout.shape
                payloads[chunk_path(group_array(side, part), 0, 0)] = encode_chunk(values, layout)
        return self._write_unit(bundle, payloads, facts)

    def read_all(self) -> dict[str, Pair]:
        """(P_o, P_i) of every part.

        Raises
        ------
        NotReadyError
            If a bundle is not committed.
        """

        def read(item: tuple[int, str]) -> Pair:
            bundle, part = item
            left, right = (
                self._read_chunk(bundle, group_array(side, part), _layout(part, side, shape))
                for side, shape in zip(SIDES, self.settings["shapes"][part], strict=True)
            )
            return left, right

        items = [(bundle, part) for bundle, parts in enumerate(self.bundles) for part in parts]
        pairs = in_parallel(read, items, threads=self.storage.concurrency)
        return {part: pair for (_, part), pair in zip(items, pairs, strict=True)}

    def _arrays_of(self, parts: Iterable[str]) -> dict[str, ArrayLayout]:
        return {
            group_array(side, part): _layout(part, side, self.settings["shapes"][part][place])
            for part in parts
            for place, side in enumerate(SIDES)
        }


def _layout(part: str, side: str, shape: Sequence[int]) -> ArrayLayout:
    return ArrayLayout(
        shape=tuple(shape),
        chunk_shape=tuple(shape),
        dtype="float32",
        dimension_names=(f"axis:{side}:{part}", f"{side}:{part}"),
        attributes={"part": part, "side": side},
    )
