from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.adapters.protocol import Examples
from gradstore.adapters.text.splits import split_examples
from gradstore.errors import DataError, SpecError
from gradstore.spec import DataSection
from gradstore.store.examples import Example, from_table, hash_inputs, to_table
from tests.texts import CharacterEncoder, Echo, spell

PAIRS = {"prompt": "prompt", "completion": "completion"}


def _write(path: Path, records: Sequence[Mapping[str, Any]]) -> str:
    numbered = [{"id": f"d{number}", **record} for number, record in enumerate(records)]
    path.write_text("".join(json.dumps(record) + "\n" for record in numbered))
    return str(path)


def _pairs(path: Path, pairs: Sequence[tuple[str, str]]) -> str:
    return _write(path, [{"prompt": prompt, "completion": completion} for prompt, completion in pairs])


def _split(source: str, **keys: Any) -> Examples:
    data = {"source": source, "id": "id", "shuffle": False, "length": 8}
    data |= {name: {"rows": 1} for name in ("train", "learn", "eval")}
    return split_examples(DataSection.model_validate({**data, **keys}), 0, CharacterEncoder(), Echo())


def _shown(example: Example) -> str:
    """The tokens, those that count as predicted in capitals."""
    predicted = example.inputs["predicted"]
    return "".join(c.upper() if p else c for c, p in zip(spell(example.inputs["tokens"]), predicted, strict=True))


def test_examples_hold_which_tokens_are_predicted(tmp_path: Path) -> None:
    source = _pairs(tmp_path / "x.jsonl", [("ab", "cd"), ("long pr", "ompt"), ("e", "long completion"), ("", "f")])

    splits = _split(source, **PAIRS).splits

    # The second has no predicted token in its first 8.
    assert {name: _shown(rows[0]) for name, rows in splits.items()} == {
        "train": "^abCD$",
        "learn": "^eLONG C",
        "eval": "^F$",
    }
    for (example,) in splits.values():
        assert example.inputs["predicted"].dtype == bool
        assert example.content_hash == hash_inputs(example.inputs)
    assert [rows[0].text for rows in splits.values()] == ["abcd", "elong c", "f"]


def test_examples_without_a_completion_within_the_length_are_dropped_and_counted(tmp_path: Path) -> None:
    pairs = [("1234567", "a"), ("ab", ""), ("x", "yz"), ("12345", "b"), ("p", "q"), ("r", "s")]
    source = _pairs(tmp_path / "x.jsonl", pairs)

    examples = _split(source, **PAIRS)

    (facts,) = examples.facts.sources
    assert (facts.empty, facts.unpredicted, facts.short) == (1, 1, 0)
    assert "dropped: 1 without a completion within data.length, 1 empty (d1)" in facts.describe()
    assert [rows[0].example_id for rows in examples.splits.values()] == ["d2", "d3", "d4"]


def test_the_shortest_split_of_a_source_decides_what_is_within_the_length(tmp_path: Path) -> None:
    source = _pairs(tmp_path / "x.jsonl", [("1234", "a"), ("x", "y"), ("p", "q"), ("r", "s")])

    examples = _split(source, **PAIRS, eval={"rows": 1, "length": 5})

    assert examples.facts.sources[0].unpredicted == 1


def test_chats_are_split_like_texts(tmp_path: Path) -> None:
    def chat(*contents: str) -> dict[str, Any]:
        return {"turns": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}

    source = _write(
        tmp_path / "x.jsonl", [chat("hi", "ho"), chat("Hi", "HO"), chat("a", "b", "c"), chat("a"), chat("c", "d")]
    )

    examples = _split(source, messages="turns", length=20)

    assert [_shown(rows[0]) for rows in examples.splits.values()] == ["<u>hi<a>HO", "<u>a<a>B<u>c", "<u>c<a>D"]
    assert examples.splits["train"][0].text == "user: hi\n\nassistant: ho"
    (facts,) = examples.facts.sources
    assert (facts.duplicates, facts.empty) == (1, 1)


def test_duplicates_and_overlaps_are_those_of_prompt_and_completion_together(tmp_path: Path) -> None:
    source = _pairs(tmp_path / "x.jsonl", [("ab", "c"), ("AB", " c"), ("a", "bc"), ("ab", "d"), ("x", "y")])

    examples = _split(source, **PAIRS)

    assert examples.facts.sources[0].duplicates == 1
    assert [_shown(rows[0]) for rows in examples.splits.values()] == ["^abC$", "^AB C$", "^abD$"]


def test_a_text_overlaps_with_itself_whatever_part_of_it_is_predicted(tmp_path: Path) -> None:
    source = _pairs(tmp_path / "x.jsonl", [("same ", "beginning"), ("other", "text")])
    texts = _write(tmp_path / "y.jsonl", [{"text": "same bed"}])
    of_texts = {"source": texts, "prompt": None, "completion": None, "rows": 1}

    with pytest.raises(DataError, match=r"data\.eval: d0 of .*y\.jsonl equals d0 of .*x\.jsonl in data\.train"):
        _split(source, **PAIRS, eval=of_texts)


def test_splits_of_one_source_must_read_the_same_columns(tmp_path: Path) -> None:
    source = _pairs(tmp_path / "x.jsonl", [("a", "b"), ("c", "d"), ("e", "f")])

    with pytest.raises(SpecError, match=r"data\.eval\.completion: found 'prompt', but data\.train of the same source"):
        _split(source, **PAIRS, eval={"rows": 1, "completion": "prompt"})


def test_masks_survive_the_store(tmp_path: Path) -> None:
    source = _pairs(tmp_path / "x.jsonl", [("ab", "cd"), ("e", "f"), ("g", "hi"), ("j", "k")])
    train = _split(source, **PAIRS, train={"rows": 2}).splits["train"]

    stored = from_table(to_table(train, first_row=0))

    for ours, theirs in zip(train, stored, strict=True):
        np.testing.assert_array_equal(ours.inputs["predicted"], theirs.inputs["predicted"])
        assert hash_inputs(theirs.inputs) == ours.content_hash


def test_texts_are_stored_as_they_were_before_there_were_masks(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "three"}])

    (example,) = _split(source).splits["train"]

    assert set(example.inputs) == {"tokens"}
    assert example.content_hash == hash_inputs({"tokens": np.array([ord(c) for c in "^one"], np.int32)})
