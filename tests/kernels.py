"""Small train sets, with covariances that a test can compute again, and the kernels that are built of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any, cast

import numpy as np

from gradstore.cluster import Engine
from gradstore.numerics.factors import expand
from gradstore.plan.resolve import resolve_kernel
from gradstore.spec import RunSpec, parse_spec
from gradstore.stages.featurize.tables import Statistics
from gradstore.stages.kernel import build_kernel
from gradstore.stages.loading import Batch
from gradstore.stages.progress import Progress
from gradstore.stages.spectra import open_spectra, read_spectrum
from gradstore.store.features import FeatureArray, FeaturePart, FeatureSet, FeatureStore, SetInfo
from tests import oracle, stores
from tests.runs import InThisProcess

_NAMES = count()
PARTS = {
    "one": {"one.weight": (3, 4)},
    "merged/μ": {"a.weight": (2, 3), "b.weight": (4, 2)},
    "small": {"s.bias": (2, 1)},
}
ROWS, BLOCK_ROWS = 11, 4
QUIET = Progress(quiet=True)


def info(*, factors: int | None = None, members: tuple[str, ...] = ("m0",), rows: int = ROWS) -> SetInfo:
    arrays = []
    for group, parts in PARTS.items():
        placed, start = [], 0
        for part, shape in parts.items():
            placed.append(FeaturePart(part=part, start=start, shape=shape, factors=factors))
            start += placed[-1].features
        arrays.append(FeatureArray(name=group, features=start, scale=1.0, depth=0, function="mlp", parts=tuple(placed)))
    return SetInfo(
        name="train",
        rows=rows,
        block_rows=BLOCK_ROWS,
        dtype="float32",
        arrays=tuple(arrays),
        data_hash=f"{rows} rows",
        members=members,
    )


def covariances(block: int) -> dict[str, tuple[np.ndarray, np.ndarray, int]]:
    """Covariances of a block that no two blocks or parts have in common."""
    found = {}
    for index, (part, (r, s)) in enumerate(item for parts in PARTS.values() for item in parts.items()):
        draw = np.random.default_rng([block, index])
        left, right = draw.standard_normal((9, r)), draw.standard_normal((9, s))
        found[part] = left.T @ left, right.T @ right, 9
    return found


def write(
    feature_set: FeatureSet, block: int, *, known: bool = True, zero: str = "", invalid: int | None = None
) -> None:
    values = stores.features(feature_set.info, block)
    if zero:
        values[zero][:] = 0
    if invalid is not None:
        for rows in values.values():
            rows[invalid] = np.nan
    statistics = Statistics(feature_set.info)
    if known:
        of_all = {part: found for part, found in covariances(block).items() if part not in PARTS.get(zero, ())}
        statistics.add(Batch(outputs=np.zeros(0), features={}, covariances=of_all, residuals=None))
    examples = stores.examples(feature_set.info, block)
    if invalid is not None:
        valid = [row != invalid for row in range(examples.num_rows)]
        examples = examples.set_column(examples.column_names.index("valid"), "valid", [valid])
    feature_set.write_block(block, values, examples=examples, statistics=statistics.table(values), facts={})


def empty(of: SetInfo) -> FeatureSet:
    """A train set of a store in memory, of which no block is written."""
    return stores.create(f"memory://kernels-{next(_NAMES)}", of)


def made(of: SetInfo | None = None, **options: Any) -> FeatureSet:
    """A train set of a store in memory, all of whose blocks are written."""
    feature_set = empty(info() if of is None else of)
    for member in feature_set.info.members:
        for block in range(feature_set.info.num_blocks):
            write(feature_set.of_member(member), block, **options)
    return feature_set


def run(store: FeatureSet, kernel: Mapping[str, Any], **sections: Any) -> RunSpec:
    tables = {
        "run": {"name": "small", "store": store.storage.url},
        "model": {"source": "nowhere"},
        "data": {"source": "nowhere", "train": {"rows": ROWS}, "learn": {"rows": 1}, "eval": {"rows": 1}},
        "kernel": {**kernel},
        "cluster": {"workers": 2, "memory_per_worker": "4GiB"},
    }
    return parse_spec({**tables, **sections})


def build(spec: RunSpec) -> None:
    build_kernel(spec, cast(Engine, InThisProcess()), QUIET)


def rows_of(feature_set: FeatureSet, group: str) -> np.ndarray:
    """All rows of a group as float64 matrices row by row, those that are not valid left out."""
    array = next(array for array in feature_set.info.arrays if array.name == group)
    rows = np.concatenate(
        [feature_set.read_block(block, [group])[group] for block in range(feature_set.info.num_blocks)]
    )
    rows = rows[np.isfinite(rows).all(1)]
    if array.parts[0].factors is not None:
        rows = expand(rows, [part.shape for part in array.parts], [part.factors or 0 for part in array.parts])
    return rows.astype(np.float64)


def summed(group: str, blocks: int, without: tuple[int, ...] = ()) -> list[tuple[np.ndarray, np.ndarray]]:
    """(left, right) of every part of a group, over blocks."""
    found = []
    for part, (r, s) in PARTS[group].items():
        left, right = np.zeros((r, r)), np.zeros((s, s))
        for block in range(blocks):
            if block not in without:
                of_block = covariances(block)[part]
                # As they are stored.
                left += of_block[0].astype(np.float32)
                right += of_block[1].astype(np.float32)
        found.append((left, right))
    return found


def check(feature_set: FeatureSet, spec: RunSpec, *, without: tuple[int, ...] = (), tolerance: float = 1e-5) -> None:
    """The stored spectra precondition queries, under each damping of the sweep, as the oracle does."""
    store = FeatureStore.open(feature_set.storage)
    artifact = open_spectra(store, spec, feature_set.member)
    for group in PARTS:
        train, spectrum = rows_of(feature_set, group), read_spectrum(artifact, group)
        queries = np.random.default_rng(1).standard_normal((3, train.shape[1])).astype(np.float32)
        for swept in spec.sweep():
            damping = resolve_kernel(swept).damped_by
            assert damping is not None
            expected = oracle.precondition(
                train,
                queries,
                kind=spec.kernel.kind,
                damping=damping.value,
                mode=damping.mode,
                factors=summed(group, feature_set.info.num_blocks, without),
            )
            found = spectrum.precondition(queries, damping)
            assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max(), group
            tau = spectrum.self_influence(queries, damping)
            np.testing.assert_allclose(tau, (expected * queries).sum(1), rtol=10 * tolerance)
