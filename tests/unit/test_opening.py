"""gradstore.open and gradstore.open_contributions: lazy, exact, of one moment, and wherever Dask takes them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import dask
import numpy as np
import pytest
import xarray

import gradstore
from gradstore.errors import IntegrityError, NotReadyError, SpecError, SupersededError
from gradstore.opening.datasets import variable_names
from gradstore.store.artifacts import ContributionArtifact, ContributionShape
from gradstore.store.backend import open_storage
from gradstore.store.backend.memory import MemoryStorage
from gradstore.store.features import FeatureStore
from tests import stores
from tests.formats.filled import append, erase, example, filled, whole, write
from tests.servers import S3Server


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


@pytest.fixture
def chunks_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the chunks that are read from a store in memory."""
    read: list[str] = []
    genuine = MemoryStorage.read_into

    def noting(self: MemoryStorage, path: str, buffer: memoryview) -> int:
        read.append(path)
        return genuine(self, path, buffer)

    monkeypatch.setattr(MemoryStorage, "read_into", noting)
    return read


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_group_is_a_variable_in_its_true_scale_with_the_examples_beside(
    url: str, dtype: Literal["float32", "float16"]
) -> None:
    made = filled(url, stores.set_info(dtype=dtype), invalid=[5])
    opened = gradstore.open(url)
    assert list(opened.data_vars) == list(stores.GROUPS)
    for group in stores.GROUPS:
        assert opened[group].dims == ("example", f"feature:{group}")
        assert opened[group].dtype == np.float32
        np.testing.assert_array_equal(opened[group].values, whole(made, group))
    assert np.isnan(opened["head/μ"].values[5]).all()
    assert list(opened.coords) == ["row", "example_id", "source", "label", "valid", "loss", "tokens"]
    assert opened["row"].values.tolist() == list(range(11))
    assert opened["example_id"].values.tolist() == [example(row).example_id for row in range(11)]
    assert opened["source"].values.tolist() == ["texts.jsonl"] * 11
    assert opened["label"].fillna("none").values.tolist() == [example(row).label or "none" for row in range(11)]
    assert opened["valid"].values.tolist() == [row != 5 for row in range(11)]
    assert opened["loss"].values.tolist() == [row / 8 for row in range(11)]
    assert opened["tokens"].values.tolist() == [3 + row for row in range(11)]
    assert opened.attrs == {
        "contract": stores.CONTRACT,
        "set": "train",
        "member": "m0",
        "block_rows": 4,
        "snapshot": [[0, 0], [1, 0], [2, 0]],
    }
    assert opened["layers.1.mlp"].attrs == {
        "group": "layers.1.mlp",
        "depth": 1,
        "function": "mlp",
        "parts": [{"part": "layers.1.mlp.weight[0:8,0:8]", "start": 0, "shape": (2, 2), "factors": None}],
    }


def test_opening_reads_no_features_and_a_slice_reads_only_the_blocks_that_hold_it(
    url: str, chunks_read: list[str]
) -> None:
    made = filled(url, stores.set_info())
    exact = whole(made, "layers.0.mlp")
    chunks_read.clear()
    opened = gradstore.open(url)
    assert chunks_read == []
    part = opened["layers.0.mlp"].isel({"example": slice(5, 7), "feature:layers.0.mlp": slice(1, None)})
    np.testing.assert_array_equal(part.values, exact[5:7, 1:])
    assert chunks_read == ["features/train/m0/layers.0.mlp/c.1.0"]


@pytest.mark.parametrize(
    "rows",
    [
        slice(None),
        slice(3, 9),
        slice(None, None, 3),
        slice(None, None, -1),
        slice(6, 6),
        7,
        -1,
        [10, 0, 5, 5],
        np.array([4]),
        np.arange(11) % 2 == 1,
    ],
)
@pytest.mark.parametrize("columns", [slice(None), 2, [3, 0], slice(1, 4, 2)])
def test_any_selection_is_what_numpy_would_select(url: str, rows: Any, columns: Any) -> None:
    made = filled(url, stores.set_info(dtype="float16"))
    exact = whole(made, "layers.1.mlp")
    if isinstance(rows, np.ndarray) and rows.dtype == bool:
        rows = np.flatnonzero(rows)
    found = gradstore.open(url)["layers.1.mlp"][{"example": rows, "feature:layers.1.mlp": columns}]
    np.testing.assert_array_equal(found.values, exact[rows][..., columns])


def test_points_of_a_pair_of_indexers_are_what_numpy_would_select(url: str) -> None:
    made = filled(url, stores.set_info())
    rows, columns = [9, 1, 1], [0, 5, 2]
    place = {"example": xarray.Variable("point", rows), "feature:layers.0.mlp": xarray.Variable("point", columns)}
    found = gradstore.open(url)["layers.0.mlp"].isel(place)
    np.testing.assert_array_equal(found.values, whole(made, "layers.0.mlp")[rows, columns])


def test_an_uncommitted_block_is_nan_and_its_examples_are_unknown(url: str, chunks_read: list[str]) -> None:
    made = filled(url, stores.set_info(), without=[1])
    opened = gradstore.open(url)
    np.testing.assert_array_equal(opened["head/μ"].values, whole(made, "head/μ", without=[1]))
    assert "features/train/m0/head%2F%CE%BC/c.1.0" not in chunks_read
    assert opened.attrs["snapshot"] == [[0, 0], [2, 0]]
    unknown = opened.isel(example=slice(4, 8))
    assert unknown["example_id"].isnull().all()
    assert not unknown["valid"].values.any()
    assert np.isnan(unknown["loss"].values).all()
    assert np.isnan(unknown["tokens"].values).all()


def test_a_block_that_is_committed_later_is_not_seen_until_the_store_is_opened_again(url: str) -> None:
    made = filled(url, stores.set_info(), without=[1])
    opened = gradstore.open(url)
    write(made, 1)
    assert np.isnan(opened["head/μ"].values[4:8]).all()
    np.testing.assert_array_equal(gradstore.open(url)["head/μ"].values, whole(made, "head/μ"))


def test_a_block_that_was_taken_back_since_is_an_error_that_says_so(url: str) -> None:
    made = filled(url, stores.set_info())
    opened = gradstore.open(url)
    made.log.take_back(1, "repair")
    with pytest.raises(SupersededError, match=r"features/train: 1 blocks, block 1 .* since the dataset was opened"):
        opened["head/μ"].load()


def test_rows_of_a_gap_and_of_erased_examples_are_nan_and_not_valid(url: str) -> None:
    made = append(filled(url, stores.set_info(rows=6)), 2, first=8)
    write(made, 2)
    erased = erase(made, [1, 9])
    opened = gradstore.open(url)
    known = [0, 2, 3, 4, 5, 8]
    assert opened.sizes["example"] == 10
    assert np.flatnonzero(opened["valid"].values).tolist() == known
    assert np.flatnonzero(opened["example_id"].notnull().values).tolist() == known
    assert np.flatnonzero(opened["tokens"].notnull().values).tolist() == known
    values = opened["layers.0.mlp"].values
    assert np.flatnonzero(np.isfinite(values).all(1)).tolist() == known
    np.testing.assert_array_equal(values, whole(erased, "layers.0.mlp"))
    assert opened.attrs["snapshot"] == [[0, 2], [1, 0], [2, 2]]


def test_an_append_is_not_seen_by_a_dataset_that_was_opened_before_it(url: str) -> None:
    made = filled(url, stores.set_info(rows=6))
    exact = whole(made, "head/μ")
    opened = gradstore.open(url)
    write(append(made, 2, first=8), 2)
    np.testing.assert_array_equal(opened["head/μ"].values, exact)


def test_contributions_of_a_train_set_that_grew_have_the_rows_that_they_were_made_of(url: str) -> None:
    values = contributions(url, "float32")
    append(FeatureStore.open(url).open_set("train"), 3, first=12)
    opened = gradstore.open_contributions(url, "block")
    np.testing.assert_array_equal(opened["contributions"].values, values)
    assert opened["example_id"].values.tolist() == [f"id-{row}" for row in range(11)]


def test_a_store_made_anew_at_the_same_place_is_not_mistaken_for_the_old(url: str) -> None:
    filled(url, stores.set_info())
    gradstore.open(url)["layers.0.mlp"].load()
    storage = open_storage(url)
    for info in list(storage.list_objects("")):
        storage.delete(info.path)
    made = filled(url, stores.set_info(dtype="float16", rows=10))
    np.testing.assert_array_equal(gradstore.open(url)["layers.0.mlp"].values, whole(made, "layers.0.mlp"))


def test_a_flipped_bit_is_an_error_that_names_the_chunk(tmp_path: Path) -> None:
    filled(str(tmp_path), stores.set_info())
    chunk = tmp_path / "features/train/m0/layers.1.mlp/c.2.0"
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    opened = gradstore.open(str(tmp_path))
    opened["layers.1.mlp"][:8].load()
    with pytest.raises(IntegrityError, match=str(chunk)):
        opened["layers.1.mlp"].load()


def test_a_pickled_dataset_is_small_and_reads_the_same(tmp_path: Path) -> None:
    made = filled(str(tmp_path), stores.set_info(rows=400, groups={"wide": 512}))
    opened = gradstore.open(str(tmp_path))
    sent = pickle.dumps(opened["wide"].variable)
    assert len(sent) < 20_000
    np.testing.assert_array_equal(pickle.loads(sent).values, whole(made, "wide"))


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_dask_reads_chunks_of_blocks(tmp_path: Path, scheduler: str) -> None:
    made = filled(str(tmp_path), stores.set_info(dtype="float16"), without=[2])
    opened = gradstore.open(str(tmp_path))
    chunked = opened.chunk({"example": opened.attrs["block_rows"]})
    assert chunked["layers.0.mlp"].chunks == ((4, 4, 3), (6,))
    with dask.config.set({"scheduler": scheduler, "multiprocessing.context": "spawn", "num_workers": 2}):
        sums = chunked["layers.0.mlp"].sum("feature:layers.0.mlp", skipna=False).compute()
    np.testing.assert_allclose(sums, whole(made, "layers.0.mlp", without=[2]).sum(1), rtol=1e-6)


def test_a_member_of_several_is_chosen_by_name(url: str) -> None:
    info = replace(stores.set_info(), members=("early", "late"))
    made = filled(url, info)
    late = made.of_member("late")
    write(late, 0)
    assert gradstore.open(url).attrs["member"] == "early"
    opened = gradstore.open(url, member="late")
    np.testing.assert_array_equal(opened["head/μ"].values, whole(late, "head/μ", without=[1, 2]))
    with pytest.raises(NotReadyError, match="has no member middle; found: early, late"):
        gradstore.open(url, member="middle")


def test_a_group_of_the_name_of_a_coordinate_or_of_a_dimension_gets_another(url: str) -> None:
    groups = {"example": 2, "label": 3, "group:label": 1}
    made = filled(url, stores.set_info(groups=groups))
    opened = gradstore.open(url)
    assert list(opened.data_vars) == ["group:example", "group:group:label", "group:label"]
    for variable, group in zip(opened.data_vars, groups, strict=True):
        assert opened[variable].attrs["group"] == group
        np.testing.assert_array_equal(opened[variable].values, whole(made, group))


def test_names_that_are_not_reserved_stay() -> None:
    assert variable_names(["a", "b/c"], {"example"}) == {"a": "a", "b/c": "b/c"}


@pytest.mark.parametrize("rows", [0, 1])
def test_a_set_without_rows_or_of_one_opens(url: str, rows: int) -> None:
    filled(url, stores.set_info(rows=rows))
    opened = gradstore.open(url)
    assert opened["layers.0.mlp"].shape == (rows, 6)
    assert np.isfinite(opened["layers.0.mlp"].values).all()


def test_what_is_not_there_is_said_with_what_is(url: str, tmp_path: Path) -> None:
    filled(url, stores.set_info())
    with pytest.raises(NotReadyError, match="there is no feature set learn; found: train"):
        gradstore.open(url, "learn")
    with pytest.raises(NotReadyError, match="no store is there"):
        gradstore.open(str(tmp_path / "nothing"))
    with pytest.raises(NotReadyError, match="contributions/block/eval: there is no such artifact"):
        gradstore.open_contributions(url, "block")


@pytest.mark.parametrize("call", [gradstore.open, lambda url: gradstore.open_contributions(url, "block")])
def test_without_xarray_the_error_says_what_to_install(
    url: str, call: Callable[[str], xarray.Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(url, stores.set_info())
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(SpecError, match=r"needs xarray, which is not installed: pip install 'gradstore\[xarray\]'"):
        call(url)


def test_importing_gradstore_imports_nothing_heavy() -> None:
    heavy = ("torch", "xarray", "numpy", "pyarrow", "zarr", "dask")
    code = f"import sys, gradstore; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def contributions(url: str, dtype: Literal["float32", "float16"], *, written: int = 3) -> np.ndarray:
    """Contributions of five queries to the train set of a store, of which some blocks are written; what was put in."""
    train = filled(url, stores.set_info())
    filled(url, stores.set_info("eval", rows=5))
    groups = tuple(stores.GROUPS)
    shape = ContributionShape(queries=5, rows=11, groups=groups, block_rows=4, query_tile=2, dtype=dtype)
    scales = np.array([1.0, 0.5, 2.0, 0.25, 1.0], np.float32) if dtype == "float16" else None
    artifact = ContributionArtifact.create(
        train.storage, "block", "eval", settings={"damping": 0.1}, shape=shape, scales=scales
    )
    values = np.random.default_rng(1).standard_normal((5, 11, 3)).astype(np.float16).astype(np.float32)
    for block in range(written):
        artifact.write_block(block, values[:, slice(*shape.block_range(block))], facts={})
    values[:, 4 * written :] = np.nan
    return values


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_contributions_are_one_variable_of_queries_examples_and_groups(
    url: str, dtype: Literal["float32", "float16"]
) -> None:
    values = contributions(url, dtype)
    opened = gradstore.open_contributions(url, "block")
    assert opened["contributions"].dims == ("query", "example", "group")
    np.testing.assert_array_equal(opened["contributions"].values, values)
    assert opened["group"].values.tolist() == list(stores.GROUPS)
    assert opened["example_id"].values.tolist() == [f"id-{row}" for row in range(11)]
    assert opened["query_example_id"].values.tolist() == [f"id-{row}" for row in range(5)]
    assert opened["query_label"].dims == ("query",)
    assert opened.attrs["settings"] == {"damping": 0.1}
    assert opened.attrs["snapshot"] == [[0, 0], [1, 0], [2, 0]]


def test_a_slice_of_contributions_reads_only_the_tiles_and_blocks_that_hold_it(
    url: str, chunks_read: list[str]
) -> None:
    values = contributions(url, "float16")
    found = gradstore.open_contributions(url, "block")["contributions"]
    chunks_read.clear()
    part = found.isel(query=[4, 1], example=slice(5, 7)).sel(group="layers.1.mlp")
    np.testing.assert_array_equal(part.values, values[[4, 1], 5:7, 1])
    assert sorted(chunks_read) == [f"contributions/block/eval/values/c/c.{tile}.1.0" for tile in (0, 2)]


def test_contributions_of_uncommitted_blocks_are_nan(url: str) -> None:
    values = contributions(url, "float32", written=2)
    np.testing.assert_array_equal(gradstore.open_contributions(url, "block")["contributions"].values, values)


def test_contributions_are_read_by_dask(url: str) -> None:
    values = contributions(url, "float32")
    opened = gradstore.open_contributions(url, "block").chunk({"example": 4, "query": 2})
    np.testing.assert_allclose(opened["contributions"].sum("group").values, values.sum(2), rtol=1e-6)


def test_a_store_on_s3_opens(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    place = seaweed.url(f"opening-{uuid4().hex}")
    made = filled(place, stores.set_info(dtype="float16"), without=[1])
    opened = gradstore.open(place)
    np.testing.assert_array_equal(opened["head/μ"].values, whole(made, "head/μ", without=[1]))
    np.testing.assert_array_equal(opened["layers.0.mlp"][9].values, whole(made, "layers.0.mlp", without=[1])[9])
