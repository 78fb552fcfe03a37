"""Tasks of kernels that act inside a group: the spectra of one bundle of groups, and the covariances of all parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import chain, product

import numpy as np

from gradstore.errors import DataError, SpecError
from gradstore.stages.reading import members_of, next_mean
from gradstore.store.artifacts import KernelArtifact
from gradstore.store.features import BlockReader, FeatureSet, FeatureStore

Arrays = tuple[np.ndarray, ...]
Add = Callable[[np.ndarray], None]


def build_bundle(store_url: str, kind: str, member: str, bundle: int) -> int:
    """Task: make the spectra of one bundle of groups and commit them; return how many."""
    store = FeatureStore.open(store_url)
    artifact = KernelArtifact.open(store.storage, kind, member)
    groups = artifact.bundles[bundle]
    if bundle in artifact.missing_units():
        trains = members_of(store.open_set("train"), member)
        spectra, rows = BUILDERS[artifact.shape.basis](artifact, trains, groups)
        artifact.write_bundle(bundle, spectra, facts={"rows": rows})
    return len(groups)


def sum_covariances(store_url: str, kind: str, member: str) -> int:
    """Task: sum the covariances of every part over the train set and commit them; return how many blocks lack some.

    Raises
    ------
    SpecError
        If a part whose features are not all zero has none in any block.
    """
    store = FeatureStore.open(store_url)
    artifact = KernelArtifact.open(store.storage, kind, member)
    assert artifact.covariances_unit is not None, "only Kronecker bases come from covariances"
    if artifact.covariances_unit not in artifact.missing_units():
        return 0
    train = store.open_set("train", member)
    sums = {
        part: tuple(np.zeros((side, side)) for side in sides)
        for parts in artifact.shape.parts.values()
        for part, sides in parts
    }
    lacking: dict[str, set[int]] = {}
    found: set[str] = set()
    for block in range(train.info.num_blocks):
        for part in _add_statistics(train, block, sums, found):
            lacking.setdefault(part, set()).add(block)
    for group, parts in artifact.shape.parts.items():
        if any(part in lacking and part not in found for part, _ in parts):
            raise _no_covariances(kind, f"group {group} of {store_url}/{train.info.folder}/{member}")
    left_out = sorted({block for blocks in lacking.values() for block in blocks})
    facts = {"blocks": train.info.num_blocks, "left_out": left_out}
    artifact.write_covariances(tuple(chain.from_iterable(sums.values())), facts=facts)
    return len(left_out)


def _add_statistics(train: FeatureSet, block: int, sums: Mapping[str, Arrays], found: set[str]) -> list[str]:
    """Add the covariances of a block to those of every part, and ``found`` what has some; return the parts that lack theirs.

    Where a part's features are all zero, as of a layer that no example went through, it has none to add.
    """
    table = train.read_statistics(["part", "sum_squares", "left", "right"], block=block)
    lacking = []
    for part, energy, left, right in zip(*(table[name] for name in table.column_names), strict=True):
        key = part.as_py()
        if left.is_valid:
            found.add(key)
            for total, side in zip(sums[key], (left, right), strict=True):
                np.add(total, side.values.to_numpy().reshape(total.shape), out=total)
        elif energy.as_py() > 0:
            lacking.append(key)
    return lacking


def _no_covariances(kind: str, what: str) -> SpecError:
    return SpecError(
        f'kernel.kind = "{kind}": {what} has no covariances. They are sums over positions, which only layers with an input '
        "and an output at each have, and none are kept with features.covariances = false, in Adam's direction, or of blocks "
        "of which a row was erased. Set features.covariances = true and choose another run.store, leave the group out "
        '(features.groups.exclude), or use kernel.kind = "block" or "diagonal".'
    )


def _of_gram_matrices(
    artifact: KernelArtifact, trains: Sequence[FeatureSet], groups: Sequence[str]
) -> tuple[dict[str, Arrays], int]:
    """Eigenvalues and eigenvectors of every group's Gram matrix, and the rows that it is of."""
    from gradstore.numerics.kernel import GramSum, Vectors, spectrum

    shape = artifact.shape
    grams = {group: GramSum(shape.widths[group], shape.dtype) for group in groups}
    _stream(trains, {group: gram.add for group, gram in grams.items()})
    spectra: dict[str, Arrays] = {}
    for group in groups:
        # A matrix goes as soon as it is decomposed, and of its vectors only what is stored stays (plan/kernels.py).
        with _naming(artifact, group):
            found = spectrum(grams.pop(group).total())
        assert isinstance(found.basis, Vectors)
        spectra[group] = found.eigenvalues, found.basis.vectors.astype(shape.dtype, copy=False)
        del found
    return spectra, _count(trains)


def _of_squares(
    artifact: KernelArtifact, trains: Sequence[FeatureSet], groups: Sequence[str]
) -> tuple[dict[str, Arrays], int]:
    """The diagonal of every group's Gram matrix, and the rows that it is of."""
    from gradstore.numerics.kernel import SquareSum, Standard

    sums = {group: SquareSum(Standard(), artifact.shape.widths[group]) for group in groups}
    _stream(trains, {group: total.add for group, total in sums.items()})
    spectra: dict[str, Arrays] = {}
    for group, total in sums.items():
        with _naming(artifact, group):
            spectra[group] = (total.total(),)
    return spectra, _count(trains)


def _of_covariances(
    artifact: KernelArtifact, trains: Sequence[FeatureSet], groups: Sequence[str]
) -> tuple[dict[str, Arrays], int]:
    """Corrected eigenvalues of every group in the eigenbases of its parts' covariances, and the rows that they are of."""
    from gradstore.numerics.kernel import Kronecker, SquareSum, kronecker_basis

    shape, bases = artifact.shape, {}
    for group, covariances in artifact.read_covariances(groups).items():
        with _naming(artifact, group):
            exact = kronecker_basis(covariances)
        # Rounded first: eigenvalues are those of the basis that is stored.
        rounded = (tuple(side.astype(shape.dtype, copy=False) for side in pair) for pair in exact.parts)
        bases[group] = Kronecker(tuple((left, right) for left, right in rounded))
    sums = {group: SquareSum(bases[group], shape.widths[group]) for group in groups}
    _stream(trains, {group: total.add for group, total in sums.items()})
    rows = _count(trains)
    spectra: dict[str, Arrays] = {}
    for group, total in sums.items():
        with _naming(artifact, group):
            spectra[group] = (total.total() / max(rows, 1), *chain.from_iterable(bases[group].parts))
    return spectra, rows


BUILDERS = {"standard": _of_squares, "vectors": _of_gram_matrices, "kronecker": _of_covariances}


def reader_of(trains: Sequence[FeatureSet], groups: Sequence[str]) -> BlockReader:
    """Return what a task reads its groups through.

    One group at a time takes the least memory; as many are read ahead as the storage serves at once.
    """
    return BlockReader(trains, [[group] for group in groups], ahead=trains[0].storage.concurrency)


def _stream(trains: Sequence[FeatureSet], add: Mapping[str, Add]) -> None:
    """Give every group's sum its rows, block by block, those that are not valid as zeros."""
    from gradstore.numerics.kernel import zero_invalid

    info = trains[0].info
    arrays = {array.name: array for array in info.arrays}
    invalid = {block for item in trains for block in item.invalid_blocks()}
    with closing(reader_of(trains, list(add)).read(range(info.num_blocks))) as pieces:
        for block, group in product(range(info.num_blocks), add):
            rows = next_mean(pieces, arrays[group], len(trains))
            if block in invalid:
                zero_invalid(rows)
            add[group](rows)


def _count(trains: Sequence[FeatureSet]) -> int:
    """Rows that are valid in every member."""
    return int(np.logical_and.reduce([item.valid_rows() for item in trains]).sum())


@contextmanager
def _naming(artifact: KernelArtifact, group: str) -> Iterator[None]:
    """Tell of which artifact and group the numerics complain."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{artifact.storage.url}/{artifact.folder}: group {group}: {error}") from error
