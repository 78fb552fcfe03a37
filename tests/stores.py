"""Small feature stores with features that a test can compute again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gradstore.store.backend import Storage
from gradstore.store.commits import Record
from gradstore.store.dtypes import DtypeName
from gradstore.store.features import FeatureArray, FeaturePart, FeatureSet, FeatureStore, SetInfo

CONTRACT = {"model": {"hash": "abc", "source": "tiny"}, "projection": {"kind": "logra", "rank": 2}}
RUN = {"run": {"name": "test"}}
GROUPS = {"layers.0.mlp": 6, "layers.1.mlp": 4, "head/μ": 2}


def set_info(
    name: str = "train",
    *,
    rows: int = 11,
    block_rows: int = 4,
    dtype: DtypeName = "float32",
    groups: Mapping[str, int] = GROUPS,
) -> SetInfo:
    """Describe a set whose scales differ from group to group if it is float16."""
    arrays = tuple(
        FeatureArray(
            name=group,
            features=width,
            scale=2.0 ** (index - 4) if dtype == "float16" else 1.0,
            depth=index,
            function="mlp",
            parts=(FeaturePart(part=f"{group}.weight[0:8,0:8]", start=0, shape=(width // 2, 2)),),
        )
        for index, (group, width) in enumerate(groups.items())
    )
    return SetInfo(
        name=name, rows=rows, block_rows=block_rows, dtype=dtype, arrays=arrays, data_hash=f"hash of {rows} rows"
    )


def inputs(info: SetInfo) -> list[pa.Table]:
    """Tokens of every block: row n holds n, n + 1."""
    return [
        pa.table(
            {
                "row": list(range(*info.block_range(block))),
                "tokens": [[n, n + 1] for n in range(*info.block_range(block))],
                "example_id": [f"example {n}" for n in range(*info.block_range(block))],
                "content_hash": [f"content {n}" for n in range(*info.block_range(block))],
                "label": pa.array([None for _ in range(*info.block_range(block))], pa.string()),
                "text": ["" for _ in range(*info.block_range(block))],
            }
        )
        for block in range(info.num_blocks)
    ]


def features(info: SetInfo, block: int) -> dict[str, npt.NDArray[np.float32]]:
    """Features of a block, from a generator keyed by the set, the group and the block."""
    start, stop = info.block_range(block)
    found = {}
    for array in info.arrays:
        key = hashlib.blake2b(f"{info.name}|{array.name}|{block}".encode(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(key, "little"))
        found[array.name] = rng.standard_normal((stop - start, array.features), dtype=np.float32)
    return found


def examples(info: SetInfo, block: int) -> pa.Table:
    """An example table; the labels of the first block are all null."""
    rows = list(range(*info.block_range(block)))
    labels = pa.array([None if block == 0 else f"label {row}" for row in rows], pa.string())
    ids = [f"example {row}" for row in rows]
    return pa.table({"row": rows, "example_id": ids, "label": labels, "valid": [True] * len(rows)})


def statistics(info: SetInfo, block: int) -> pa.Table:
    start, stop = info.block_range(block)
    return pa.table({"group": [array.name for array in info.arrays], "rows": [stop - start] * len(info.arrays)})


def create(target: str | Storage, info: SetInfo) -> FeatureSet:
    """Create a store and one set in it."""
    return FeatureStore.create(target, contract=CONTRACT, run=RUN).create_set(info, inputs(info))


def write(feature_set: FeatureSet, block: int, facts: Mapping[str, Any] | None = None) -> Record:
    """Write and commit one block."""
    info = feature_set.info
    return feature_set.write_block(
        block,
        features(info, block),
        examples=examples(info, block),
        statistics=statistics(info, block),
        facts={} if facts is None else facts,
    )


def all_objects(storage: Storage) -> dict[str, bytes]:
    """Every object of a storage, but for the attempt and times that records hold."""
    return {info.path: storage.read(info.path) for info in storage.list_objects("")}
