"""Whole stores of random features, with members, rows that are not valid, covariances and residuals; no model is in them."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.spec import RunSpec
from gradstore.stages.featurize.tables import Outputs, Statistics, example_table
from gradstore.stages.loading import Batch
from gradstore.store.dtypes import DtypeName
from gradstore.store.examples import Example, hash_inputs, to_table
from gradstore.store.features import FeatureSet, FeatureStore, SetInfo
from tests import stores

ROWS: Mapping[str, int] = {"train": 11, "learn": 5, "eval": 3}


@dataclass(frozen=True)
class RandomStore:
    """Features of three sets: train in blocks of four rows, learn and eval of one block each.

    Attributes
    ----------
    url
        Where it is.
    output
        The output function that its contract names.
    etas
        Members and their weights.
    invalid
        Train rows whose features are NaN in the first member.
    zero
        Train rows whose features are zero in every member.
    scale
        What the features of single train rows are multiplied by.
    dtype
        Of the train set.
    adam
        Whether train features are said to be of the directions of Adam's steps.
    """

    url: str
    output: str = "cross_entropy"
    etas: Mapping[str, float] = field(default_factory=lambda: {"m0": 1.0})
    invalid: Sequence[int] = ()
    zero: Sequence[int] = ()
    scale: Mapping[int, float] = field(default_factory=dict)
    dtype: DtypeName = "float32"
    adam: bool = False

    def make(self) -> RandomStore:
        """Write the store."""
        of_member = {"weights": "abc", **({"optimizer": "def"} if self.adam else {})}
        contract = {
            "model": {"hash": "abc", "output": self.output},
            "members": dict.fromkeys(self.etas, of_member),
            "projection": {"kind": "logra"},
        }
        store = FeatureStore.create(self.url, contract=contract, run=self.spec().model_dump())
        for name, rows in ROWS.items():
            info = replace(
                stores.set_info(name, rows=rows, block_rows=4, dtype=self.dtype if name == "train" else "float32"),
                members=tuple(self.etas),
            )
            blocks = [range(*info.block_range(block)) for block in range(info.num_blocks)]
            made = store.create_set(info, [to_table([_example(name, row) for row in rows], rows[0]) for rows in blocks])
            for member in self.etas:
                for block, numbers in enumerate(blocks):
                    self._write(made.of_member(member), block, numbers)
        return self

    def _write(self, feature_set: FeatureSet, block: int, rows: range) -> None:
        info, member = feature_set.info, feature_set.member
        values = {name: array[rows.start : rows.stop] for name, array in self.features(info.name, member).items()}
        said = Outputs(
            function=self.output,
            values=self.column("margin", info.name, member)[rows.start : rows.stop],
            residuals=self.column("residual", info.name, member)[rows.start : rows.stop]
            if self.output == "das"
            else None,
        )
        statistics = Statistics(info)
        statistics.add(_covariances(info, block, member))
        feature_set.write_block(
            block,
            {name: array.astype(np.float32) for name, array in values.items()},
            examples=example_table(
                rows.start, [_example(info.name, row) for row in rows], said, values, arrays=info.arrays
            ),
            statistics=statistics.table(values),
            facts={},
        )

    def features(self, name: str, member: str = "m0") -> dict[str, np.ndarray]:
        """Features of a set by group, float32 [rows, k_j]."""
        found = {}
        for group, width in stores.GROUPS.items():
            array = _generator(name, member, group).standard_normal((ROWS[name], width), dtype=np.float32)
            if name == "train":
                for row, factor in self.scale.items():
                    array[row] *= np.float32(factor)
                array[list(self.zero)] = 0
                if member == next(iter(self.etas)):
                    array[list(self.invalid)] = np.nan
            found[group] = array
        return found

    def column(self, what: str, name: str, member: str = "m0") -> np.ndarray:
        """Outputs or residuals of a set, float64 [rows]."""
        found = _generator(name, member, what).standard_normal(ROWS[name])
        return found if what == "margin" else np.abs(found)

    def spec(self, changes: Mapping[str, Mapping[str, Any]] | None = None) -> RunSpec:
        """A run over the store."""
        members = [] if list(self.etas) == ["m0"] else [{"name": name, "eta": eta} for name, eta in self.etas.items()]
        tables: dict[str, Any] = {
            "run": {"name": "random", "store": self.url},
            "model": {"source": "nothing", "members": members},
            "data": {split: {"source": split, "rows": rows} for split, rows in ROWS.items()},
            "learn": {"k": 3, "epochs": 2},
            "cluster": {"workers": 2, "memory_per_worker": "4GiB"},
        }
        for table, values in (changes or {}).items():
            tables[table] = {**tables.get(table, {}), **values}
        return RunSpec.model_validate(tables)


def random_store(folder: Path | None = None, **settings: Any) -> RandomStore:
    """Make a store in a folder, or, which is five times as fast, in this process's memory."""
    url = f"memory://{uuid.uuid4().hex}" if folder is None else str(folder / "store")
    return RandomStore(url, **settings).make()


def covariances(member: str = "m0") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The two covariances of the only part of every group, summed over the train set, by group."""
    info = stores.set_info("train", rows=ROWS["train"], block_rows=4)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for block in range(info.num_blocks):
        sums = _covariances(info, block, member).covariances
        for array in info.arrays:
            left, right, _ = sums[array.parts[0].part]
            held = found.get(array.name, (0.0, 0.0))
            found[array.name] = held[0] + left.astype(np.float32), held[1] + right.astype(np.float32)
    return found


def _covariances(info: SetInfo, block: int, member: str) -> Batch:
    made = {}
    for array in info.arrays:
        generator, (part,) = _generator(info.name, member, f"{array.name} {block}"), array.parts
        left, right = (generator.standard_normal((20, length)) for length in part.shape)
        made[part.part] = left.T @ left, right.T @ right, 20
    return Batch(outputs=np.zeros(0), features={}, covariances=made)


def _generator(*key: str) -> np.random.Generator:
    digest = hashlib.blake2b("|".join(key).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _example(name: str, row: int) -> Example:
    inputs = {"tokens": np.array([row, row + 1], np.int64)}
    return Example(
        example_id=f"{name}-{row}",
        source=name,
        label=f"label {row % 2}",
        text=f"{name} {row}",
        content_hash=hash_inputs(inputs),
        size=2,
        inputs=inputs,
    )
