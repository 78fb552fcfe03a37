"""Sketching the rows of blocks, and taking the checksums of their features, as both stream by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from gradstore.plan.contribute import READ_BYTES, read_bundles
from gradstore.spec import RunSpec
from gradstore.stages.contribute.rows import row_factor
from gradstore.stages.reading import full_rows, full_width
from gradstore.stages.sketches import open_for
from gradstore.store.artifacts import SketchArtifact
from gradstore.store.artifacts.sketch import widened
from gradstore.store.checksums import extend_checksums
from gradstore.store.features import BlockReader, FeatureArray, FeatureStore, Piece


def sketch_blocks(store_url: str, run: Mapping[str, Any], blocks: Sequence[int]) -> int:
    """Task: sketch and commit blocks, block by block; return how many rows."""
    spec, store = RunSpec.model_validate(run), FeatureStore.open(store_url)
    artifact = open_for(store, spec)
    missing = {*artifact.missing_blocks()}
    left = [block for block in blocks if block in missing]
    train = store.open_set("train")
    info, members = train.info, [*spec.model.etas]
    basis = _basis(
        store_url, spec.kernel.name, artifact.log.require(0, f"{artifact.folder}: has no basis yet.").attempt
    )
    bundles = read_bundles({array.name: full_width(array) for array in info.arrays}, info.block_rows, READ_BYTES)
    reader = BlockReader([train.of_member(member) for member in members], bundles)
    with closing(reader.read(left)) as pieces:
        for block in left:
            start, stop = info.block_range(block)
            sums = _Sums(artifact, stop - start)
            for piece in islice(pieces, len(bundles) * len(members)):
                sums.add(train.info.arrays, piece, basis[piece.member])
            factors = {member: row_factor(store, spec, train.of_member(member), block) for member in members}
            artifact.write_block(block, sums.total(factors), sums.checksums, facts={"rows": stop - start})
    return sum(stop - start for start, stop in map(info.block_range, blocks))


class _Sums:
    """Sketch of a block's rows, of every member, and the checksums of their features."""

    def __init__(self, artifact: SketchArtifact, rows: int) -> None:
        self._members = artifact.shape.members
        self._sums = {member: np.zeros((rows, artifact.shape.rank), np.float32) for member in self._members}
        self.checksums = np.zeros((rows, len(self._members)), np.uint32)

    def add(self, arrays: Sequence[FeatureArray], piece: Piece, basis: Mapping[str, np.ndarray]) -> None:
        """Take in features of some groups, of one member."""
        total = self._sums[piece.member]
        for array in arrays:
            if array.name in piece.rows:
                total += full_rows(array, piece.rows[array.name]) @ widened(basis[array.name])
        place = self._members.index(piece.member)
        extend_checksums(self.checksums[:, place], [*piece.rows.values()])

    def total(self, factors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Sum over members, times what their rows count; NaN of rows that are not valid."""
        return np.asarray(sum(factors[member][:, None] * rows for member, rows in self._sums.items()), np.float32)


@lru_cache(maxsize=1)
def _basis(store_url: str, kernel: str, attempt: str) -> Mapping[str, Mapping[str, np.ndarray]]:
    """Directions, as they are stored, read once per process; ``attempt`` tells apart those that were made anew."""
    del attempt
    return SketchArtifact.open(FeatureStore.open(store_url).storage, kernel).read_basis()
