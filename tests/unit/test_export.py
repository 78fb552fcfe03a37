"""gradstore export: the features that were asked for, exactly, in one whole file or none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from gradstore.cli import main
from gradstore.errors import DataError, GradstoreError, IntegrityError, NotReadyError, ResourceError, SpecError
from gradstore.stages.export import Room, Selection, export
from gradstore.stages.progress import Progress
from gradstore.store.features import FeatureSet
from tests import stores
from tests.formats.filled import append, erase, example, filled, whole, write

SUFFIXES = (".parquet", ".npz", ".safetensors")
QUIET = Progress(quiet=True)


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}"


def features_in(path: Path) -> dict[str, np.ndarray]:
    """Features of an exported file by name, with ``row`` and ``example_id``, as other tools read it."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        names = [name for name in table.column_names if name not in ("row", "example_id", "label")]
        found = {name: np.stack(table[name].to_numpy()) for name in names}
        return {**found, **{name: table[name].to_numpy() for name in ("row", "example_id")}}
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name not in ("label", "gradstore")}
    with safe_open(path, framework="numpy") as file:
        about = {name: np.array(json.loads(file.metadata()[name])) for name in ("row", "example_id")}
        return {**{name: file.get_tensor(name) for name in file.keys()}, **about}  # noqa: SIM118 - safetensors has no iterator


def run(url: str, path: Path, *, force: bool = False, room: Room | None = None, **selection: Any) -> dict[str, Any]:
    return export(url, path, Selection(**selection), force=force, progress=QUIET, room=room)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_whole_set_is_exported_exactly(
    url: str, tmp_path: Path, suffix: str, dtype: Literal["float32", "float16"]
) -> None:
    made = filled(url, stores.set_info(dtype=dtype))
    out = tmp_path / f"out{suffix}"
    found = run(url, out)
    assert found == {"rows": 11, "groups": 3, "bytes": out.stat().st_size, "path": str(out), "left_out": 0}
    read = features_in(out)
    assert set(read) == {*stores.GROUPS, "row", "example_id"}
    for group in stores.GROUPS:
        assert read[group].dtype == np.float32
        np.testing.assert_array_equal(read[group], whole(made, group))
    assert read["row"].tolist() == list(range(11))
    assert read["example_id"].tolist() == [example(row).example_id for row in range(11)]
    assert [item.name for item in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("selection", "rows"),
    [
        ({"rows": "2:9"}, [2, 3, 4, 5, 6, 7, 8]),
        ({"rows": ":4"}, [0, 1, 2, 3]),
        ({"rows": "10:"}, [10]),
        ({"ids": ["id-9", "id-2", "id-3"]}, [2, 3, 9]),
    ],
)
def test_rows_are_chosen_by_range_or_id_and_keep_the_order_of_the_set(
    url: str, tmp_path: Path, suffix: str, selection: dict[str, Any], rows: list[int]
) -> None:
    made = filled(url, stores.set_info())
    if "ids" in selection:
        (tmp_path / "ids.txt").write_text("\n".join([*selection["ids"], ""]), encoding="utf-8")
        selection = {"ids": tmp_path / "ids.txt"}
    out = tmp_path / f"out{suffix}"
    assert run(url, out, **selection)["rows"] == len(rows)
    read = features_in(out)
    assert read["row"].tolist() == rows
    for group in stores.GROUPS:
        np.testing.assert_array_equal(read[group], whole(made, group)[rows])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_groups_are_chosen_by_their_whole_names(url: str, tmp_path: Path, suffix: str) -> None:
    filled(url, stores.set_info())
    run(url, tmp_path / f"out{suffix}", groups=r"layers\.\d+\.mlp")
    assert set(features_in(tmp_path / f"out{suffix}")) == {"layers.0.mlp", "layers.1.mlp", "row", "example_id"}
    with pytest.raises(
        SpecError, match=r"'layers' matches no group's whole name; the set has 3, such as: layers\.0\.mlp"
    ):
        run(url, tmp_path / f"other{suffix}", groups="layers")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_that_are_not_valid_are_left_out_and_counted(url: str, tmp_path: Path, suffix: str) -> None:
    made = filled(url, stores.set_info(), invalid=[4, 5, 6, 7, 9])
    out = tmp_path / f"out{suffix}"
    assert run(url, out) == {"rows": 6, "groups": 3, "bytes": out.stat().st_size, "path": str(out), "left_out": 5}
    rows = [0, 1, 2, 3, 8, 10]
    read = features_in(out)
    assert read["row"].tolist() == rows
    np.testing.assert_array_equal(read["head/μ"], whole(made, "head/μ")[rows])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_gap_is_no_row_and_erased_examples_are_left_out(
    url: str, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = append(filled(url, stores.set_info(rows=6), invalid=[3]), 2, first=8)
    write(made, 2)
    erased = erase(made, [1, 9])
    out = tmp_path / f"out{suffix}"
    found = export(url, out, Selection(), force=False, progress=Progress())
    assert (found["rows"], found["left_out"]) == (5, 3)
    assert "left out 3 rows that are not valid, 2 of them erased" in capsys.readouterr().err
    read = features_in(out)
    assert read["row"].tolist() == [0, 2, 4, 5, 8]
    np.testing.assert_array_equal(read["head/μ"], whole(erased, "head/μ")[[0, 2, 4, 5, 8]])
    with pytest.raises(DataError, match="none of the rows asked for has features: 0 are not valid"):
        run(url, tmp_path / f"gap{suffix}", rows="6:8")


def test_what_was_left_out_is_said(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(url, stores.set_info(), invalid=[4])
    export(url, tmp_path / "out.npz", Selection(), force=False, progress=Progress())
    assert "left out 1 rows that are not valid, 0 of them erased" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_group_of_a_reserved_name_gets_another(url: str, tmp_path: Path, suffix: str) -> None:
    groups = {"row": 2, "__metadata__": 1, "../up": 3}
    made = filled(url, stores.set_info(groups=groups))
    run(url, tmp_path / f"out{suffix}")
    read = features_in(tmp_path / f"out{suffix}")
    assert set(read) == {"group:row", "group:__metadata__", "../up", "row", "example_id"}
    np.testing.assert_array_equal(read["group:row"], whole(made, "row"))


def test_every_kind_of_file_says_where_its_features_come_from(url: str, tmp_path: Path) -> None:
    filled(url, stores.set_info())
    for suffix in SUFFIXES:
        run(url, tmp_path / f"out{suffix}", rows="0:5")
    with np.load(tmp_path / "out.npz") as archive:
        in_npz = str(archive["gradstore"])
        assert archive["label"].tolist() == [example(row).label or "" for row in range(5)]
    with safe_open(tmp_path / "out.safetensors", framework="numpy") as file:
        in_safetensors = file.metadata()["gradstore"]
    in_parquet = pq.read_schema(tmp_path / "out.parquet").metadata[b"gradstore"]
    expected = {"contract": stores.CONTRACT, "set": "train", "member": "m0", "snapshot": [[0, 0], [1, 0]]}
    assert [json.loads(text) for text in (in_npz, in_safetensors, in_parquet)] == [expected] * 3


def test_duckdb_queries_an_exported_parquet_file(url: str, tmp_path: Path) -> None:
    made = filled(url, stores.set_info())
    run(url, tmp_path / "out.parquet")
    query = f"""SELECT example_id, "head/μ"[1] FROM '{tmp_path}/out.parquet' WHERE label = 'topic 1' ORDER BY "row" """
    values = whole(made, "head/μ")[:, 0]
    assert duckdb.connect().execute(query).fetchall() == [(f"id-{row}", values[row]) for row in (1, 7, 10)]


def test_a_large_block_becomes_several_row_groups(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(url, stores.set_info(rows=10, block_rows=8))
    monkeypatch.setattr("gradstore.stages.export.files._ROW_GROUP_BYTES", 3 * 12 * 4)
    run(url, tmp_path / "out.parquet")
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == [3, 3, 2, 2]
    np.testing.assert_array_equal(features_in(tmp_path / "out.parquet")["head/μ"], whole(made, "head/μ"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_exporting_twice_makes_equal_files(url: str, tmp_path: Path, suffix: str) -> None:
    filled(url, stores.set_info())
    for name in ("one", "two"):
        run(url, tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_a_member_is_chosen_by_name(url: str, tmp_path: Path) -> None:
    made = filled(url, replace(stores.set_info(rows=4), members=("early", "late")))
    with pytest.raises(NotReadyError, match=r"1 of the 1 blocks asked for are not committed, block 0 \(rows 0:4\)"):
        run(url, tmp_path / "out.npz", member="late")
    write(made.of_member("late"), 0, invalid=[1])
    assert run(url, tmp_path / "out.npz", member="late")["rows"] == 3
    with pytest.raises(NotReadyError, match="has no member middle"):
        run(url, tmp_path / "other.npz", member="middle")


def test_blocks_that_are_not_committed_are_refused_unless_none_of_their_rows_are_asked_for(
    url: str, tmp_path: Path
) -> None:
    filled(url, stores.set_info(), without=[1])
    with pytest.raises(NotReadyError, match=r"1 of the 3 blocks asked for are not committed, block 1 \(rows 4:8\)"):
        run(url, tmp_path / "out.npz")
    assert run(url, tmp_path / "out.npz", rows="8:")["rows"] == 3
    (tmp_path / "ids").write_text("id-2\nid-5\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"1 of 2 ids .*'id-5' among them.* or among the 1 blocks that are not committed"
    ):
        run(url, tmp_path / "out.npz", force=True, ids=tmp_path / "ids")


@pytest.mark.parametrize(
    ("name", "selection", "kind", "said"),
    [
        ("out.csv", {}, SpecError, r"found suffix '\.csv'; accepted: \.parquet, \.npz, \.safetensors"),
        ("out", {}, SpecError, "found suffix ''"),
        ("no/out.npz", {}, SpecError, "the folder .*/no does not exist"),
        ("there.npz", {}, SpecError, "exists already, and is left as it is"),
        ("folder.npz", {}, SpecError, "is a folder"),
        ("out.npz", {"groups": "("}, SpecError, r"--groups: '\(' is not a regular expression"),
        ("out.npz", {"rows": "3"}, SpecError, "--rows: found '3'; accepted: A:B"),
        ("out.npz", {"rows": "3:12"}, SpecError, "'3:12', rows 3 up to 12; the set train has 11 rows"),
        ("out.npz", {"rows": "5:5"}, SpecError, "rows 5 up to 5"),
        ("out.npz", {"rows": "-2:"}, SpecError, "--rows: found '-2:'; accepted"),
        ("out.npz", {"rows": "0:1", "ids": "ids"}, SpecError, "--rows and --ids: found both"),
        ("out.npz", {"ids": "nowhere"}, SpecError, "nowhere cannot be read: No such file"),
        ("out.npz", {"ids": "empty"}, DataError, "empty holds no id"),
        ("out.npz", {"ids": "binary"}, SpecError, "binary cannot be read: it is not UTF-8 text"),
        (
            "out.npz",
            {"ids": "ids"},
            DataError,
            "1 of 2 ids are of no example of .*features/train, 'strange' among them",
        ),
        (
            "out.npz",
            {"rows": "5:6"},
            DataError,
            "none of the rows asked for has features: 1 are not valid, 0 of them",
        ),
        ("out.npz", {"feature_set": "eval"}, NotReadyError, "there is no feature set eval; found: train"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, selection: dict[str, Any], kind: type[GradstoreError], said: str
) -> None:
    filled(str(tmp_path / "store"), stores.set_info(), invalid=[5])
    work = tmp_path / "work"
    (work / "folder.npz").mkdir(parents=True)
    (work / "there.npz").write_bytes(b"precious")
    (work / "ids").write_text("id-1\nstrange\n", encoding="utf-8")
    (work / "empty").write_text("\n \n", encoding="utf-8")
    (work / "binary").write_bytes(b"\xff\xfe\x00")
    before = sorted(work.iterdir())
    if "ids" in selection:
        selection = {**selection, "ids": work / selection["ids"]}
    with pytest.raises(kind, match=said):
        run(str(tmp_path / "store"), work / name, **selection)
    assert sorted(work.iterdir()) == before
    assert (work / "there.npz").read_bytes() == b"precious"


def test_with_force_a_file_is_replaced(url: str, tmp_path: Path) -> None:
    filled(url, stores.set_info())
    (tmp_path / "out.npz").write_bytes(b"old")
    run(url, tmp_path / "out.npz", force=True)
    assert features_in(tmp_path / "out.npz")["row"].tolist() == list(range(11))


@pytest.mark.parametrize("as_url", [False, True])
def test_a_file_inside_the_store_is_refused_however_it_is_reached(tmp_path: Path, as_url: bool) -> None:
    store = tmp_path / "store"
    filled(str(store), stores.set_info())
    (tmp_path / "link").symlink_to(store / "features")
    url = f"file://{store}" if as_url else str(store)
    for out in (store / "out.npz", store / "features/train/out.npz", tmp_path / "link" / "out.npz"):
        with pytest.raises(SpecError, match="lies inside the store"):
            run(url, out)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_does_not_fit_memory_or_disk_is_refused_with_what_to_do(url: str, tmp_path: Path, suffix: str) -> None:
    filled(url, stores.set_info())
    advice = "fewer groups" if suffix == ".parquet" else "Write a parquet file"
    with pytest.raises(ResourceError, match=f"11 rows of 3 groups take .* of memory .*; 100 B are available.*{advice}"):
        run(url, tmp_path / f"out{suffix}", room=Room(memory_bytes=100, disk_bytes=10**12))
    with pytest.raises(ResourceError, match=r"take 528 B on the disk; 527 B are free in .* fewer groups or rows"):
        run(url, tmp_path / f"out{suffix}", room=Room(memory_bytes=10**12, disk_bytes=527))
    assert list(tmp_path.iterdir()) == []
    run(url, tmp_path / f"out{suffix}", room=Room(memory_bytes=10**12, disk_bytes=528))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_chunk_ends_the_export_and_leaves_the_old_file_alone(tmp_path: Path, suffix: str) -> None:
    filled(str(tmp_path / "store"), stores.set_info())
    out = tmp_path / f"out{suffix}"
    out.write_bytes(b"old")
    chunk = tmp_path / "store/features/train/m0/layers.1.mlp/c.2.0"
    data = bytearray(chunk.read_bytes())
    data[3] ^= 4
    chunk.write_bytes(data)
    with pytest.raises(IntegrityError, match=str(chunk)):
        run(str(tmp_path / "store"), out, force=True)
    assert out.read_bytes() == b"old"
    assert sorted(item.name for item in tmp_path.iterdir()) == [out.name, "store"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_killed_export_leaves_nothing_under_the_name_of_the_file(tmp_path: Path, suffix: str) -> None:
    made = filled(str(tmp_path / "store"), stores.set_info(rows=16, groups={f"g{index}": 2 for index in range(200)}))
    last_chunk_becomes_a_pipe(made, tmp_path / "store")
    out = tmp_path / f"out{suffix}"
    code = "import sys; from gradstore.cli import main; sys.argv = ['gradstore', *sys.argv[1:]]; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "export", str(tmp_path / "store"), str(out)], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".gradstore-*")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()


def last_chunk_becomes_a_pipe(made: FeatureSet, store: Path) -> None:
    """Make whoever reads the last chunk wait for ever, so that a kill is sure to come before the end."""
    block, array = made.info.num_blocks - 1, made.info.arrays[-1]
    chunk = store / "features/train" / made.info.array_path("m0", array.name) / f"c.{block}.0"
    chunk.unlink()
    os.mkfifo(chunk)


def test_the_command_prints_one_object_for_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(str(tmp_path / "store"), stores.set_info(), invalid=[8])
    (tmp_path / "ids").write_text("id-8\nid-1\n", encoding="utf-8")
    out = tmp_path / "out.safetensors"
    options = ["--groups", "head.*", "--ids", str(tmp_path / "ids"), "--json", "--set", "train", "--member", "m0"]
    monkeypatch.setattr(sys, "argv", ["gradstore", "export", str(tmp_path / "store"), str(out), *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out) == {
        "rows": 1,
        "groups": 1,
        "bytes": out.stat().st_size,
        "path": str(out),
        "left_out": 1,
    }


@pytest.mark.parametrize(
    ("arguments", "code"), [(["out.txt"], 2), (["out.npz", "--rows", "0:99"], 2), (["out.npz", "--set", "eval"], 6)]
)
def test_a_refused_export_ends_with_the_exit_code_of_its_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    filled(str(tmp_path / "store"), stores.set_info())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gradstore", "export", "store", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith("error: ")
