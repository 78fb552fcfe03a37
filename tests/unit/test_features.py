"""Feature stores and feature sets."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest

from gradstore.errors import ContractError, DataError, IntegrityError, NotReadyError, SpecError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.codecs import encode_document
from gradstore.store.features import FeatureStore
from tests import stores
from tests.storages import Killed, KillingStorage, die

_NAMES = count()


@pytest.fixture
def url() -> str:
    return f"memory://features-{next(_NAMES)}"


def test_an_equal_contract_opens_the_store_and_another_run_is_no_matter(url: str) -> None:
    FeatureStore.create(url, contract=stores.CONTRACT, run={"run": {"name": "first"}})
    again = FeatureStore.create(url, contract=stores.CONTRACT, run={"run": {"name": "second"}})
    assert again.run == {"run": {"name": "first"}}
    assert again.contract == stores.CONTRACT


def test_another_contract_is_refused_with_every_differing_field_side_by_side(url: str) -> None:
    FeatureStore.create(url, contract=stores.CONTRACT, run={})
    asked = {"model": {"hash": "xyz", "source": "tiny"}, "projection": {"kind": "logra", "rank": 4}, "bias": True}
    with pytest.raises(ContractError) as caught:
        FeatureStore.create(url, contract=asked, run={})
    message = str(caught.value)
    assert "model.hash: store has 'abc', the run asks for 'xyz'" in message
    assert "projection.rank: store has 2, the run asks for 4" in message
    assert "bias: store has nothing, the run asks for True" in message
    assert "source" not in message
    assert "choose another run.store" in message


def test_opening_where_no_store_is_says_what_to_run_first(url: str) -> None:
    with pytest.raises(NotReadyError, match=r"no store is there.*Run `gradstore featurize` first"):
        FeatureStore.open(url)


def test_a_store_of_a_newer_format_is_refused(url: str) -> None:
    document = encode_document({"format_version": 2, "contract": {}, "run": {}, "versions": {}})
    open_storage(url).publish("gradstore.json", document.parts)
    with pytest.raises(ContractError, match="format version 2; this gradstore reads version 1"):
        FeatureStore.open(url)


def test_opening_a_set_that_is_not_there_names_those_that_are(url: str) -> None:
    stores.create(url, stores.set_info("train"))
    store = FeatureStore.open(url)
    assert store.set_names() == ["train"]
    with pytest.raises(NotReadyError, match="no feature set eval; found: train"):
        store.open_set("eval")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_features_read_back_in_their_true_scale(url: str, dtype: Literal["float32", "float16"]) -> None:
    info = stores.set_info(dtype=dtype)
    made = stores.create(url, info)
    for block in range(info.num_blocks):
        stores.write(made, block)
    opened = FeatureStore.open(url).open_set("train")
    for block in range(info.num_blocks):
        found = opened.read_block(block)
        for array in info.arrays:
            exact = stores.features(info, block)[array.name]
            if dtype == "float16":
                exact = (exact / np.float32(array.scale)).astype(np.float16).astype(np.float32) * np.float32(
                    array.scale
                )
            np.testing.assert_array_equal(found[array.name], exact)


def test_reading_into_given_arrays_makes_no_new_ones_and_reads_the_named_groups_only(url: str) -> None:
    info = stores.set_info(dtype="float16")
    made = stores.create(url, info)
    for block in range(info.num_blocks):
        stores.write(made, block)
    out = {"layers.1.mlp": np.full((info.block_rows, 4), 7, np.float32)}
    found = made.read_block(2, ["layers.1.mlp"], out)
    assert list(found) == ["layers.1.mlp"]
    assert np.shares_memory(found["layers.1.mlp"], out["layers.1.mlp"])
    assert found["layers.1.mlp"].shape == (3, 4)
    assert (out["layers.1.mlp"][3:] == 7).all()


def test_an_uncommitted_block_is_not_read(url: str) -> None:
    made = stores.create(url, stores.set_info())
    stores.write(made, 0)
    with pytest.raises(NotReadyError, match=r"features/train: block 1 is not committed. Run `gradstore featurize`"):
        made.read_block(1)
    assert made.missing_blocks() == [1, 2]


def test_a_snapshot_is_complete_or_says_how_much_is_there(url: str) -> None:
    made = stores.create(url, stores.set_info())
    stores.write(made, 1)
    with pytest.raises(NotReadyError, match="1 of 3 blocks are committed"):
        made.snapshot()
    stores.write(made, 0)
    stores.write(made, 2)
    assert made.snapshot().to_json() == {"feature_set": "train", "member": "m0", "blocks": [[0, 0], [1, 0], [2, 0]]}


def test_writing_a_committed_block_again_returns_its_record_and_writes_nothing(url: str) -> None:
    made = stores.create(url, stores.set_info())
    record = stores.write(made, 0, {"seconds": 1})
    before = stores.all_objects(made.storage)
    assert stores.write(made, 0, {"seconds": 2}) == record
    assert stores.all_objects(made.storage) == before


def test_the_record_counts_what_was_lost_and_what_is_not_finite(url: str) -> None:
    info = stores.set_info(rows=4, dtype="float16")
    made = stores.create(url, info)
    values = stores.features(info, 0)
    values["layers.0.mlp"][0, :2] = [1e9, -1e9]
    values["layers.1.mlp"][1, 0] = 1e-12
    values["head/μ"][2, 0] = np.nan
    values["layers.1.mlp"][2, 0] = np.inf
    record = made.write_block(
        0, values, examples=stores.examples(info, 0), statistics=stores.statistics(info, 0), facts={"seconds": 0.5}
    )
    assert record.facts == {
        "seconds": 0.5,
        "rows": 4,
        "nan_rows": 1,
        "saturated": 2,
        "flushed": 1,
        "saturated_groups": ["layers.0.mlp"],
    }
    assert np.isnan(made.read_block(0)["head/μ"][2, 0])


def test_the_record_names_every_object_of_the_block(url: str) -> None:
    made = stores.create(url, stores.set_info())
    record = stores.write(made, 1)
    assert set(record.objects) == {
        "m0/layers.0.mlp/c.1.0",
        "m0/layers.1.mlp/c.1.0",
        "m0/head%2F%CE%BC/c.1.0",
        "examples/m0/000001.parquet",
        "statistics/m0/000001.parquet",
    }
    sizes = {
        info.path.removeprefix("features/train/"): info.bytes for info in made.storage.list_objects("features/train")
    }
    assert all(entry.bytes == sizes[path] for path, entry in record.objects.items())


def test_example_and_statistics_tables_join_the_committed_blocks_in_order(url: str) -> None:
    info = stores.set_info()
    made = stores.create(url, info)
    assert made.read_examples().num_rows == 0
    for block in (2, 0):
        stores.write(made, block)
    assert made.read_examples(["row"]).column("row").to_pylist() == [0, 1, 2, 3, 8, 9, 10]
    assert made.read_examples().column("label").to_pylist()[:5] == [None] * 4 + ["label 8"]
    assert made.read_statistics().column("rows").to_pylist() == [4, 4, 4, 3, 3, 3]


def test_inputs_read_back_and_are_checked(url: str) -> None:
    info = stores.set_info()
    made = stores.create(url, info)
    assert made.read_inputs(2).equals(stores.inputs(info)[2])
    made.storage.delete("features/train/inputs/000002.0.parquet")
    made.storage.publish("features/train/inputs/000002.0.parquet", [b"PAR1 something else"])
    with pytest.raises(
        IntegrityError, match=r"inputs/000002\.0\.parquet: .* Run `gradstore featurize` again: it restores"
    ):
        made.read_inputs(2)


def test_how_an_existing_set_was_made_wins_over_what_is_asked(url: str) -> None:
    stores.create(url, replace(stores.set_info(dtype="float16"), recorded={"token_budget": 64}))
    again = stores.create(url, replace(stores.set_info(block_rows=2), recorded={"token_budget": 8}))
    assert again.info.block_rows == 4
    assert again.info.dtype == "float16"
    assert again.info.recorded == {"token_budget": 64}
    assert again.info.arrays[0].scale == 2.0**-4


def test_a_set_of_other_examples_or_groups_is_refused_field_by_field(url: str) -> None:
    stores.create(url, stores.set_info())
    with pytest.raises(
        ContractError, match=r"data_hash: store has 'hash of 11 rows', the run asks for 'hash of 12 rows'"
    ):
        stores.create(url, stores.set_info(rows=12))
    with pytest.raises(ContractError, match=r"arrays\.layers\.1\.mlp\.features: store has 4, the run asks for 5"):
        stores.create(url, stores.set_info(groups={**stores.GROUPS, "layers.1.mlp": 5}))
    with pytest.raises(ContractError, match="order: store has"):
        stores.create(url, stores.set_info(groups=dict(reversed(stores.GROUPS.items()))))


def test_inputs_are_not_read_when_the_set_is_there(url: str) -> None:
    info = stores.set_info()
    stores.create(url, info)

    def never() -> pa.Table:
        raise AssertionError

    FeatureStore.open(url).create_set(info, (never() for _ in range(3)))


@pytest.mark.parametrize(("tables", "rows"), [(2, 8), (4, 15)])
def test_too_few_or_too_many_inputs_are_refused(url: str, tables: int, rows: int) -> None:
    info = stores.set_info()
    given = (stores.inputs(info) + stores.inputs(info))[:tables]
    store = FeatureStore.create(url, contract={}, run={})
    with pytest.raises(DataError, match=f"feature set train: takes 11 rows; the input tables given have {rows}"):
        store.create_set(info, given)
    assert store.set_names() == []


@pytest.mark.parametrize("changes", range(16))
@pytest.mark.parametrize("dies", [False, True])
def test_creators_at_any_moment_of_each_other_make_one_set(url: str, changes: int, dies: bool) -> None:
    ours = stores.set_info(dtype="float16", block_rows=2)
    theirs = stores.set_info(dtype="float16")
    theirs = replace(theirs, arrays=tuple(replace(array, scale=2.0 * array.scale) for array in theirs.arrays))
    storage = open_storage(url)
    event = die if dies else lambda: stores.write(stores.create(storage, theirs), 0)
    with suppress(Killed):
        stores.create(KillingStorage(storage, changes=changes, event=event), ours)
    made = stores.create(storage, theirs)
    assert made.info in (ours, theirs)
    inputs = [made.read_inputs(block) for block in range(made.info.num_blocks)]
    assert pa.concat_tables(inputs).equals(pa.concat_tables(stores.inputs(ours)))
    assert [table.num_rows for table in inputs] == [table.num_rows for table in stores.inputs(made.info)]
    for array in made.info.arrays:
        metadata = json.loads(storage.read(f"features/train/{made.info.array_path('m0', array.name)}/zarr.json"))
        assert metadata["attributes"]["scale_factor"] == array.scale
        assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [made.info.block_rows, array.features]
    if not dies and 0 not in made.missing_blocks():
        made.read_block(0)


def test_an_unfinished_creation_with_other_data_is_refused_until_its_folder_is_deleted(url: str) -> None:
    storage = open_storage(url)
    with pytest.raises(Killed):
        stores.create(KillingStorage(storage, changes=5), stores.set_info(rows=12))
    with pytest.raises(ContractError) as caught:
        stores.create(url, stores.set_info())
    assert "examples: store has 12, the run asks for 11" in str(caught.value)
    assert f"not finished: if no other run is at it, delete the folder {url}/features/train" in str(caught.value)
    for info in storage.list_objects("features/train"):
        storage.delete(info.path)
    assert stores.create(url, stores.set_info()).info.rows == 11


def records_read(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the records that are read from now on."""
    asked: list[str] = []
    read = storage.read

    def noting(path: str) -> bytes:
        if "/blocks/" in path:
            asked.append(path.rpartition("/")[2])
        return read(path)

    monkeypatch.setattr(storage, "read", noting)
    return asked


def test_a_set_that_is_opened_reads_each_record_once_and_one_generation(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stores.create(url, stores.set_info())
    for block in range(2):
        stores.write(made, block)
    opened = FeatureStore.open(url).open_set("train")
    asked = records_read(opened.storage, monkeypatch)
    first = opened.read_block(0)
    made.log.take_back(0, "repair")
    again = opened.read_block(0, ["layers.0.mlp"])
    np.testing.assert_array_equal(again["layers.0.mlp"], first["layers.0.mlp"])
    assert asked == ["000000.0.json", "000000.1.json"]
    with pytest.raises(NotReadyError, match="block 0 is not committed"):
        FeatureStore.open(url).open_set("train").read_block(0)


def test_after_a_snapshot_a_block_costs_one_request_for_its_record(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = stores.create(url, stores.set_info(rows=4))
    stores.write(made, 0)
    opened = FeatureStore.open(url).open_set("train")
    opened.snapshot()
    asked = records_read(opened.storage, monkeypatch)
    opened.read_block(0)
    assert asked == ["000000.0.json"]


def test_an_unfinished_set_is_swept_when_it_is_created_again(tmp_path: Path) -> None:
    stores.create(str(tmp_path), stores.set_info())
    abandoned = tmp_path / "features/train/m0/.gradstore-dead"
    abandoned.write_bytes(b"")
    os.utime(abandoned, (0, 0))
    stores.create(str(tmp_path), stores.set_info())
    assert not abandoned.exists()


@pytest.mark.parametrize("change", ["shape", "dtype", "groups", "examples", "block"])
def test_features_that_are_not_those_of_the_block_are_refused(url: str, change: str) -> None:
    info = stores.set_info()
    made = stores.create(url, info)
    values, table, block = dict(stores.features(info, 0)), stores.examples(info, 0), 0
    if change == "shape":
        values["layers.0.mlp"] = values["layers.0.mlp"][:3]
    elif change == "dtype":
        values["layers.0.mlp"] = values["layers.0.mlp"].astype(np.float64)
    elif change == "groups":
        del values["layers.0.mlp"]
    elif change == "examples":
        table = table.slice(1)
    else:
        block = 3
    with pytest.raises(DataError, match=f"features/train: block {block}: "):
        made.write_block(block, values, examples=table, statistics=stores.statistics(info, 0), facts={})
    assert made.missing_blocks() == [0, 1, 2]


def test_a_column_without_a_type_is_refused_because_other_tools_could_not_join_the_parts(url: str) -> None:
    info = stores.set_info()
    made = stores.create(url, info)
    untyped = pa.table({"row": [0, 1, 2, 3], "label": [None] * 4})
    with pytest.raises(DataError, match="block 0: columns without a type: label"):
        made.write_block(0, stores.features(info, 0), examples=untyped, statistics=stores.statistics(info, 0), facts={})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "../x"}, "found '../x'"),
        ({"block_rows": 0}, "blocks need at least one"),
        ({"dtype": "int16"}, "dtype: found .int16.; accepted: float32, float16, bfloat16, int8"),
        ({"compression": "zip"}, "compression: found .zip.; accepted: none, blosc"),
        ({"members": ("m0", "m0")}, "each of its own"),
    ],
)
def test_a_set_that_the_format_cannot_hold_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        replace(stores.set_info(), **change)  # type: ignore[arg-type]


def test_a_scale_that_is_no_power_of_two_is_refused() -> None:
    info = stores.set_info(dtype="float16")
    with pytest.raises(SpecError, match=r"scale of layers\.0\.mlp: found 0\.3; accepted"):
        replace(info, arrays=(replace(info.arrays[0], scale=0.3),))


def test_two_groups_of_one_name_are_refused() -> None:
    info = stores.set_info()
    with pytest.raises(SpecError, match="two arrays have one name"):
        replace(info, arrays=(*info.arrays, info.arrays[0]))


@pytest.mark.parametrize(("rows", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_a_set_of_any_length_reads_back(url: str, rows: int, blocks: int) -> None:
    info = stores.set_info(rows=rows)
    made = stores.create(url, info)
    for block in range(info.num_blocks):
        stores.write(made, block)
    assert info.num_blocks == blocks
    assert len(made.snapshot().blocks) == blocks
    assert sum(len(made.read_block(block)["layers.0.mlp"]) for block in range(blocks)) == rows


def test_on_disk_a_flipped_bit_is_caught_and_the_file_named(tmp_path: Path) -> None:
    made = stores.create(str(tmp_path), stores.set_info())
    stores.write(made, 0)
    chunk = tmp_path / "features/train/m0/layers.1.mlp/c.0.0"
    data = bytearray(chunk.read_bytes())
    data[17] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(IntegrityError, match=str(chunk)):
        made.read_block(0)
    assert set(made.read_block(0, ["layers.0.mlp"])) == {"layers.0.mlp"}
