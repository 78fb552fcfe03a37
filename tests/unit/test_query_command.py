"""What `gradstore query` is asked, and what it prints."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gradstore.errors import DataError, SpecError
from gradstore.stages.query import Answer, Ranking, Winner
from gradstore.stages.query.answer import Group
from gradstore.stages.query.stage import Asked, render_answers
from gradstore.stages.report.formatting import MINUS


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "nothing to ask"),
        ({"text": "a", "index": "eval:1"}, "--text and --index"),
        ({"prompt": "a"}, "--prompt"),
        ({"completion": "a"}, "--completion"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "--text and --prompt and --completion"),
    ],
)
def test_options_that_ask_nothing_or_several_things_are_refused(given: dict[str, str], found: str) -> None:
    with pytest.raises(SpecError, match=f"query: found {found}; accepted: --text, or --prompt and --completion"):
        Asked(**given)  # type: ignore[arg-type]


def test_a_file_is_one_text_or_a_record_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("two\nlines\n", encoding="utf-8")
    lines = '{"text": "one\u2028two"}\n\n{"prompt": "p", "completion": "c"}\r\n'
    (tmp_path / "b.jsonl").write_text(lines, encoding="utf-8-sig")

    assert Asked(file=tmp_path / "a.txt").records() == [{"text": "two\nlines\n"}]
    assert Asked(file=tmp_path / "b.jsonl").records() == [{"text": "one\u2028two"}, {"prompt": "p", "completion": "c"}]
    (tmp_path / "a.txt").write_text("marked", encoding="utf-8-sig")
    assert Asked(file=tmp_path / "a.txt").records() == [{"text": "marked"}]
    assert Asked(prompt="p", completion="").records() == [{"prompt": "p", "completion": ""}]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("none.txt", None, r"none.txt cannot be read: No such file"),
        ("binary.txt", b"\xff\xfe\xfa", r"binary.txt cannot be read: it is no UTF-8 text"),
        ("empty.jsonl", b"\n", r"empty.jsonl holds no record"),
        ("bad.jsonl", b'{"text": "a"}\n{"text', r"bad.jsonl, line 2 is not JSON"),
        ("deep.jsonl", b"[" * 10**5, r"deep.jsonl, line 1 is not JSON: it is nested too deeply"),
        ("binary.jsonl", b'{"text": "\xff"}', r"binary.jsonl is no UTF-8 text: byte 10 is 0xff"),
        ("list.jsonl", b"[1]", r"list.jsonl, line 1 is a JSON list, not an object"),
    ],
)
def test_a_file_that_holds_no_query_is_refused(tmp_path: Path, name: str, content: bytes | None, match: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        Asked(file=tmp_path / name).records()


def answer_of(parts: tuple[float, ...]) -> Answer:
    """An answer of one proponent."""
    places = ((0, "attn"), (0, "mlp"), (1, "mlp"), (None, "head"))
    winner = Winner(row=4, example_id="x", label="[red]", text="some\ntext", score=sum(parts), parts=parts)
    return Answer(
        query="query-1",
        label=None,
        text="asked",
        kernel="block",
        rankings={"unweighted": Ranking(proponents=(winner,), opponents=())},
        groups=tuple(Group(name=f"g{place}", depth=depth, function=of) for place, (depth, of) in enumerate(places)),
    )


def test_layers_are_those_of_the_largest_parts_summed_over_depths_or_functions() -> None:
    answer = answer_of((3.0, -2.0, -2.5, 0.25))
    (winner,) = answer.rankings["unweighted"].proponents

    assert answer.layers(winner) == [("g0", 3.0), ("g2", -2.5), ("g1", -2.0)]
    assert answer.layers(winner, "depth") == [(1, -2.5), (0, 1.0), (None, 0.25)]
    assert answer.layers(winner, "function", 2) == [("mlp", -4.5), ("attn", 3.0)]


def test_an_answer_is_plain_values_and_a_table_of_them() -> None:
    answer = answer_of((3.0, -2.0, -2.5, 0.25))

    (found,) = json.loads(json.dumps(answer.to_json()))["rankings"]["unweighted"]["proponents"]
    assert {key: found[key] for key in ("rank", "row", "example_id", "label", "score")} == {
        "rank": 1, "row": 4, "example_id": "x", "label": "[red]", "score": -1.25
    }  # fmt: skip
    assert found["layers"]["depth"][0] == {"depth": 1, "part": -2.5}
    console = Console(width=100, record=True, file=StringIO())
    for drawn in render_answers([answer], "group"):
        console.print(drawn)
    text = console.export_text()
    assert "query-1: asked" in text
    assert "[red]" in text
    assert f"0.attn +3.0, 1.mlp {MINUS}2.5, 0.mlp {MINUS}2.0" in text
