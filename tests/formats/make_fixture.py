"""Make the store of format version 1 that tests read: ``python -m tests.formats.make_fixture FOLDER``.

It holds one of each thing that the format has, in numbers that every stored type holds exactly, so that what a reader must
find is known without gradstore: ``expected.json``, beside the store, is written from the formulas here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradstore.stages.featurize.tables import Outputs, example_table, statistics_of
from gradstore.store.artifacts import (
    ContributionArtifact,
    ContributionShape,
    KernelArtifact,
    SelfInfluenceArtifact,
    SelfInfluenceShape,
    SpectraShape,
)
from gradstore.store.examples import Example, data_hash, hash_inputs, to_table
from gradstore.store.features import FeatureArray, FeaturePart, FeatureSet, FeatureStore, SetInfo
from gradstore.store.features.erasure import erase_rows
from gradstore.store.features.inputs import blanked

FIXTURE: Final = Path(__file__).parent / "store-v1"
EXPECTED: Final = Path(__file__).parent / "store-v1.expected.json"

MATRIX: Final = "model.layers.0.mlp.up_proj"
FACTORS: Final = "model.layers.1.mlp.down_proj"
LONG: Final = "long." * 60
# Features of every group; sets beside train have the first two.
GROUPS: Final = {MATRIX: 6, FACTORS: 4, "head/μ": 2, "..": 1, LONG: 2}
PARTS: Final = {
    MATRIX: (FeaturePart(part=f"{MATRIX}.weight[0:8,0:8]", start=0, shape=(3, 2)),),
    FACTORS: (FeaturePart(part=f"{FACTORS}.weight[0:8,0:8]", start=0, shape=(2, 2), factors=1),),
}
BLOCK_ROWS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One feature set of the fixture: rows by block as they were created and appended, and what befell some of them."""

    name: str
    dtype: str
    created: int
    compression: str = "none"
    groups: tuple[str, ...] = (MATRIX, FACTORS)
    appended: int = 0
    invalid: tuple[int, ...] = ()
    erased: tuple[int, ...] = ()
    taken_back: tuple[int, ...] = ()

    @property
    def rows(self) -> list[int]:
        """Rows that belong to an example."""
        first = -(-self.created // BLOCK_ROWS) * BLOCK_ROWS
        return [*range(self.created), *range(first, first + self.appended)]

    @property
    def length(self) -> int:
        return self.rows[-1] + 1

    def has_features(self, row: int) -> bool:
        unusable = (*self.invalid, *self.erased)
        return row in self.rows and row not in unusable and row // BLOCK_ROWS not in self.taken_back


SPLITS: Final = (
    # Row 3 is a gap, row 1 was erased, row 5 is not valid.
    Split(name="train", dtype="float16", groups=tuple(GROUPS), created=3, appended=3, invalid=(5,), erased=(1,)),
    # Block 1 was committed and then taken back, as a repair does.
    Split(name="learn", dtype="float32", compression="blosc", created=5, taken_back=(1,)),
    Split(name="eval", dtype="bfloat16", created=3),
    Split(name="learn-int8", dtype="int8", created=3),
)
KERNEL_GROUPS: Final = (MATRIX, "head/μ")
QUERIES: Final = 3


def feature(name: str, group: int, row: int, column: int) -> float:
    """A multiple of 1/16 from -127/16 to 127/16, at whose ends the first column is: every type holds it exactly."""
    if column == 0:
        return (127 if (row + group) % 2 else -127) / 16
    return ((row * 31 + column * 17 + group * 7 + len(name)) % 101 - 50) / 16


def features_of(split: Split, group: int, rows: Sequence[int]) -> npt.NDArray[np.float32]:
    """Features of a group in some rows, as they are before anything is erased."""
    width = GROUPS[split.groups[group]]
    values = [[feature(split.name, group, row, column) for column in range(width)] for row in rows]
    table: npt.NDArray[np.float32] = np.array(values, np.float32).reshape(len(rows), width)
    table[[place for place, row in enumerate(rows) if row in split.invalid]] = np.nan
    return table


def contributions() -> npt.NDArray[np.float32]:
    """C of the eval queries: multiples of 1/8; NaN where the train set has no features."""
    train = SPLITS[0]
    query, row, group = np.indices((QUERIES, train.length, len(GROUPS)))
    values: npt.NDArray[np.float32] = (((query * 13 + row * 5 + group * 3) % 41 - 20) / 8).astype(np.float32)
    values[:, [row for row in range(train.length) if not train.has_features(row)]] = np.nan
    return values


def self_influence() -> npt.NDArray[np.float32]:
    """Self-influence of the train examples: multiples of 1/8; NaN where the train set has no features."""
    train = SPLITS[0]
    row, group = np.indices((train.length, len(GROUPS)))
    values: npt.NDArray[np.float32] = (((row * 3 + group * 5) % 17) / 8).astype(np.float32)
    values[[row for row in range(train.length) if not train.has_features(row)]] = np.nan
    return values


def spectrum(group: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float32]]:
    """Eigenvalues and eigenvectors, one a column: those of a permutation."""
    width = GROUPS[group]
    return np.arange(1, width + 1) / 4, np.roll(np.eye(width, dtype=np.float32), 1, axis=0)


def example(split: Split, row: int) -> Example:
    inputs = {"tokens": np.array([row, row + 1], np.int64)}
    return Example(
        example_id=f"{split.name}/{row}",
        source="texts.jsonl",
        label=None if row % 3 == 0 else "sport",
        text=f"text {row}",
        content_hash=hash_inputs(inputs),
        size=2,
        inputs=inputs,
    )


def make(folder: Path) -> None:
    """Make the store in a folder that does not exist."""
    contract = {"model": {"precision": "float32"}, "members": {"m0": {"weights": "0123456789abcdef"}}}
    store = FeatureStore.create(str(folder), contract=contract, run={"run": {"name": "fixture"}})
    for split in SPLITS:
        _make_set(store, split)
    train = store.open_set("train").info
    shape = ContributionShape(
        queries=QUERIES,
        rows=train.rows,
        gaps=train.gaps,
        groups=tuple(GROUPS),
        block_rows=BLOCK_ROWS,
        query_tile=2,
        dtype="float16",
    )
    snapshots = {name: store.open_set(name).snapshot().to_json() for name in ("train", "eval")}
    artifact = ContributionArtifact.create(
        store.storage,
        "block",
        "eval",
        settings={"kernel": {"kind": "block", "damping": 0.1}, **snapshots},
        shape=shape,
        scales=np.array([0.125, 1.0, 0.5], np.float32),
    )
    for block in range(shape.num_blocks):
        artifact.write_block(block, contributions()[:, slice(*shape.block_range(block))], facts={})
    widths = {group: GROUPS[group] for group in KERNEL_GROUPS}
    kernel = KernelArtifact.create(
        store.storage,
        "block",
        "m0",
        settings=snapshots,
        shape=SpectraShape(widths=widths),
        bundles=[list(KERNEL_GROUPS)],
    )
    kernel.write_bundle(0, {group: spectrum(group) for group in KERNEL_GROUPS}, facts={})
    _make_self_influence(store, train, snapshots["train"])


def _make_self_influence(store: FeatureStore, train: SetInfo, snapshot: Mapping[str, Any]) -> None:
    shape = SelfInfluenceShape(
        rows=train.rows,
        block_rows=BLOCK_ROWS,
        gaps=train.gaps,
        groups=tuple(GROUPS),
        chunk_rows=BLOCK_ROWS,
        chunk_groups=2,
    )
    artifact = SelfInfluenceArtifact.create(
        store.storage,
        "block",
        "m0",
        settings={"kernel": {"kind": "block", "damping": 0.1}, "train": snapshot},
        shape=shape,
    )
    for unit in range(shape.num_units):
        row, column = shape.place(unit)
        rows, groups = slice(row * BLOCK_ROWS, (row + 1) * BLOCK_ROWS), slice(2 * column, 2 * column + 2)
        artifact.write(unit, self_influence()[rows, groups].astype(np.float64), facts={})


def _make_set(store: FeatureStore, split: Split) -> None:
    created = [example(split, row) for row in range(split.created)]
    arrays = tuple(
        FeatureArray(
            name=name,
            features=GROUPS[name],
            scale=2.0 ** (index - 6) if split.dtype == "float16" else 1.0,
            depth=index if name.startswith("model") else None,
            function="mlp" if name.startswith("model") else "other",
            parts=PARTS.get(name, ()),
        )
        for index, name in enumerate(split.groups)
    )
    info = SetInfo(
        name=split.name,
        rows=split.created,
        block_rows=BLOCK_ROWS,
        dtype=split.dtype,  # type: ignore[arg-type]
        compression=split.compression,
        arrays=arrays,
        data_hash=data_hash(created),
        recorded={"token_budget": 64, "precision": "float32", "threads": 1},
    )
    made = store.create_set(info, [to_table(created, 0)])
    _write_missing_blocks(made, split)
    if split.appended:
        added = [example(split, row) for row in split.rows[split.created :]]
        extended = made.info.appended(len(added), data_hash(added, start=info.data_hash), None)
        made = store.extend_set(split.name, extended, [to_table(added, 0)])
        _write_missing_blocks(made, split)
    if split.erased:
        erase_rows(store, split.name, split.erased, statistics_of)
    for block in split.taken_back:
        made.log.take_back(block, "repair")


def _write_missing_blocks(made: FeatureSet, split: Split) -> None:
    for block in made.missing_blocks():
        rows = range(*made.info.block_range(block))
        values = {name: features_of(split, index, rows) for index, name in enumerate(split.groups)}
        present = [example(split, row) for row in rows]
        said = Outputs(function="token_cross_entropy", values=np.array([row / 2 for row in rows]))
        table = example_table(rows[0], present, said, values, arrays=made.info.arrays)
        statistics = statistics_of(made.info, values)
        made.write_block(block, values, examples=blanked(table, []), statistics=statistics, facts={})


def expected() -> dict[str, Any]:
    """What a reader must find, from the formulas alone; None stands for NaN."""
    return {
        "sets": {split.name: _expected_set(split) for split in SPLITS},
        "contributions": plain(contributions()),
        "self_influence": plain(self_influence()),
        "spectra": {group: [part.tolist() for part in spectrum(group)] for group in KERNEL_GROUPS},
    }


def _expected_set(split: Split) -> dict[str, Any]:
    rows = range(split.length)
    features: dict[str, Any] = {}
    for index, name in enumerate(split.groups):
        values = features_of(split, index, rows)
        values[[row for row in rows if not split.has_features(row)]] = np.nan
        features[name] = plain(values)
    known = [row for row in split.rows if row not in split.erased and row // BLOCK_ROWS not in split.taken_back]
    facts = {row: example(split, row) for row in known}
    table: Mapping[str, Any] = {
        "row": known,
        "example_id": [found.example_id for found in facts.values()],
        "label": [found.label for found in facts.values()],
        "loss": [row / 2 for row in known],
        "valid": [row not in split.invalid for row in known],
    }
    return {"dtype": split.dtype, "features": features, "examples": table, "erased": list(split.erased)}


def plain(values: npt.NDArray[Any]) -> Any:
    """Nested lists, with None for NaN."""
    if values.ndim:
        return [plain(part) for part in values]
    return None if np.isnan(values) else float(values)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
    Path(sys.argv[1]).with_suffix(".expected.json").write_text(
        json.dumps(expected(), ensure_ascii=False, indent=None) + "\n", encoding="utf-8"
    )
