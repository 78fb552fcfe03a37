"""zarr-python, xarray and tensorstore read what the store wrote, and see the numbers that the store sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore
import xarray
import zarr

from gradstore.store.artifacts import (
    ContributionArtifact,
    ContributionShape,
    KernelArtifact,
    MomentsArtifact,
    MomentsShape,
    QueryArtifact,
    QueryShape,
    SpanMoments,
    SpectraShape,
)
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureSet
from gradstore.store.health import mend
from tests import stores
from tests.health import check

GROUPS = {"model.layers.0.mlp.up_proj": 6, "..": 2, "a/b": 3, "μ": 1, "zarr.json": 2, "long." * 60: 4}


def filled(folder: Path, dtype: Literal["float32", "float16"] = "float32") -> FeatureSet:
    """A set whose last block is shorter and whose middle one is not written."""
    made = stores.create(str(folder), stores.set_info(dtype=dtype, groups=GROUPS))
    stores.write(made, 0)
    stores.write(made, 2)
    return made


def expected(made: FeatureSet, group: str) -> np.ndarray:
    """The store's own reading, with NaN where nothing is written."""
    whole = np.full((made.info.rows, GROUPS[group]), np.nan, np.float32)
    for block in (0, 2):
        whole[slice(*made.info.block_range(block))] = made.read_block(block)[group]
    return whole


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_xarray_opens_all_groups_and_decodes_their_scales(tmp_path: Path, dtype: Literal["float32", "float16"]) -> None:
    made = filled(tmp_path, dtype)
    dataset = xarray.open_zarr(str(tmp_path), group="features/train/m0", consolidated=False, chunks=None)
    by_group = {array.attrs["group"]: array for array in dataset.data_vars.values()}
    assert set(by_group) == set(GROUPS)
    for group, array in by_group.items():
        assert array.dims == ("example", f"feature:{group}")
        # A JSON scale_factor is a double, so xarray decodes to double; the scale is a power of two, so exactly.
        assert array.dtype == (np.float64 if dtype == "float16" else np.float32)
        np.testing.assert_array_equal(array.values, expected(made, group))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_zarr_python_reads_the_stored_values(tmp_path: Path, dtype: Literal["float32", "float16"]) -> None:
    made = filled(tmp_path, dtype)
    root = zarr.open_group(str(tmp_path), mode="r")
    for array in made.info.arrays:
        stored = root[f"features/train/{made.info.array_path('m0', array.name)}"]
        assert isinstance(stored, zarr.Array)
        assert stored.dtype == np.dtype(dtype)
        assert stored.attrs.get("scale_factor", 1.0) == array.scale
        values = np.asarray(stored[:]).astype(np.float32) * np.float32(array.scale)
        np.testing.assert_array_equal(values, expected(made, array.name))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_tensorstore_reads_the_stored_values(tmp_path: Path, dtype: Literal["float32", "float16"]) -> None:
    made = filled(tmp_path, dtype)
    for array in made.info.arrays:
        path = tmp_path / "features/train" / made.info.array_path("m0", array.name)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
        values = np.asarray(tensorstore.open(spec, read=True).result().read().result())
        assert values.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(values.astype(np.float32) * np.float32(array.scale), expected(made, array.name))


def test_every_reader_notices_a_flipped_bit(tmp_path: Path) -> None:
    made = filled(tmp_path)
    path = tmp_path / "features/train" / made.info.array_path("m0", "a/b")
    chunk = path / "c.0.0"
    data = bytearray(chunk.read_bytes())
    data[9] ^= 2
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match="checksum do not match"):
        zarr.open_array(str(path), mode="r")[:]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    with pytest.raises(ValueError, match="Digest mismatch"):
        tensorstore.open(spec, read=True).result().read().result()


def test_what_zarr_python_writes_the_store_would_have_written(tmp_path: Path) -> None:
    made = filled(tmp_path / "ours")
    array = made.info.arrays[0]
    inside = f"features/train/{made.info.array_path('m0', array.name)}"
    theirs = zarr.create_array(
        str(tmp_path / "theirs"),
        shape=(made.info.rows, array.features),
        chunks=(made.info.block_rows, array.features),
        dtype="float32",
        fill_value=float("nan"),
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=zarr.codecs.Crc32cCodec(),
        filters=None,
    )
    theirs[:4] = made.read_block(0)[array.name]
    theirs[8:] = made.read_block(2)[array.name]
    for chunk in ("c.0.0", "c.2.0"):
        ours = (tmp_path / "ours" / inside / chunk).read_bytes()
        written = (tmp_path / "theirs" / chunk).read_bytes()
        # zarr-python fills the rows below the array's end with the fill value too, so the whole object is equal.
        assert ours == written


def test_the_example_table_is_plain_parquet(tmp_path: Path) -> None:
    filled(tmp_path)
    table = pq.read_table(tmp_path / "features/train/examples")
    assert table.column("row").to_pylist() == [0, 1, 2, 3, 8, 9, 10]


def test_xarray_opens_contributions_queries_and_spectra(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    shape = ContributionShape(queries=3, rows=5, groups=("a", "b"), block_rows=4, query_tile=2, dtype="float16")
    scales = np.array([0.5, 0.25, 2.0], np.float32)
    made = ContributionArtifact.create(storage, "block", "eval", settings={}, shape=shape, scales=scales)
    values = np.random.default_rng(0).standard_normal((3, 5, 2), dtype=np.float32)
    for block in range(2):
        made.write_block(block, values[:, slice(*shape.block_range(block))], facts={})
    dataset = xarray.open_zarr(str(tmp_path), group="contributions/block/eval/values", consolidated=False, chunks=None)
    assert dataset["c"].dims == ("query", "example", "group")
    assert dataset["c"].attrs["groups"] == ["a", "b"]
    decoded = dataset["c"].astype("float32") * dataset[dataset["c"].attrs["scaled_by"]]
    np.testing.assert_array_equal(decoded.values, np.concatenate(list(made.read_blocks(0, 3)), axis=1))

    kept = QueryShape(queries=3, groups=("a",), widths={"a": 2})
    queries = QueryArtifact.create(storage, "block", ("eval", "m0"), settings={}, shape=kept)
    queries.write({"a": values[:, 0]}, np.ones((3, 1)), facts={})
    opened = xarray.open_zarr(str(tmp_path), group="queries/block/eval/m0/features", consolidated=False, chunks=None)
    np.testing.assert_array_equal(opened["a"].values, values[:, 0])

    spectra = SpectraShape(widths={"a": 2})
    kernel = KernelArtifact.create(storage, "block", "m0", settings={}, shape=spectra, bundles=[["a"]])
    kernel.write_bundle(0, {"a": (np.array([1.0, 2.0]), np.eye(2))}, facts={})
    opened = xarray.open_zarr(str(tmp_path), group="kernels/block/m0/eigenvalues", consolidated=False, chunks=None)
    np.testing.assert_array_equal(opened["a"].values, [1.0, 2.0])


def moments(folder: Path, dtype: Literal["float32", "float16"]) -> MomentsArtifact:
    """Moments of two spans, of queries that differ in size by orders of magnitude; the second span has one row."""
    shape = MomentsShape(queries=3, groups=("a", "b"), spans=(0, 1, 2), candidates=2, dtype=dtype)
    scales = np.array([2.0**-20, 1.0, 2.0**15], np.float32)
    made = MomentsArtifact.create(
        open_storage(str(folder)),
        ("block", "learn"),
        settings={},
        recorded={"mode": "tensor", "seed": 0},
        shape=shape,
        scales=scales if dtype == "float16" else None,
    )
    for span in range(2):
        rng = np.random.default_rng(span)
        # Eleven bits, which float16 holds.
        c_QKM = rng.integers(-1024, 1024, (3, 2, 2)).astype(np.float32) * scales[:, None, None]
        rows_QK = np.tile(np.arange(2), (3, 1))
        if span == 1:
            c_QKM[:, 1], rows_QK[:, 1] = np.nan, -1
        made.write_span(span, SpanMoments(rng.standard_normal((3, 2, 2)), c_QKM, rows_QK), facts={})
    return made


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_xarray_opens_moments_and_its_candidates_are_scaled_as_contributions_are(
    tmp_path: Path, dtype: Literal["float32", "float16"]
) -> None:
    made = moments(tmp_path, dtype)
    expected = [made.read_span(span) for span in range(2)]

    dataset = xarray.open_zarr(str(tmp_path), group="moments/block/learn/values", consolidated=False, chunks=None)

    decoded = dataset["candidates"]
    assert decoded.dims == ("span", "query", "candidate", "group")
    assert decoded.attrs["groups"] == ["a", "b"]
    assert ("scaled_by" in decoded.attrs) == (dtype == "float16")
    if "scaled_by" in decoded.attrs:
        decoded = decoded.astype("float32") * dataset[decoded.attrs["scaled_by"]]
    # The array of scales has the queries only, so that the order of axes is to be kept.
    decoded = decoded.transpose("span", "query", "candidate", "group")
    np.testing.assert_array_equal(decoded.values, np.stack([span.candidates for span in expected]))
    np.testing.assert_array_equal(dataset["rows"].values, np.stack([span.rows for span in expected]))
    np.testing.assert_array_equal(
        dataset["second_moments"].values, np.stack([span.second_moments for span in expected])
    )
    assert "scaled_by" not in dataset["second_moments"].attrs


def test_candidates_of_before_they_named_their_scale_are_read_and_repair_names_it(tmp_path: Path) -> None:
    stores.create(str(tmp_path), stores.set_info())
    made = moments(tmp_path, "float16")
    before = made.read_span(0).candidates
    metadata = tmp_path / "moments/block/learn/values/candidates/zarr.json"
    now = metadata.read_bytes()
    document = json.loads(now)
    del document["attributes"]["scaled_by"]
    metadata.write_text(json.dumps(document), encoding="utf-8")

    opened = MomentsArtifact.open(open_storage(str(tmp_path)), ("block", "learn"))

    np.testing.assert_array_equal(opened.read_span(0).candidates, before)
    mended = mend(check(opened.storage, full=True), dry_run=False)
    assert mended.metadata == ("moments/block/learn/values/candidates/zarr.json",)
    assert metadata.read_bytes() == now
