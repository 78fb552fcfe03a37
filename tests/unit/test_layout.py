"""Names, paths and metadata of the format."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.errors import SpecError
from gradstore.store.layout import (
    ArrayLayout,
    check_name,
    chunk_path,
    encode_group,
    metadata_objects,
    parse_record_path,
    part_path,
    record_path,
)


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.3.mlp.up_proj"),
        ("a/b", "a%2Fb"),
        ("..", "%2E."),
        (".hidden", "%2Ehidden"),
        ("__reserved", "%5F_reserved"),
        ("zarr.json", "%7Aarr.json"),
        ("100%", "100%25"),
        ("μ", "%CE%BC"),
        ("", "%"),
    ],
)
def test_a_group_name_becomes_one_harmless_folder_name(name: str, encoded: str) -> None:
    assert encode_group(name) == encoded


@given(st.text(max_size=400))
def test_every_group_name_becomes_a_name_that_file_systems_and_zarr_take(name: str) -> None:
    encoded = encode_group(name)
    assert 0 < len(encoded.encode()) <= 200
    assert not encoded.startswith((".", "__"))
    assert "/" not in encoded


@given(st.lists(st.text(alphabet="ab./%~_μ", max_size=90), min_size=2, max_size=20, unique=True))
def test_two_group_names_never_share_a_folder(names: list[str]) -> None:
    assert len({encode_group(name) for name in names}) == len(names)


def test_long_names_that_differ_at_their_ends_only_stay_apart() -> None:
    first, second = encode_group("layer." * 100 + "a"), encode_group("layer." * 100 + "b")
    assert first != second
    assert len(first) == len(second) == 200


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a b", "x" * 201])
def test_a_name_of_a_set_or_artifact_that_is_no_plain_folder_name_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=r"kernel\.name: found"):
        check_name("kernel.name", name)


def test_paths_sort_in_the_order_of_blocks() -> None:
    assert part_path("examples", 12) == "examples/000012.parquet"
    assert chunk_path("m0/a", 12, 0) == "m0/a/c.12.0"
    assert record_path("features/train/blocks", 12, 1) == "features/train/blocks/000012.1.json"


def test_a_record_path_tells_unit_and_generation_and_other_paths_tell_nothing() -> None:
    assert parse_record_path("features/train/blocks/000012.1.json") == (12, 1)
    assert parse_record_path("features/train/set.json") is None


def test_metadata_names_codecs_fill_value_and_dimensions() -> None:
    layout = ArrayLayout(
        shape=(10, 4),
        chunk_shape=(8, 4),
        dtype="float16",
        dimension_names=("example", "feature:a"),
        attributes={"group": "a", "scale_factor": 0.25},
    )
    made = metadata_objects({"features/train/m0/a": layout})
    assert set(made) == {
        "zarr.json",
        "features/zarr.json",
        "features/train/zarr.json",
        "features/train/m0/zarr.json",
        "features/train/m0/a/zarr.json",
    }
    array = json.loads(made["features/train/m0/a/zarr.json"])
    assert array["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    assert array["fill_value"] == "NaN"
    assert array["dimension_names"] == ["example", "feature:a"]
    assert array["attributes"] == {"group": "a", "scale_factor": 0.25}
    assert array["chunk_grid"]["configuration"]["chunk_shape"] == [8, 4]


def test_chunks_at_the_end_hold_less_than_a_chunk() -> None:
    layout = ArrayLayout(shape=(10, 4), chunk_shape=(8, 4), dtype="float16", dimension_names=("example", "feature"))
    assert layout.num_chunks == (2, 1)
    assert layout.chunk_extent((0, 0)) == (8, 4)
    assert layout.chunk_extent((1, 0)) == (2, 4)
    assert layout.chunk_bytes == 8 * 4 * 2 + 4


def test_metadata_of_many_arrays_is_what_zarr_makes_of_each() -> None:
    nan = float("nan")
    kinds = [
        ("float32", "none", 2, nan),
        ("float16", "none", 2, nan),
        ("float16", "blosc", 2, nan),
        ("int8", "none", 1, 0),
    ]
    arrays = {
        f"features/{place}/{dtype} {compression}/μ{index}": ArrayLayout(
            shape=(index + 1,) * ndim,
            chunk_shape=(4,) * ndim,
            dtype=dtype,
            dimension_names=("example", "feature:μ")[:ndim],
            attributes={"group": f"μ{index}", "scale_factor": 0.5, "nested": [{"a": None}]},
            compression=compression,
            fill_value=fill_value,
        )
        for index in range(3)
        for place in ("one", "two")
        for dtype, compression, ndim, fill_value in kinds
    }
    together = metadata_objects(arrays)
    alone: dict[str, bytes] = {}
    for path, layout in arrays.items():
        alone |= metadata_objects({path: layout})
    assert together == alone
