from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradstore.adapters.text.documents import DocumentReader
from gradstore.adapters.text.records import Document, Turn
from gradstore.errors import DataError, SpecError
from gradstore.spec import SplitSection

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
]
RECORDS: list[dict[str, Any]] = [
    {"question": "2 + 2 =", "answer": " 4", "turns": CHAT, "key": 1},
    {"question": None, "answer": "so", "turns": CHAT[2:], "key": 2},
    {"question": "why?", "answer": None, "turns": CHAT[:2], "key": 3},
    {"question": "why?", "answer": " \n", "turns": None, "key": 4},
]
PAIRS = {"prompt": "question", "completion": "answer"}


def _read(source: Path, **options: Any) -> list[Document]:
    return list(DocumentReader(split=SplitSection(source=str(source), **options), key="data.train"))


def _write_jsonl(folder: Path, records: Sequence[Mapping[str, Any]] = RECORDS) -> Path:
    (folder / "part.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def _write_parquet(folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "part.parquet")
    return folder


def _write_dataset(folder: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(RECORDS).save_to_disk(folder / "saved")
    return folder / "saved"


FORMATS = [_write_jsonl, _write_parquet, _write_dataset]


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_prompts_with_their_completions(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    first, second, third, fourth = _read(write(tmp_path), **PAIRS, id="key")

    assert first == Document(
        document_id="1",
        text="2 + 2 = 4",
        label=None,
        turns=(Turn(role="prompt", start=0, stop=7), Turn(role="completion", start=7, stop=9)),
    )
    assert (second.text, second.turns[1]) == ("so", Turn(role="completion", start=0, stop=2))
    # Nothing to predict: the corpus drops it as it drops an empty text.
    assert third.text == fourth.text == ""


@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_chats(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    first, second, third, fourth = _read(write(tmp_path), messages="turns", id="key")

    assert first.text == "system: be brief\n\nuser: 2 + 2?\n\nassistant: 4"
    assert first.messages() == CHAT
    assert (second.text, second.messages()) == ("assistant: 4", CHAT[2:])
    assert third.text == fourth.text == ""


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"prompt": "question"}, r"prompt = 'question'"),
        ({"completion": "answer"}, r"completion = 'answer'"),
        ({**PAIRS, "messages": "turns"}, r"prompt = 'question', completion = 'answer', messages = 'turns'"),
        ({"messages": "turns", "text": "body"}, r"messages = 'turns', text = 'body'"),
    ],
)
def test_columns_of_more_than_one_form_are_refused(tmp_path: Path, options: dict[str, str], found: str) -> None:
    with pytest.raises(
        SpecError, match=rf"data\.train: found columns {found}; accepted: text, or prompt and completion, or messages"
    ):
        _read(_write_jsonl(tmp_path), **options)


@pytest.mark.parametrize("options", [PAIRS, {"messages": "turns"}])
def test_only_texts_are_joined(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(SpecError, match=r'data\.train\.packing: found "concatenate" with .*Set packing = "document"'):
        _read(_write_jsonl(tmp_path), **options, packing="concatenate")


def test_text_files_have_no_columns_for_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")

    with pytest.raises(SpecError, match=r"text files have no columns.* and completion; accepted: .*neither prompt"):
        _read(tmp_path, **PAIRS)


def test_formats_of_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"data\.train\.format: found 'npz'; texts are read as text, jsonl, parquet or"):
        _read(_write_jsonl(tmp_path), format="npz")


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize(
    ("option", "options"),
    [("prompt", {**PAIRS, "prompt": "body"}), ("completion", {**PAIRS, "completion": "body"}), ("messages", {})],
)
def test_a_missing_column_is_reported_by_the_key_that_names_it(
    tmp_path: Path, write: Callable[[Path], Path], option: str, options: dict[str, str]
) -> None:
    with pytest.raises(
        DataError, match=rf"data\.train\.{option}: .* no column 'body'; its columns are: question, answer"
    ):
        _read(write(tmp_path), **(options or {"messages": "body"}))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("hello", r"is str"),
        ([["user", "hello"]], r"message 0 is list"),
        ([CHAT[0], {"role": "user"}], r"message 1 has role"),
        ([{"role": "user", "content": None}], r"message 0 has role"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r"content of message 0 is list"),
        ([{**CHAT[2], "tool_calls": [1]}], r"message 0 has role, content, tool_calls"),
    ],
)
def test_what_is_no_chat_is_refused_by_name(tmp_path: Path, messages: Any, problem: str) -> None:
    source = _write_jsonl(tmp_path, [{"turns": messages}])

    with pytest.raises(
        DataError, match=rf"data\.train\.messages: 'turns' of part\.jsonl:1:? {problem}; accepted: a list of"
    ):
        _read(source, messages="turns")


def test_a_prompt_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.train\.prompt: 'key' of part\.jsonl:1 is int, not text"):
        _read(_write_jsonl(tmp_path), prompt="key", completion="answer")
