"""Erasing examples: their bytes go, every other row keeps its place and its bits, whatever is killed."""

from __future__ import annotations

from contextlib import suppress
from itertools import count

import numpy as np
import pyarrow as pa
import pytest

from gradstore.errors import DataError, IntegrityError, StorageError, SupersededError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.dtypes import DTYPES, DtypeName
from gradstore.store.features import FeatureSet, FeatureStore, SetInfo, erase_rows, finish_erasure, is_finished
from tests import stores
from tests.storages import Killed, KillingStorage

_NAMES = count()


@pytest.fixture
def storage() -> Storage:
    return open_storage(f"memory://erasure-{next(_NAMES)}")


def statistics(info: SetInfo, features: dict[str, np.ndarray]) -> pa.Table:
    valid = [int(np.isfinite(values).all(1).sum()) for values in features.values()]
    return pa.table({"group": list(features), "rows": valid})


def written(storage: Storage, blocks: int = 3, dtype: DtypeName = "float32") -> FeatureSet:
    made = stores.create(storage, stores.set_info(dtype=dtype))
    for block in range(blocks):
        stores.write(made, block)
    return made


def erase(storage: Storage, rows: list[int]) -> list[int]:
    return erase_rows(FeatureStore.open(storage), "train", rows, statistics)  # type: ignore[arg-type]


def opened(storage: Storage) -> FeatureSet:
    return FeatureStore.open(storage).open_set("train")


def bytes_of_row(info: SetInfo, row: int) -> list[bytes]:
    """What must not be found anywhere once a row is erased: its features, and the texts of its tables."""
    block = row // info.block_rows
    values = [values[row - block * info.block_rows].tobytes() for values in stores.features(info, block).values()]
    return [*values, f"content {row}".encode(), f"example {row}".encode(), f"label {row}".encode()]


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_an_erased_row_is_gone_and_every_other_is_what_it_was(storage: Storage, dtype: DtypeName) -> None:
    before = written(storage, dtype=dtype)
    kept = {block: before.read_block(block) for block in range(3)}
    assert erase(storage, [5, 9]) == [1, 2]
    now = opened(storage)
    assert now.missing_blocks() == []
    for block in range(3):
        start, stop = now.info.block_range(block)
        for name, values in now.read_block(block).items():
            for row in range(start, stop):
                if row in (5, 9):
                    assert np.isnan(values[row - start]).all()
                else:
                    np.testing.assert_array_equal(values[row - start], kept[block][name][row - start])
    assert np.flatnonzero(~now.valid_rows()).tolist() == [5, 9]
    assert now.read_column("label")[4:7] == ["label 4", None, "label 6"]
    assert now.read_inputs(1)["example_id"].to_pylist() == ["example 4", None, "example 6", "example 7"]
    assert now.read_inputs(1)["tokens"].to_pylist()[1] is None
    assert now.log.committed()[1].facts["erased"] == [1]
    assert now.log.committed()[1].facts["nan_rows"] == 1
    assert now.log.committed()[1].facts["covariances"] == "stale"
    assert is_finished(now)
    assert statistics_rows(now) == [4, 3, 2]


def statistics_rows(feature_set: FeatureSet) -> list[int]:
    table = feature_set.read_statistics()
    first = table.filter(pa.compute.equal(table["group"], "layers.0.mlp"))
    return list(first["rows"].to_pylist())


def test_no_object_of_the_store_holds_a_byte_of_it(storage: Storage) -> None:
    info = written(storage).info
    needles = bytes_of_row(info, 6)
    everything = b"".join(uncompressed(stores.all_objects(storage)))
    assert all(needle in everything for needle in needles)
    erase(storage, [6])
    everything = b"".join(uncompressed(stores.all_objects(storage)))
    assert not [needle for needle in needles if needle in everything]


def uncompressed(objects: dict[str, bytes]) -> list[bytes]:
    """Objects with the tables among them written out, since parquet compresses."""
    import pyarrow.parquet as pq

    return [
        str(pq.read_table(pa.BufferReader(data)).to_pylist()).encode() if path.endswith(".parquet") else data
        for path, data in objects.items()
    ]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("changes", range(15))
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_an_erasure_that_is_killed_at_any_change_is_finished_by_the_next(
    storage: Storage, dtype: DtypeName, changes: int, after: bool
) -> None:
    before = written(storage, dtype=dtype)
    kept = before.read_block(1)
    with suppress(Killed):
        erase(KillingStorage(storage, changes=changes, after=after), [5])
    now = opened(storage)
    if now.info.erased:
        finish_erasure(now, statistics)  # type: ignore[arg-type]
    else:
        erase(storage, [5])
    now = opened(storage)
    assert is_finished(now)
    assert now.missing_blocks() == []
    for name, values in now.read_block(1).items():
        assert np.isnan(values[1]).all()
        np.testing.assert_array_equal(values[[0, 2, 3]], kept[name][[0, 2, 3]])
    everything = b"".join(uncompressed(stores.all_objects(storage)))
    assert not [needle for needle in bytes_of_row(now.info, 5) if needle in everything]


def test_erasing_again_changes_nothing(storage: Storage) -> None:
    written(storage)
    erase(storage, [5])
    before = stores.all_objects(storage)
    assert erase(storage, [5]) == []
    assert stores.all_objects(storage) == before


def test_a_row_of_a_block_that_is_not_computed_yet_never_comes_in(storage: Storage) -> None:
    writer = written(storage, blocks=1)
    assert writer.begin(1)
    erase(storage, [5])
    with pytest.raises(SupersededError):
        stores.write(writer, 1)
    # Whoever opened the set before does not know of the erasure, and may not begin anew.
    with pytest.raises(SupersededError, match=r"set\.1\.json is there"):
        writer.begin(1)
    now = opened(storage)
    assert now.missing_blocks() == [1, 2]
    everything = b"".join(uncompressed(stores.all_objects(storage)))
    assert np.isfinite(stores.features(now.info, 1)["layers.0.mlp"][1]).all()
    assert stores.features(now.info, 1)["layers.0.mlp"][1].tobytes() not in everything


def test_a_reader_of_before_the_erasure_is_ended_by_it(storage: Storage) -> None:
    reader = written(storage)
    reader.snapshot()
    erase(storage, [5])
    with pytest.raises(SupersededError):
        reader.read_block(1)
    reader.read_block(0)


def test_a_second_erasure_keeps_the_first(storage: Storage) -> None:
    written(storage)
    erase(storage, [5])
    erase(storage, [4, 1])
    now = opened(storage)
    assert now.info.erased == (1, 4, 5)
    assert now.version.number == 2
    assert np.flatnonzero(~now.valid_rows()).tolist() == [1, 4, 5]
    paths = [info.path for info in storage.list_objects("features/train/inputs")]
    assert sorted(paths) == [f"features/train/inputs/{name}.parquet" for name in ("000000.2", "000001.2", "000002.0")]


def test_a_damaged_block_is_left_alone_until_it_is_repaired(storage: Storage) -> None:
    written(storage)
    path = "features/train/m0/layers.0.mlp/c.1.0"
    storage.replace(path, [storage.read(path)[:-1]])
    with pytest.raises(IntegrityError, match=r"layers\.0\.mlp/c\.1\.0.*gradstore repair"):
        erase(storage, [5])
    opened(storage).log.take_back(1, "repair")
    erase(storage, [5])
    assert opened(storage).missing_blocks() == [1]
    assert is_finished(opened(storage))


@pytest.mark.parametrize("row", [-1, 11, 400])
def test_a_row_of_no_example_is_refused(storage: Storage, row: int) -> None:
    written(storage)
    with pytest.raises(DataError, match=f"row {row} is of no example; the set has 11 in rows 0 to 10"):
        erase(storage, [row])


def test_data_with_or_without_the_erased_examples_is_the_sets(storage: Storage) -> None:
    from dataclasses import replace

    from gradstore.store.examples import data_hash_of_facts

    made = written(storage)
    erase(storage, [5])
    left = data_hash_of_facts((f"content {row}", f"example {row}", None) for row in range(11) if row != 5)
    assert opened(storage).info.remaining_hash == left
    without = replace(made.info, rows=10, data_hash=left)
    tables = stores.inputs(made.info)
    path = "features/train/inputs/000001.1.parquet"
    whole = opened(storage).read_inputs(1)
    storage.delete(path)
    again = FeatureStore.open(storage).create_set(
        without, [tables[0], tables[1].filter(pa.compute.not_equal(tables[1]["row"], 5)), tables[2]]
    )
    assert again.info.num_examples == 11
    assert again.read_inputs(1).equals(whole)
    storage.delete(path)
    again = FeatureStore.open(storage).create_set(made.info, tables)
    assert again.read_inputs(1).equals(whole)


@pytest.mark.parametrize("changes", range(4))
def test_an_erasure_that_slept_brings_no_row_back_that_a_later_one_took_out(storage: Storage, changes: int) -> None:
    written(storage)
    erase_first = KillingStorage(storage, changes=changes, event=lambda: erase(storage, [6]))
    # Told that it was overtaken, or that the inputs that it was about to read are gone.
    with suppress(StorageError):
        erase(erase_first, [5])
    erase(storage, [5, 6])
    now = opened(storage)
    assert is_finished(now)
    assert np.flatnonzero(~now.valid_rows()).tolist() == [5, 6]
    everything = b"".join(uncompressed(stores.all_objects(storage)))
    assert not [needle for row in (5, 6) for needle in bytes_of_row(now.info, row) if needle in everything]
