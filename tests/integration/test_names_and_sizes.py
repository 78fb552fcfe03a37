"""Group names that file systems and URLs would take for something else, and sets of unusual sizes."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import zarr

from gradstore.store.features import FeatureSet, FeatureStore
from tests import stores
from tests.servers import S3Server

_NAMES = count()
NAMES = [
    "model.layers.0.mlp.up_proj",
    "a/b",
    "a%2Fb",
    "/absolute",
    "../../outside",
    "..",
    ".",
    ".hidden",
    "__reserved",
    "zarr.json",
    "c",
    "c.0.0",
    "two words",
    "new\nline",
    "question?mark#hash",
    "back\\slash:colon*star",
    "μ/λ",
    "層.零",
    "🦜",
    "é",
    "e\u0301",
    "long." * 400,
    "long." * 400 + "other",
    "層" * 300,
    "~",
    "",
]
GROUPS = dict.fromkeys(NAMES, 2)


def write_all(made: FeatureSet) -> FeatureSet:
    for block in made.missing_blocks():
        stores.write(made, block)
    return FeatureStore.open(made.storage.url).open_set(made.info.name)


def require_right(opened: FeatureSet) -> None:
    """Every block reads back as what was written."""
    for block in range(opened.info.num_blocks):
        found = opened.read_block(block)
        expected = stores.features(opened.info, block)
        assert list(found) == list(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)


def test_every_group_name_reads_back_in_the_store_and_in_plain_zarr(tmp_path: Path) -> None:
    opened = write_all(stores.create(str(tmp_path / "store"), stores.set_info(groups=GROUPS)))
    require_right(opened)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    arrays = dict(zarr.open_group(str(tmp_path / "store/features/train/m0"), mode="r").arrays())
    by_name = {str(array.attrs["group"]): array for array in arrays.values()}
    assert by_name.keys() == GROUPS.keys()
    for name, array in by_name.items():
        expected = [stores.features(opened.info, block)[name] for block in range(opened.info.num_blocks)]
        np.testing.assert_array_equal(np.asarray(array[:]), np.concatenate(expected))


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_every_group_name_reads_back_from_s3(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, client: str) -> None:
    for name, value in {**seaweed.env, "GRADSTORE_S3_CLIENT": client}.items():
        monkeypatch.setenv(name, value)
    made = stores.create(seaweed.url(f"names-{next(_NAMES)}"), stores.set_info(groups=GROUPS))
    require_right(write_all(made))


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 11])
def test_sets_of_one_row_and_of_rows_that_fill_no_block_read_back(tmp_path: Path, rows: int) -> None:
    opened = write_all(stores.create(str(tmp_path), stores.set_info(rows=rows, block_rows=4)))
    require_right(opened)
    assert opened.info.num_blocks == -(-rows // 4)
    assert opened.read_examples(["row"])["row"].to_pylist() == [*range(rows)]
    array = zarr.open_array(str(tmp_path / "features/train/m0/layers.0.mlp"), mode="r")
    assert array.shape == (rows, 6)
    assert np.isfinite(np.asarray(array[:])).all()


def test_a_set_of_no_rows_is_complete_and_empty(tmp_path: Path) -> None:
    opened = write_all(stores.create(str(tmp_path), stores.set_info(rows=0)))
    assert opened.missing_blocks() == []
    assert opened.snapshot().blocks == ()
    assert opened.read_examples().num_rows == 0
    assert opened.read_statistics().num_rows == 0
    assert zarr.open_array(str(tmp_path / "features/train/m0/layers.0.mlp"), mode="r").shape == (0, 6)


@pytest.mark.slow
def test_ten_thousand_groups_are_created_written_and_read_in_seconds(tmp_path: Path) -> None:
    groups = {f"model.layers.{layer}.experts.{expert}": 2 for layer in range(100) for expert in range(100)}
    info = stores.set_info(rows=4, block_rows=4, groups=groups)
    began = time.process_time()
    made = stores.create(str(tmp_path), info)
    assert time.process_time() - began < 30
    opened = write_all(made)
    require_right(opened)
    assert len(opened.log.committed()[0].objects) == 10_002
