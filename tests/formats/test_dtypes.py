"""zarr-python, xarray and tensorstore read every stored type, compressed or not, and see the numbers that the store sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import xarray
import zarr

from gradstore.store.dtypes import DTYPES, DtypeName
from gradstore.store.features import FeatureSet
from tests import stores

BLOCKS = (0, 2)
INVALID_ROW = 1
Stored = tuple[np.ndarray, Mapping[str, Any]]


def filled(folder: Path, dtype: DtypeName, compression: str) -> FeatureSet:
    """A set whose second row is not valid, whose last block is shorter, and whose middle one is not written."""
    info = replace(stores.set_info(dtype=dtype), compression=compression)
    made = stores.create(str(folder), info)
    for block in BLOCKS:
        features = stores.features(info, block)
        for values in features.values():
            values[INVALID_ROW if block == 0 else []] = np.nan
        made.write_block(
            block,
            features,
            examples=stores.examples(info, block),
            statistics=stores.statistics(info, block),
            facts={},
        )
    return made


def by_zarr(folder: Path, inside: str) -> Stored:
    array = zarr.open_array(str(folder / inside), mode="r")
    return np.asarray(array[:]), dict(array.attrs)


def by_tensorstore(folder: Path, inside: str) -> Stored:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / inside}/"}}
    array = tensorstore.open(spec, read=True).result()
    return np.asarray(array.read().result()), array.spec().to_json()["metadata"].get("attributes", {})


def by_xarray(folder: Path, inside: str) -> Stored:
    parent, _, name = inside.rpartition("/")
    dataset = xarray.open_zarr(str(folder), group=parent, consolidated=False, chunks=None, mask_and_scale=False)
    return dataset[name].values, dataset[name].attrs


READERS: Mapping[str, Callable[[Path, str], Stored]] = {
    "zarr": by_zarr,
    "tensorstore": by_tensorstore,
    "xarray": by_xarray,
}


def numbers(read: Callable[[str], Stored], inside: str) -> np.ndarray:
    """The numbers of a group's array, as docs/format.md tells a reader to make them, in one line for each type."""
    stored, attributes = read(inside)
    if attributes.get("stored_as") == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if "scaled_by" in attributes:
        set_folder, member, _ = inside.rsplit("/", 2)
        scales, of_scales = read(f"{set_folder}/{attributes['scaled_by']}/{member}")
        return stored * scales[:, [of_scales["groups"].index(attributes["group"])]]
    return stored.astype(np.float32) * np.float32(attributes.get("scale_factor", 1.0))


@pytest.mark.parametrize("reader", sorted(READERS))
@pytest.mark.parametrize("compression", ["none", "blosc"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_another_reader_sees_the_numbers_of_the_store(
    tmp_path: Path, dtype: DtypeName, compression: str, reader: str
) -> None:
    made = filled(tmp_path, dtype, compression)
    for array in made.info.arrays:
        inside = f"features/train/{made.info.array_path('m0', array.name)}"
        found = numbers(partial(READERS[reader], tmp_path), inside)
        assert found.shape == (11, array.features)
        for block in BLOCKS:
            rows = slice(*made.info.block_range(block))
            np.testing.assert_array_equal(found[rows], made.read_block(block)[array.name])
            np.testing.assert_allclose(found[rows], expected(made, block, array.name), atol=0.02, rtol=0.004)


def expected(made: FeatureSet, block: int, group: str) -> np.ndarray:
    values = stores.features(made.info, block)[group]
    values[INVALID_ROW if block == 0 else []] = np.nan
    return values


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_what_was_never_written_is_no_number_to_any_reader(tmp_path: Path, dtype: DtypeName) -> None:
    made = filled(tmp_path, dtype, "none")
    for array in made.info.arrays:
        inside = f"features/train/{made.info.array_path('m0', array.name)}"
        for reader in READERS.values():
            assert np.isnan(numbers(partial(reader, tmp_path), inside)[4:8]).all()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_zarr_python_would_have_compressed_a_chunk_to_the_same_bytes(tmp_path: Path, dtype: DtypeName) -> None:
    made = filled(tmp_path / "ours", dtype, "blosc")
    inside = f"features/train/{made.info.array_path('m0', made.info.arrays[0].name)}"
    ours = zarr.open_array(str(tmp_path / "ours" / inside), mode="r")
    theirs = zarr.create_array(
        str(tmp_path / "theirs"),
        shape=ours.shape,
        chunks=ours.chunks,
        dtype=ours.dtype,
        fill_value=ours.fill_value,
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=ours.compressors,
        filters=None,
    )
    theirs[:4] = ours[:4]
    first = (tmp_path / "ours" / inside / "c.0.0").read_bytes()
    assert first == (tmp_path / "theirs" / "c.0.0").read_bytes()
    assert [type(codec).__name__ for codec in ours.compressors] == ["BloscCodec", "Crc32cCodec"]


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_flipped_bit_of_a_compressed_chunk_is_noticed(tmp_path: Path, dtype: DtypeName, reader: str) -> None:
    made = filled(tmp_path, dtype, "blosc")
    inside = f"features/train/{made.info.array_path('m0', made.info.arrays[0].name)}"
    chunk = tmp_path / inside / "c.0.0"
    data = bytearray(chunk.read_bytes())
    data[20] ^= 2
    chunk.write_bytes(data)
    with pytest.raises(ValueError, match=r"checksum do not match|Digest mismatch"):
        READERS[reader](tmp_path, inside)
