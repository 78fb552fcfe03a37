"""learn: pairs of a query and an example that is to score best for it, from a file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from gradstore.errors import ContractError, DataError, SpecError
from gradstore.numerics.learner import LearnerSettings, initial_raw_weights, visit_order
from gradstore.spec import read_spec
from gradstore.stages.learn import refuse_other_weights
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.features import FeatureStore
from tests import contributing, oracle
from tests.contributing import ROWS, make_spec, make_store, stored_c
from tests.learning import learned, weights_of
from tests.runs import make_run

INVALID = (2, 9)
POSITIVES = {0: [3, 17], 1: [22], 3: [0, 1, 5], 4: [8]}
PAIRS = [(f"example {query}", f"example {row}") for query, rows in POSITIVES.items() for row in rows]


@pytest.fixture
def store() -> FeatureStore:
    made = make_store(invalid=INVALID)
    contributing.run(make_spec(made))
    return made


def write(path: Path, pairs: list[tuple[str, str]] | None = None) -> str:
    """Write pairs in the format that the ending tells."""
    rows = [{"query": query, "example": example} for query, example in (PAIRS if pairs is None else pairs)]
    if path.suffix == ".jsonl":
        # With what JSON allows in a text and other readers split lines at.
        lines = [json.dumps({**row, "note": "\u2028"}, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8-sig")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["query", "example"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        schema = pa.schema([("query", pa.string()), ("example", pa.string())])
        parquet.write_table(pa.Table.from_pylist(rows, schema), path)
    return str(path)


@pytest.mark.parametrize("method", ["certified", "streamed"])
def test_given_rows_are_raised_as_the_oracle_raises_them(store: FeatureStore, tmp_path: Path, method: str) -> None:
    found, facts = weights_of(store, "paired", objective="pairs", pairs=write(tmp_path / "pairs.jsonl"), method=method)

    valid = np.delete(np.arange(23), INVALID)
    positives = [[int(np.searchsorted(valid, row)) for row in POSITIVES.get(query, [])] for query in range(5)]
    visits = visit_order(5, LearnerSettings(epochs=4, tile=5))
    expected, _ = oracle.learn(
        stored_c(store, "learn")[:, valid],
        initial_raw_weights(4, seed=0),
        visits,
        k=3,
        learning_rate=0.3,
        weight_decay=0.1,
        objective="pairs",
        positives=positives,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert facts["method"] == method


def test_pairs_of_learned_queries_alone_count_where_some_are_held_out(store: FeatureStore, tmp_path: Path) -> None:
    pairs = write(tmp_path / "pairs.jsonl")
    artifact = learned(store, "paired", objective="pairs", pairs=pairs, weight_decay=[0.0, 1.0])

    (held_out,) = artifact.log.require(0, "not written").facts["held_out"]
    rest = [query for query in range(5) if query != held_out]
    valid = np.delete(np.arange(23), INVALID)
    expected, _ = oracle.learn(
        stored_c(store, "learn")[rest][:, valid],
        initial_raw_weights(4, seed=0),
        visit_order(4, LearnerSettings(epochs=4, tile=4)),
        k=3,
        learning_rate=0.3,
        weight_decay=0.0,
        objective="pairs",
        positives=[[int(np.searchsorted(valid, row)) for row in POSITIVES.get(query, [])] for query in rest],
    )
    table = artifact.read_candidates()
    assert table is not None
    np.testing.assert_allclose(table["weights"].to_pylist()[0], expected, rtol=1e-5)


def test_aspects_share_the_file_and_each_takes_the_pairs_of_its_queries(tmp_path: Path) -> None:
    store = make_store(rows={**ROWS, "learn-style": 3})
    tables = {"data": {"aspects": {"style": {"source": "style.txt"}}}}
    contributing.run(make_spec(store, **tables))

    # Query 4 is in learn alone, so that nothing is said of it for style.
    both = write(tmp_path / "both.csv", [("example 0", "example 3"), ("example 4", "example 8")])
    learned(store, "of-both", tables, objective="pairs", pairs=both)

    losses = WeightsArtifact.open(store.storage, "of-both-style").read_trajectory()
    taken = {row["query"] for row in losses.to_pylist() if not np.isnan(row["loss"])}
    assert taken == {0}
    one = write(tmp_path / "one.csv", [("example 4", "example 8")])
    with pytest.raises(DataError, match=r"one\.csv: holds no pairs of queries of learn-style"):
        learned(store, "of-one", tables, objective="pairs", pairs=one)
    assert WeightsArtifact.open(store.storage, "of-one").is_complete()


def test_a_format_or_an_order_makes_no_other_weights_but_another_pair_does(store: FeatureStore, tmp_path: Path) -> None:
    first = learned(store, "paired", objective="pairs", pairs=write(tmp_path / "a.jsonl"))

    for ending in (".csv", ".parquet"):
        same = write(tmp_path / f"a{ending}", PAIRS[::-1] + PAIRS[:1])
        assert learned(store, "paired", objective="pairs", pairs=same).settings == first.settings
    with pytest.raises(ContractError, match=r"learner\.pairs: store has"):
        learned(store, "paired", objective="pairs", pairs=write(tmp_path / "b.jsonl", PAIRS[1:]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", r"empty\.jsonl: holds no pairs"),
        ("header.csv", "query,example\n", r"header\.csv: holds no pairs"),
        ("no-column.jsonl", '{"query": "example 0"}\n', r"no-column\.jsonl:1: found the columns query; a pair has the"),
        ("no-column.csv", "query,row\nexample 0,3\n", r"no-column\.csv:2: found the columns query, row; a pair has"),
        ("no-object.jsonl", "\n[1]\n", r"no-object\.jsonl, line 2 is a JSON list, not an object"),
        (
            "number.jsonl",
            '{"query": 0, "example": "a"}\n',
            r"number\.jsonl:1: query is 0; accepted: a text that is not empty",
        ),
        ("short.csv", "query,example\na\n", r"short\.csv:2: example is None; accepted"),
        ("broken.jsonl", '{"query":\n', r"broken\.jsonl, line 1 is not JSON"),
        ("broken.parquet", "no", r"broken\.parquet: not readable as parquet"),
        (
            "query.jsonl",
            '{"query": "q", "example": "example 1"}\n',
            r"query\.jsonl:1: query 'q' is not the id of an .* of learn",
        ),
        ("row.csv", "query,example\nexample 0,n\n", r"row\.csv:2: example 'n' is not the id of an example of train"),
        (
            "invalid.csv",
            "query,example\nexample 0,example 9\n",
            r"invalid\.csv:2: example 'example 9' has no valid features",
        ),
    ],
)
def test_pairs_that_cannot_be_used_are_named_by_file_and_line(
    store: FeatureStore, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")

    with pytest.raises(DataError, match=message):
        learned(store, "paired", objective="pairs", pairs=str(tmp_path / name))
    assert WeightsArtifact.find_named(store.storage, "paired") is None


def test_text_that_is_no_utf_8_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_bytes(b"query,example\n\xff,a\n")

    with pytest.raises(DataError, match=r"pairs\.csv: not readable as text in UTF-8"):
        learned(store, "paired", objective="pairs", pairs=str(tmp_path / "pairs.csv"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "pairs"}, r"learn\.pairs: is missing; objective = \"pairs\" needs"),
        ({"pairs": "pairs.csv"}, r"learn\.pairs: found 'pairs\.csv' with objective = \"top\", which has no use"),
        ({"objective": "pairs", "pairs": "a.csv", "k": [1, 2]}, r"learn\.k: found a list with objective = \"pairs\""),
    ],
)
def test_pairs_and_their_objective_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_spec(make_store(), learn=settings)


def test_a_file_that_is_not_there_is_told_before_work_starts(tmp_path: Path) -> None:
    learn = {"objective": "pairs", "pairs": "pairs.jsonl"}
    run = make_run(tmp_path, str(tmp_path / "store"), {"learn": learn})
    spec = read_spec(run)
    assert spec.learn.pairs == str(tmp_path / "pairs.jsonl")

    store = make_store()
    with pytest.raises(SpecError, match=r"learn\.pairs: found .*/pairs\.jsonl; there is no such file"):
        refuse_other_weights(spec, store.storage)
    (tmp_path / "pairs.txt").touch()
    with pytest.raises(SpecError, match=r"pairs\.txt; accepted: a file that ends in \.jsonl, \.csv, \.parquet"):
        refuse_other_weights(make_spec(store, learn={**learn, "pairs": str(tmp_path / "pairs.txt")}), store.storage)
