from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradstore.adapters.text.documents import DocumentReader
from gradstore.adapters.text.records import Document
from gradstore.errors import DataError, SpecError
from gradstore.spec import SplitSection

RECORDS: list[dict[str, Any]] = [
    {"text": "first", "topic": "sport", "key": 10},
    {"text": None, "topic": None, "key": 11},
    {"text": "third\nline", "topic": "tech", "key": 12},
]


def _read(source: Path | str, **options: Any) -> list[Document]:
    return list(DocumentReader(split=SplitSection(source=str(source), **options), key="data.train"))


def _write_text(folder: Path) -> Path:
    for name, text in {"b/2.txt": "zwei", "a/1.txt": "eins", "a/10.txt": "zehn", "README": "not a text"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def _write_jsonl(folder: Path) -> Path:
    lines = "".join(json.dumps(record) + "\n\n" for record in RECORDS)
    (folder / "part.jsonl").write_text(lines)
    return folder


def _write_jsonl_gz(folder: Path) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (folder / "part.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def _write_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "part.parquet")
    return folder


def _write_dataset(folder: Path) -> Path:
    import datasets

    columns = {name: [record[name] for record in RECORDS] for name in RECORDS[0]}
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("write", [_write_jsonl, _write_jsonl_gz, _write_parquet, _write_dataset])
@pytest.mark.parametrize("columns", [{}, {"label": "topic", "id": "key"}])
def test_every_format_gives_the_same_documents(
    tmp_path: Path, write: Callable[[Path], Path], columns: dict[str, str]
) -> None:
    documents = _read(write(tmp_path), **columns)

    assert [document.text for document in documents] == ["first", "", "third\nline"]
    assert [document.label for document in documents] == (["sport", None, "tech"] if columns else [None] * 3)
    identifiers = [document.document_id for document in documents]
    assert identifiers == ["10", "11", "12"] if columns else len(set(identifiers)) == 3


def test_text_files_come_sorted_with_their_path_as_id_and_their_folder_as_label(tmp_path: Path) -> None:
    documents = _read(_write_text(tmp_path), label="folder")

    assert [document.document_id for document in documents] == ["a/1.txt", "a/10.txt", "b/2.txt"]
    assert [document.label for document in documents] == ["a", "a", "b"]
    assert [document.text for document in documents] == ["eins", "zehn", "zwei"]


def test_one_file_is_a_source_too(tmp_path: Path) -> None:
    _write_text(tmp_path)

    (document,) = _read(tmp_path / "a" / "1.txt", label="folder")

    assert (document.document_id, document.label, document.text) == ("1.txt", "a", "eins")


def test_a_text_file_is_one_document_and_its_row_endings_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo")

    assert _read(tmp_path)[0].text == "one\r\ntwo"


def test_sources_are_read_through_urls() -> None:
    import fsspec

    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({f"/corpus/{topic}/{n}.txt": f"{topic} {n}".encode() for topic in "ab" for n in range(100)})

    documents = _read("memory://corpus", label="folder")

    assert len(documents) == 200
    assert (documents[0].document_id, documents[0].label, documents[0].text) == ("a/0.txt", "a", "a 0")


def test_of_several_encodings_the_first_that_fits_a_file_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("£5 old".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("£5 new".encode())
    assert [document.text for document in _read(tmp_path, encoding=["utf-8", "latin-1"])] == ["£5 old", "£5 new"]
    with pytest.raises(DataError, match=r"a\.txt of .* is not utf-8 nor ascii: byte 0 is 0xa3"):
        _read(tmp_path, encoding=["utf-8", "ascii"])


def test_an_encoding_other_than_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "pound.txt").write_bytes("£5".encode("latin-1"))

    assert _read(tmp_path, encoding="latin-1")[0].text == "£5"
    with pytest.raises(DataError, match=r"pound\.txt of .* is not utf-8: byte 0 is 0xa3.*Set data\.train\.encoding"):
        _read(tmp_path)
    with pytest.raises(SpecError, match=r"data\.train\.encoding: found 'latin-99'"):
        _read(tmp_path, encoding="latin-99")


def test_a_dataset_of_several_splits_needs_one_to_be_named_and_gives_class_labels_by_name(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "y": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "y": [1, 0]}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "saved")

    documents = _read(tmp_path / "saved", split="test", label="y")

    assert [document.label for document in documents] == ["yes", "no"]
    with pytest.raises(DataError, match=r"data\.train\.split: found None; .* has: train, test"):
        _read(tmp_path / "saved")


@pytest.mark.parametrize("streamed", [False, True])
def test_what_the_hub_would_give_is_read_from_a_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    folder = _write_parquet(tmp_path / "data")
    split = SplitSection(source=str(folder), format="datasets", split="train", label="topic")

    documents = list(DocumentReader(split=split, key="data.train", streamed=streamed))

    assert [document.label for document in documents] == ["sport", None, "tech"]


@pytest.mark.parametrize("write", [_write_jsonl, _write_parquet, _write_dataset])
@pytest.mark.parametrize("option", ["text", "label", "id"])
def test_a_missing_column_is_reported_with_those_that_exist(
    tmp_path: Path, write: Callable[[Path], Path], option: str
) -> None:
    with pytest.raises(
        DataError, match=rf"data\.train\.{option}: .* no column 'body'; its columns are: text, topic, key"
    ):
        _read(write(tmp_path), **{option: "body"})


def test_a_column_that_is_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'key' of part\.parquet:0 is int, not text"):
        _read(_write_parquet(tmp_path), text="key")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl, line 2 is not JSON"),
        ("x.jsonl", b'["a"]\n', r"x\.jsonl, line 1 is a JSON list"),
        (
            "x.jsonl",
            b'{"text": "a \\ud800"}\n',
            r"data\.train: x\.jsonl:1: character 2 is '\\ud800', half of a character",
        ),
        ("x.jsonl", b"[" * 10**5, r"x\.jsonl, line 1 is not JSON: it is nested too deeply"),
        ("x.jsonl", b'{"text": "\xff"}\n', r"x\.jsonl, line 1 of .* is not utf-8"),
        ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], r"x\.jsonl\.gz cannot be read"),
        ("x.jsonl.gz", b'{"text": "a"}\n', r"x\.jsonl\.gz cannot be read"),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20, r"x\.jsonl\.gz cannot be read"),
        ("x.parquet", b"PAR1 and nothing else", r"x\.parquet cannot be read as parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=message):
        _read(tmp_path)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")

    with pytest.raises(DataError, match=r"data\.train\.source: one of .*gone\.txt cannot be read: FileNotFoundError"):
        _read(tmp_path)
    (tmp_path / "gone.txt").rename(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be opened: FileNotFoundError"):
        _read(tmp_path)


def test_a_source_that_cannot_be_found_or_recognised_is_refused_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.csv").touch()

    with pytest.raises(DataError, match="there is no such file or folder"):
        _read(tmp_path / "absent")
    with pytest.raises(DataError, match="or the folder is empty"):
        _read(tmp_path / "empty")
    with pytest.raises(DataError, match=r"no text, JSON lines or parquet among a\.csv\. Set data\.train\.format"):
        _read(tmp_path / "other")
    with pytest.raises(DataError, match=r"has no \.parquet files; it holds a\.csv"):
        _read(tmp_path / "other", format="parquet")
    _write_text(tmp_path / "other")
    _write_parquet(tmp_path / "other")
    with pytest.raises(DataError, match="holds text and parquet"):
        _read(tmp_path / "other")


def test_a_filesystem_that_is_not_known_is_refused() -> None:
    with pytest.raises(SpecError, match=r"data\.train\.source: carrier-pigeon://corpus cannot be opened"):
        _read("carrier-pigeon://corpus")


def test_keys_that_text_files_cannot_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="accepted: label = 'folder'"):
        _read(_write_text(tmp_path), label="topic")
    with pytest.raises(SpecError, match="no id"):
        _read(_write_text(tmp_path), id="key")
