"""Appending to a feature set: blocks of their own, a gap, and readers of what it was."""

from __future__ import annotations

from itertools import count

import numpy as np
import pyarrow as pa
import pytest
import xarray

from gradstore.errors import ContractError, DataError
from gradstore.store.codecs import encode_table
from gradstore.store.features import FeatureSet, FeatureStore, SetInfo
from tests import stores
from tests.storages import Killed, KillingStorage

_NAMES = count()


@pytest.fixture
def url() -> str:
    return f"memory://append-{next(_NAMES)}"


def written(url: str, info: SetInfo) -> FeatureSet:
    made = stores.create(url, info)
    for block in made.missing_blocks():
        stores.write(made, block)
    return made


def extend(url: str, extended: SetInfo) -> FeatureSet:
    """Append what a set's info has more than the set."""
    store = FeatureStore.open(url)
    first = store.open_set(extended.name).info.num_blocks
    return store.extend_set(extended.name, extended, stores.inputs(extended)[first:])


def test_appended_rows_begin_at_the_next_multiple_of_the_block(url: str) -> None:
    made = written(url, stores.set_info(rows=10))
    again = extend(url, made.info.appended(5, "both", None))
    assert (again.info.rows, again.info.gaps, again.info.num_examples) == (17, ((10, 12),), 15)
    assert [again.info.block_range(block) for block in range(5)] == [(0, 4), (4, 8), (8, 10), (12, 16), (16, 17)]
    assert again.missing_blocks() == [3, 4]
    for block in again.missing_blocks():
        stores.write(again, block)
    assert again.read_examples(["row"])["row"].to_pylist() == [*range(10), *range(12, 17)]
    assert again.read_inputs(3)["row"].to_pylist() == [12, 13, 14, 15]
    assert np.flatnonzero(~again.valid_rows()).tolist() == [10, 11]
    assert again.read_column("label")[9:13] == ["label 9", None, None, "label 12"]


def test_a_set_whose_last_block_is_full_has_no_gap(url: str) -> None:
    made = written(url, stores.set_info(rows=8))
    again = extend(url, made.info.appended(1, "both", None))
    assert (again.info.rows, again.info.gaps) == (9, ())


def test_two_appends_leave_two_gaps(url: str) -> None:
    info = written(url, stores.set_info(rows=3)).info
    info = extend(url, info.appended(2, "two", None)).info
    info = extend(url, info.appended(4, "three", None)).info
    assert info.gaps == ((3, 4), (6, 8))
    assert [info.block_range(block) for block in range(3)] == [(0, 3), (4, 6), (8, 12)]


def test_who_opened_the_set_before_an_append_reads_what_it_was(url: str) -> None:
    made = written(url, stores.set_info(rows=10))
    before = FeatureStore.open(url).open_set("train")
    snapshot = before.snapshot()
    again = extend(url, made.info.appended(5, "both", None))
    stores.write(again, 3)
    assert before.snapshot() == snapshot
    assert before.read_examples(["row"])["row"].to_pylist() == list(range(10))
    assert len(before.read_block(2)["layers.0.mlp"]) == 2
    assert before.invalid_blocks() == []


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("changes", range(8))
def test_an_append_that_is_killed_at_any_object_is_finished_by_the_same_append(
    url: str, changes: int, after: bool
) -> None:
    made = written(url, stores.set_info(rows=10))
    extended = made.info.appended(5, "both", None)
    dying = FeatureStore.open(KillingStorage(made.storage, changes=changes, after=after))
    try:
        dying.extend_set("train", extended, stores.inputs(extended)[3:])
    except Killed:
        now = FeatureStore.open(url).open_set("train")
        if now.version.number == 1:
            return
        assert now.info == made.info
    extend(url, extended)
    undisturbed = f"{url}-undisturbed"
    written(undisturbed, stores.set_info(rows=10))
    extend(undisturbed, extended)
    ours, theirs = (
        {
            path: data
            for path, data in stores.all_objects(FeatureStore.open(each).storage).items()
            if "/blocks/" not in path
        }
        for each in (url, undisturbed)
    )
    assert ours == theirs


def test_another_append_while_one_is_unfinished_is_refused_with_the_way_out(url: str) -> None:
    made = written(url, stores.set_info(rows=10))
    extended = made.info.appended(5, "both", None)
    with pytest.raises(Killed):
        FeatureStore.open(KillingStorage(made.storage, changes=2)).extend_set(
            "train", extended, stores.inputs(extended)[3:]
        )
    with pytest.raises(ContractError, match=r"data_hash: store has 'both', the run asks for 'other'") as caught:
        extend(url, made.info.appended(5, "other", None))
    claim = f"{url}/features/train/claim.1.json"
    assert f"finish that, or delete {claim}" in str(caught.value)
    made.storage.delete("features/train/claim.1.json")
    # Nothing of the abandoned one is taken on, though what it left is sound.
    path = "features/train/inputs/000003.1.parquet"
    left = made.storage.read(path)
    made.storage.replace(path, encode_table(pa.table({"row": [1, 2, 3, 4]})).parts)
    again = extend(url, made.info.appended(5, "other", None))
    assert again.info.data_hash == "other"
    assert made.storage.read(path) == left


def test_an_append_of_other_rows_than_it_says_is_refused(url: str) -> None:
    made = written(url, stores.set_info(rows=10))
    extended = made.info.appended(5, "both", None)
    with pytest.raises(DataError, match="feature set train: takes 5 rows; the input tables given have 4"):
        FeatureStore.open(url).extend_set("train", extended, stores.inputs(extended)[3:4])


def test_other_readers_see_the_appended_rows(tmp_path: object) -> None:
    url = str(tmp_path)
    made = written(url, stores.set_info(rows=10))
    again = extend(url, made.info.appended(5, "both", None))
    for block in again.missing_blocks():
        stores.write(again, block)
    dataset = xarray.open_zarr(url, group="features/train/m0", consolidated=False, chunks=None)
    values = dataset["layers.0.mlp"].values
    assert values.shape == (17, 6)
    assert np.flatnonzero(np.isnan(values).any(1)).tolist() == [10, 11]
    np.testing.assert_array_equal(values[12:16], stores.features(again.info, 3)["layers.0.mlp"])
