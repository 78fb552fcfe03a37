"""The committed store of version 1, read by other tools and by gradstore: each finds the numbers that were recorded.

What the readers of other tools do here is what docs/format.md tells them to do, in a few plain lines that share nothing with
gradstore. The numbers come from store-v1.expected.json, which was written from formulas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import duckdb
import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorstore
import xarray
import zarr

import gradstore
from gradstore.store.artifacts import ContributionArtifact, KernelArtifact, SelfInfluenceArtifact
from gradstore.store.features import FeatureStore
from tests.formats.make_fixture import EXPECTED, FIXTURE, expected, make

FOUND: Mapping[str, Any] = json.loads(EXPECTED.read_text(encoding="utf-8"))
SETS = list(FOUND["sets"])
TRAIN = FIXTURE / "features/train"

Reader = Callable[[Path], tuple[np.ndarray, Mapping[str, Any]]]
"""Gives the values and the attributes of a Zarr array."""


def by_zarr_python(path: Path) -> tuple[np.ndarray, Mapping[str, Any]]:
    array = zarr.open_array(str(path), mode="r")
    return np.asarray(array[...]), dict(array.attrs)


def by_tensorstore(path: Path) -> tuple[np.ndarray, Mapping[str, Any]]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    array = tensorstore.open(spec, read=True).result()
    metadata = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
    return np.asarray(array.read().result()), metadata["attributes"]


def by_xarray(path: Path) -> tuple[np.ndarray, Mapping[str, Any]]:
    """What xarray decodes by itself, which is scale_factor, is no longer among the attributes."""
    dataset = xarray.open_zarr(str(path.parent), consolidated=False, chunks=None)
    return np.asarray(dataset[path.name].values), dataset[path.name].attrs


READERS: Mapping[str, Reader] = {"zarr-python": by_zarr_python, "tensorstore": by_tensorstore, "xarray": by_xarray}


def committed_blocks(records: Path) -> list[int]:
    """Blocks whose highest generation is even."""
    highest: dict[int, int] = {}
    for record in records.iterdir():
        block, generation, _ = record.name.split(".")
        highest[int(block)] = max(int(generation), highest.get(int(block), 0))
    return sorted(block for block, generation in highest.items() if generation % 2 == 0)


def features(read: Reader, name: str) -> dict[str, np.ndarray]:
    """Features of a set by group, as docs/format.md says that they are read."""
    folder = FIXTURE / "features" / name
    scales = scales_by_group(read, folder / "scales/m0")
    found = {}
    for path in (folder / "m0").iterdir():
        if path.name == "zarr.json":
            continue
        stored, attributes = read(path)
        values = decoded(stored, attributes, scales.get(attributes["group"]))
        rows = np.arange(len(values)) // 4
        values[~np.isin(rows, committed_blocks(folder / "blocks/m0"))] = np.nan
        found[attributes["group"]] = values
    return found


def scales_by_group(read: Reader, path: Path) -> dict[str, np.ndarray]:
    """Scale of every row in every group, of a set that has them."""
    if not path.exists():
        return {}
    scales, attributes = read(path)
    return dict(zip(attributes["groups"], scales.T, strict=True))


def decoded(stored: np.ndarray, attributes: Mapping[str, Any], scale: np.ndarray | None) -> np.ndarray:
    if attributes.get("stored_as") == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if "scaled_by" in attributes:
        assert scale is not None
        return np.asarray(np.where(stored == -128, np.float32(np.nan), stored * scale[:, None]))
    return np.asarray(stored * attributes.get("scale_factor", 1.0), np.float32)


def numbers(values: Any) -> np.ndarray:
    """Nested lists of the recorded numbers as an array; None is NaN."""
    return np.array(values, np.float32)


def documents() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(FIXTURE.rglob("*.json")):
        if path.name != "zarr.json":
            yield path, json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("reader", READERS)
def test_another_reader_finds_the_recorded_features(reader: str, name: str) -> None:
    found = features(READERS[reader], name)
    recorded = FOUND["sets"][name]["features"]
    assert set(found) == set(recorded)
    for group, values in recorded.items():
        np.testing.assert_array_equal(found[group], numbers(values), err_msg=group)


@pytest.mark.parametrize("name", SETS)
def test_gradstore_finds_the_recorded_features(name: str) -> None:
    opened = gradstore.open(str(FIXTURE), name)
    recorded = FOUND["sets"][name]["features"]
    assert list(opened.data_vars) == list(recorded)
    for group, values in recorded.items():
        np.testing.assert_array_equal(opened[group].values, numbers(values), err_msg=group)
    assert FeatureStore.open(str(FIXTURE)).open_set(name).info.dtype == FOUND["sets"][name]["dtype"]


@pytest.mark.parametrize("name", SETS)
def test_duckdb_finds_the_recorded_examples(name: str) -> None:
    folder = FIXTURE / "features" / name
    recorded = FOUND["sets"][name]["examples"]
    blocks = committed_blocks(folder / "blocks/m0")
    query = f"""
        SELECT "row", example_id, label, loss, valid FROM read_parquet('{folder}/examples/m0/*.parquet')
        WHERE "row" // 4 IN {blocks} ORDER BY "row"
    """
    rows = duckdb.connect().execute(query).fetchall()
    erased = [row for row in rows if row[1] is None]
    assert erased == [(row, None, None, None, False) for row in FOUND["sets"][name]["erased"]]
    columns = zip(*(row for row in rows if row not in erased), strict=True)
    assert dict(zip(recorded, map(list, columns), strict=True)) == recorded


@pytest.mark.parametrize("name", SETS)
def test_gradstore_finds_the_recorded_examples(name: str) -> None:
    recorded = FOUND["sets"][name]["examples"]
    table = FeatureStore.open(str(FIXTURE)).open_set(name).read_examples(list(recorded))
    known = [row for row in table.to_pylist() if row["example_id"] is not None]
    assert {column: [row[column] for row in known] for column in recorded} == recorded


@pytest.mark.parametrize("reader", READERS)
def test_another_reader_finds_the_recorded_contributions(reader: str) -> None:
    folder = FIXTURE / "contributions/block/eval/values"
    stored, attributes = READERS[reader](folder / "c")
    scale = READERS[reader](folder / attributes["scaled_by"])[0]
    assert attributes["groups"] == list(FOUND["sets"]["train"]["features"])
    np.testing.assert_array_equal(stored.astype(np.float32) * scale[:, None, None], numbers(FOUND["contributions"]))


def test_gradstore_finds_the_recorded_contributions() -> None:
    opened = gradstore.open_contributions(str(FIXTURE), "block")
    np.testing.assert_array_equal(opened["contributions"].values, numbers(FOUND["contributions"]))
    artifact = ContributionArtifact.open(FeatureStore.open(str(FIXTURE)).storage, "block", "eval")
    assert artifact.is_complete()


@pytest.mark.parametrize("reader", READERS)
def test_another_reader_finds_the_recorded_self_influence(reader: str) -> None:
    stored, attributes = READERS[reader](FIXTURE / "self-influence/block/m0/values/tau")
    assert attributes["groups"] == list(FOUND["sets"]["train"]["features"])
    np.testing.assert_array_equal(stored, numbers(FOUND["self_influence"]))


def test_gradstore_finds_the_recorded_self_influence() -> None:
    artifact = SelfInfluenceArtifact.open(FeatureStore.open(str(FIXTURE)).storage, "block", "m0")
    np.testing.assert_array_equal(artifact.read(), numbers(FOUND["self_influence"]))


@pytest.mark.parametrize("reader", READERS)
def test_another_reader_finds_the_recorded_spectra(reader: str) -> None:
    folder = FIXTURE / "kernels/block/m0"
    found = {}
    for path in (folder / "eigenvalues").iterdir():
        if path.name != "zarr.json":
            values, attributes = READERS[reader](path)
            vectors, _ = READERS[reader](folder / "eigenvectors" / path.name)
            found[attributes["group"]] = [values.tolist(), vectors.tolist()]
    assert found == FOUND["spectra"]


def test_gradstore_finds_the_recorded_spectra() -> None:
    kernel = KernelArtifact.open(FeatureStore.open(str(FIXTURE)).storage, "block", "m0")
    found = {group: [part.tolist() for part in kernel.read(group)] for group in FOUND["spectra"]}
    assert found == FOUND["spectra"]


def test_every_document_has_the_checksum_that_the_format_says() -> None:
    found = list(documents())
    assert len(found) > 20
    for path, document in found:
        stated = document.pop("crc32c")
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert f"{google_crc32c.value(text.encode()):08x}" == stated, path


def test_every_object_of_a_committed_block_is_what_its_record_says() -> None:
    checked = 0
    for name in SETS:
        folder = FIXTURE / "features" / name
        for block in committed_blocks(folder / "blocks/m0"):
            record = max(folder.glob(f"blocks/m0/{block:06d}.*.json"), key=lambda path: int(path.name.split(".")[1]))
            for path, entry in json.loads(record.read_text(encoding="utf-8"))["objects"].items():
                data = (folder / path).read_bytes()
                assert len(data) == entry["bytes"], path
                content = data if path.endswith(".parquet") else data[:-4]
                assert f"{google_crc32c.value(content):08x}" == entry["crc32c"], path
                if content is not data:
                    assert int.from_bytes(data[-4:], "little") == int(entry["crc32c"], 16), path
                checked += 1
    assert checked > 20


def test_a_folder_of_a_group_is_named_as_the_format_says() -> None:
    folders = {
        json.loads(path.read_text(encoding="utf-8"))["attributes"]["group"]: path.parent.name
        for path in TRAIN.glob("m0/*/zarr.json")
    }
    assert folders["head/μ"] == "head%2F%CE%BC"
    assert folders[".."] == "%2E."
    long = next(group for group in folders if len(group) > 200)
    assert folders[long] == f"{long[:167]}~21f052ef97812a27318a3ce5dc3a9ce3"


def test_the_record_that_the_format_page_shows_is_the_fixtures() -> None:
    page = (Path(__file__).parents[2] / "docs/format.md").read_text(encoding="utf-8")
    shown = re.search(r"```json\n(.*?)```", page, re.DOTALL)
    record = (FIXTURE / "features/eval/blocks/m0/000000.0.json").read_bytes()
    assert shown is not None
    assert _lasting(shown[1].encode(), same_writer=True) == _lasting(record, same_writer=True)


def test_the_recorded_numbers_are_those_of_the_formulas() -> None:
    assert json.loads(json.dumps(expected())) == FOUND


def test_making_the_store_again_makes_the_same_objects(tmp_path: Path) -> None:
    make(tmp_path / "again")
    theirs, ours = _objects(tmp_path / "again"), _objects(FIXTURE)
    assert set(theirs) == set(ours)
    # Parquet files name the version of pyarrow that wrote them, and documents their checksums.
    same_writer = json.loads(ours["gradstore.json"])["versions"]["pyarrow"] == version("pyarrow")
    for path, data in ours.items():
        if path.endswith(".parquet"):
            assert _rows(theirs[path]) == _rows(data), path
            assert theirs[path] == data or not same_writer, path
        elif path.endswith(".json"):
            assert _lasting(theirs[path], same_writer) == _lasting(data, same_writer), path
        else:
            assert theirs[path] == data, path


def _objects(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _rows(data: bytes) -> str:
    """Columns and types of a table as text, in which NaN is equal to NaN."""
    table = pq.read_table(pa.BufferReader(data))
    return f"{table.schema} {table.to_pydict()}"


def _lasting(data: bytes, same_writer: bool) -> Any:
    """What a document says that does not change from one making to the next."""
    document = json.loads(data)
    for key in ("attempt", "versions", "crc32c"):
        document.pop(key, None)
    if not same_writer:
        for entries in (document.get("objects", {}), document.get("inputs", {})):
            for path in entries:
                if path.endswith(".parquet"):
                    entries[path] = None
    return document
