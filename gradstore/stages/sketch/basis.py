"""The directions of a sketch: those in which whitened rows of a sample are largest, all groups and members side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.plan.resolve import resolve_kernel
from gradstore.plan.sketch import SAMPLED_BLOCKS, sample_rows
from gradstore.spec import RunSpec
from gradstore.stages.contribute.rows import row_factor
from gradstore.stages.reading import full_rows
from gradstore.stages.sketches import open_for
from gradstore.stages.spectra import open_spectra, read_spectrum
from gradstore.store.features import BlockReader, FeatureSet, FeatureStore

if TYPE_CHECKING:
    from gradstore.numerics.kernel import Damping, Spectrum


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Rows of a member's train set, and what each counts.

    Attributes
    ----------
    train
        The set, as the member has it.
    rows
        By block, rows counted from its first.
    factors
        float32 [rows, 1] of every block.
    """

    train: FeatureSet
    rows: Mapping[int, np.ndarray]
    factors: Mapping[int, np.ndarray]

    def read(self, group: str) -> np.ndarray:
        """Rows of a group as kernels see them, times what they count; zero where they are not valid."""
        from gradstore.numerics.kernel import zero_invalid

        (array,) = (array for array in self.train.info.arrays if array.name == group)
        found = []
        with closing(BlockReader([self.train], [[group]]).read(self.rows)) as pieces:
            for piece in pieces:
                taken = full_rows(array, piece.rows[group][self.rows[piece.block]])
                found.append(taken * self.factors[piece.block])
        sample = np.concatenate(found)
        zero_invalid(sample)
        return sample


def build_basis(store_url: str, run: Mapping[str, Any]) -> int:
    """Task: find and commit the directions of a sketch; return how many."""
    from gradstore.numerics.sketch import directions, sample_combinations, whitened

    spec, store = RunSpec.model_validate(run), FeatureStore.open(store_url)
    artifact = open_for(store, spec)
    if 0 not in artifact.missing_units():
        return artifact.shape.rank
    samples = _samples(store, spec, artifact.shape.rank)
    size = sum(map(len, next(iter(samples.values())).rows.values()))
    gram = np.zeros((size, size), np.float32)
    for _, _, rows, kernel in _groups(store, spec, samples):
        x = whitened(rows, *kernel)
        gram += x @ x.T
    combinations = sample_combinations(gram, artifact.shape.rank, spec.run.seed)
    found: dict[str, dict[str, np.ndarray]] = {member: {} for member in samples}
    for member, group, rows, kernel in _groups(store, spec, samples):
        found[member][group] = directions(whitened(rows, *kernel), combinations, *kernel)
    artifact.write_basis(found, facts={"rows": size})
    return artifact.shape.rank


def _groups(
    store: FeatureStore, spec: RunSpec, samples: Mapping[str, _Sample]
) -> Iterator[tuple[str, str, np.ndarray, tuple[Spectrum | None, Damping | None]]]:
    """(member, group, the sample's rows, the group's spectrum and damping), one after another."""
    kernel = resolve_kernel(spec)
    for member, sample in samples.items():
        spectra = open_spectra(store, spec, member) if kernel.needs_spectra else None
        for array in sample.train.info.arrays:
            spectrum = None if spectra is None else read_spectrum(spectra, array.name)
            yield member, array.name, sample.read(array.name), (spectrum, kernel.damped_by)


def _samples(store: FeatureStore, spec: RunSpec, rank: int) -> dict[str, _Sample]:
    """The sample as every member has it: the same rows of all, of blocks at equal distances."""
    train = store.open_set("train")
    info, draw = train.info, np.random.default_rng(spec.run.seed)
    wanted = sample_rows(rank, info.num_examples)
    count = min(info.num_blocks, max(SAMPLED_BLOCKS, -(-2 * wanted // info.block_rows)))
    blocks = [info.num_blocks * place // count for place in range(count)]
    lengths = {block: stop - start for block, (start, stop) in zip(blocks, map(info.block_range, blocks), strict=True)}
    places = np.repeat(blocks, [*lengths.values()]), np.concatenate([np.arange(size) for size in lengths.values()])
    chosen = np.sort(draw.permutation(len(places[0]))[:wanted])
    rows = {block: places[1][chosen][places[0][chosen] == block] for block in blocks}
    rows = {block: of_block for block, of_block in rows.items() if len(of_block)}
    samples = {}
    for member in spec.model.etas:
        of_member = train.of_member(member)
        factors = {block: row_factor(store, spec, of_member, block)[of_block, None] for block, of_block in rows.items()}
        samples[member] = _Sample(train=of_member, rows=rows, factors=factors)
    return samples
