from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.adapters.protocol import Examples
from gradstore.adapters.text.corpus import text_digest
from gradstore.adapters.text.packing import Packer
from gradstore.adapters.text.records import Document
from gradstore.adapters.text.splits import split_examples
from gradstore.errors import DataError, SpecError
from gradstore.spec import DataSection
from gradstore.store.examples import Example, hash_inputs
from tests.texts import CharacterEncoder, Echo, spell

ONE_EACH = {"train": 1, "learn": 1, "eval": 1}


def _write(path: Path, texts: Sequence[str], labels: Sequence[str] | None = None) -> str:
    """Write documents called d0, d1, ... as JSON lines."""
    labels = labels or ["topic"] * len(texts)
    records = [{"text": text, "label": labels[i], "id": f"d{i}"} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _split(source: str, splits: Mapping[str, Any], *, seed: int = 0, **shared: Any) -> Examples:
    """Split a source; a split is its rows, or its keys."""
    tables = {name: value if isinstance(value, Mapping) else {"rows": value} for name, value in splits.items()}
    defaults = {"source": source, "id": "id", "label": "label", "shuffle": False, "length": 8}
    data = DataSection.model_validate({**defaults, **shared, **tables})
    return split_examples(data, seed, CharacterEncoder(), Echo())


def _spell(examples: Sequence[Example]) -> list[str]:
    return [spell(example.inputs["tokens"]) for example in examples]


def _spell_all(examples: Examples) -> dict[str, list[str]]:
    return {name: _spell(rows) for name, rows in examples.splits.items()}


def test_each_split_takes_the_next_rows_of_its_source(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two", "three", "four", "five"], list("abcde"))

    examples = _split(source, {"train": 2, "learn": 1, "eval": 2})

    assert _spell_all(examples) == {"train": ["^one", "^two"], "learn": ["^three"], "eval": ["^four", "^five"]}
    assert [example.label for example in examples.splits["eval"]] == ["d", "e"]
    assert [example.example_id for example in examples.splits["learn"]] == ["d2"]
    assert examples.facts.rows == {"train": 2, "learn": 1, "eval": 2}


def test_splits_may_have_sources_of_their_own_and_take_all_of_them(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two"])
    other = _write(tmp_path / "y.jsonl", ["three", "four", "five"])

    examples = _split(source, {"train": 1, "learn": {}, "eval": {"source": other}})

    assert _spell_all(examples) == {"train": ["^one"], "learn": ["^two"], "eval": ["^three", "^four", "^five"]}
    assert [facts.source for facts in examples.facts.sources] == [source, other]


def test_a_split_may_start_further_on(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", [f"text {n}" for n in range(9)])

    examples = _split(source, {"train": 1, "learn": {"start": 3, "rows": 1}, "eval": {"start": 8}})

    assert _spell_all(examples) == {"train": ["^text 0"], "learn": ["^text 3"], "eval": ["^text 8"]}


def test_an_example_holds_what_the_model_sees(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["a long text", "brief", "other"])

    splits = _split(source, ONE_EACH).splits
    (cut,), (whole,) = splits["train"], splits["learn"]

    assert (cut.text, cut.size, _spell([cut])) == ("a long ", 8, ["^a long "])
    assert (whole.text, whole.size, _spell([whole])) == ("brief", 6, ["^brief"])
    for example in (cut, whole):
        assert example.content_hash == hash_inputs(example.inputs)
        assert example.inputs["tokens"].dtype == np.int32
        assert example.source == source


@pytest.mark.parametrize("shuffle", [False, True])
def test_documents_are_deduplicated_before_they_are_split_and_the_dropped_are_reported(
    tmp_path: Path, shuffle: bool
) -> None:
    texts = ["one", "ONE", "", "long text 1", "two", " two ", "long text 2", "three", "one"]
    source = _write(tmp_path / "x.jsonl", texts)

    examples = _split(source, {"train": 2, "learn": 1, "eval": {}}, shuffle=shuffle)

    rows = [row for spelled in _spell_all(examples).values() for row in spelled]
    assert sorted(row.casefold() for row in rows) == ["^long te", "^one", "^three", "^two"]
    (facts,) = examples.facts.sources
    assert (facts.documents, facts.duplicates, facts.alike, facts.empty) == (9, 3, 1, 1)
    assert examples.facts.describe() == (
        f"9 documents read from {source}; dropped: 3 duplicates, 1 alike in all tokens that are read, 1 empty (d2)\n"
        "rows: train 2, learn 1, eval 1"
    )


def test_documents_without_a_token_to_predict_are_dropped_and_counted(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["a", "bc", "d", "ef", "gh"])

    examples = split_examples(
        DataSection.model_validate(
            {
                "source": source,
                "packing": "document",
                "shuffle": False,
                "train": {"rows": 1},
                "learn": {"rows": 1},
                "eval": {},
            }
        ),
        0,
        _WithoutBegin(),
        Echo(),
    )

    assert _spell_all(examples) == {"train": ["bc"], "learn": ["ef"], "eval": ["gh"]}
    assert examples.facts.sources[0].short == 2


class _WithoutBegin(CharacterEncoder):
    def encode(self, texts: Sequence[str], *, special: bool) -> list[np.ndarray]:
        return super().encode(texts, special=False)


@given(st.permutations([f"text {n}" for n in range(9)]), st.integers(0, 3))
def test_a_shuffled_split_depends_on_the_texts_and_the_seed_alone(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("source")
    rows = {"train": 4, "learn": 2, "eval": 2}

    one = _split(_write(folder / "x.jsonl", texts), rows, shuffle=True, seed=seed)
    other = _split(_write(folder / "y.jsonl", sorted(texts)), rows, shuffle=True, seed=seed)

    assert _spell_all(one) == _spell_all(other)


def test_fewer_rows_than_declared_are_refused_with_both_numbers(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two", "two", "three", "four"])

    with pytest.raises(
        DataError,
        match=r"data\.eval\.rows: rows \[3, 9\) are declared, but there are 4: 5 documents read .* 1 duplicates\. data\.eval would get 1\.",
    ):
        _split(source, {"train": 2, "learn": 1, "eval": 6})
    with pytest.raises(DataError, match=r"rows \[4, end\) are declared"):
        _split(source, {"train": 2, "learn": 2, "eval": {}})


def test_a_text_in_two_sources_is_an_overlap_that_names_both(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two", "three"])
    other = _write(tmp_path / "y.jsonl", ["four", "THREE", " one "])

    with pytest.raises(
        DataError,
        match=r"data\.eval: d1 of .*y\.jsonl equals d2 of .*x\.jsonl in data\.learn.*there are 2 such.*take them out",
    ):
        _split(source, {"train": 2, "learn": 1, "eval": {"source": other}})


def test_texts_that_are_alike_as_far_as_they_are_read_overlap_too(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["the same beginning", "two"])
    other = _write(tmp_path / "y.jsonl", ["the same bed"])

    with pytest.raises(DataError, match=r"d0 of .*y\.jsonl equals d0 of .*x\.jsonl in data\.train"):
        _split(source, {"train": 1, "learn": 1, "eval": {"source": other}})


def test_without_deduplication_an_overlap_inside_a_source_is_refused(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two", "One", "three"])

    with pytest.raises(DataError, match=r"data\.eval: d2 of .* equals d0 .* set data\.deduplicate = true"):
        _split(source, {"train": 1, "learn": 1, "eval": {}}, deduplicate=False)
    assert _spell(_split(source, ONE_EACH).splits["eval"]) == ["^three"]


@pytest.mark.parametrize(
    ("option", "value"),
    [("text", "id"), ("label", None), ("id", "label"), ("encoding", "latin-1"), ("packing", "concatenate")],
)
def test_splits_of_one_source_must_read_it_alike(tmp_path: Path, option: str, value: str | None) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two", "three"])

    with pytest.raises(SpecError, match=rf"data\.learn\.{option}: found .* data\.train of the same source has"):
        _split(source, {"train": 1, "learn": {option: value, "rows": 1}, "eval": 1})


def test_splits_of_one_source_may_be_cut_to_lengths_of_their_own(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["one longer", "two longer", "three longer"])

    examples = _split(source, {"train": {"rows": 1, "length": 6}, "learn": 1, "eval": {"rows": 1, "length": 4}})

    assert _spell_all(examples) == {"train": ["^one l"], "learn": ["^two lon"], "eval": ["^thr"]}


def test_an_id_that_two_documents_share_is_refused(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two", "three"])

    with pytest.raises(DataError, match=r"'topic' names two documents of .* in column 'label'"):
        _split(source, ONE_EACH, id="label", label=None)


def test_joined_documents_are_cut_into_rows_of_one_length(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["abc", "defghi", "jk", "lmnop", "qrstuvwxyz"], ["a", "a", "b", "b", "c"])

    examples = _split(source, {"train": 2, "learn": 1, "eval": 1}, packing="concatenate", length=5)

    # The rest of defghi ends with train's last row, and that of lmnop with learn's: no document is on both sides.
    assert _spell_all(examples) == {"train": ["abc$d", "efghi"], "learn": ["jk$lm"], "eval": ["qrstu"]}
    train, (learn,) = examples.splits["train"], examples.splits["learn"]
    assert [example.example_id for example in train] == ["d0@0", "d1@1"]
    assert [example.label for example in (*train, learn)] == ["a", "a", "b"]
    assert train[0].text == "abcd"


def test_joined_rows_that_are_alike_are_dropped_wherever_they_come_from(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["12345678", "12abcdefgh", "34abcdefgh", "56", "uvwxyz", "end"])

    examples = _split(source, {"train": 2, "learn": 1, "eval": 1}, packing="concatenate", length=3)
    kept = _split(source, {"train": 9, "learn": 1, "eval": 1}, packing="concatenate", length=3, deduplicate=False)

    assert _spell_all(examples) == {"train": ["123", "456"], "learn": ["12a"], "eval": ["34a"]}
    whole = _split(source, {"train": 10, "learn": 1, "eval": 1}, packing="concatenate", length=3)
    assert _spell(whole.splits["train"]) == ["123", "456", "78$", "12a", "bcd", "efg", "h$3", "4ab", "cde", "fgh"]
    assert _spell(kept.splits["train"]) == ["123", "456", "78$", "12a", "bcd", "efg", "h$3", "4ab", "cde"]


def test_a_joined_row_of_several_labels_has_none(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["ab", "cd", "efghi", "jklmn"], ["a", "b", "c", "d"])

    examples = _split(source, ONE_EACH, packing="concatenate", length=5)

    assert [rows[0].label for rows in examples.splits.values()] == [None, "c", "d"]


def test_joined_splits_of_one_source_must_have_one_length(tmp_path: Path) -> None:
    source = _write(tmp_path / "x.jsonl", ["one", "two", "three"])

    with pytest.raises(SpecError, match=r"data\.eval\.length: found 3, but data\.train of the same source has 8"):
        _split(source, {"train": 1, "learn": 1, "eval": {"rows": 1, "length": 3}}, packing="concatenate")


def test_joining_needs_a_token_that_ends_a_text(tmp_path: Path) -> None:
    data = DataSection.model_validate(
        {
            "source": _write(tmp_path / "x.jsonl", ["one"]),
            "packing": "concatenate",
            **{name: {"rows": 1} for name in ONE_EACH},
        }
    )

    with pytest.raises(DataError, match=r"data\.train\.packing: no end"):
        split_examples(data, 0, CharacterEncoder(has_end=False), Echo())


@given(st.lists(st.text("abc", min_size=1, max_size=9), max_size=12), st.integers(1, 7))
def test_joined_rows_hold_every_token_once_and_in_order(texts: list[str], length: int) -> None:
    documents = [
        (text_digest(text, 0) or b"", Document(document_id=str(i), text=text, label=None))
        for i, text in enumerate(texts)
    ]

    rows = Packer(documents=documents, encoder=CharacterEncoder()).joined(
        end=ord("$"), length=length, boundaries=frozenset()
    )

    joined = "".join(f"{text}$" for text in texts)
    assert [spell(row.tokens) for row in rows] == [
        joined[i : i + length] for i in range(0, len(joined) - length + 1, length)
    ]
