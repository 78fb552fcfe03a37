"""evaluate recall: values against sorted scores of C, what is kept, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.cli import main
from gradstore.errors import ContractError, DataError, NotReadyError, SpecError
from gradstore.spec import RunSpec, parse_spec, read_spec
from gradstore.stages.evaluate import evaluate_recall
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import EvaluationArtifact
from gradstore.store.features import FeatureStore
from tests import contributing
from tests.contributing import GROUPS, ROWS, give_weights, make_spec, make_store, stored_c
from tests.health import check
from tests.runs import InThisProcess, write_run

QUIET = Progress(quiet=True)
ENGINE: Any = InThisProcess()
INVALID = (2, 9)
# Of the queries of eval the third has none.
CONTRIBUTORS = {0: [3, 17], 1: [22], 3: [0, 1, 5]}
WEIGHTS = dict(zip(GROUPS, (0.7, 0.1, 0.0, 0.2), strict=True))
KS = [1, 3, 10]
# The store has no model that would give embeddings.
BASELINES = ["bm25", "cosine", "random"]


def pairs(folder: Path, of: dict[int, list[int]] | None = None) -> str:
    rows = [(query, row) for query, found in (of or CONTRIBUTORS).items() for row in found]
    file = folder / "pairs.csv"
    file.write_text("query,example\n" + "".join(f"example {query},example {row}\n" for query, row in rows))
    return str(file)


@pytest.fixture
def store() -> FeatureStore:
    made = make_store(invalid=INVALID)
    contributing.run(make_spec(made))
    give_weights(made, WEIGHTS)
    return made


def spec_of(store: FeatureStore, *, weights: bool = True, **recall: Any) -> RunSpec:
    learn = {"name": "given"} if weights else {"name": "missing"}
    return make_spec(
        store, learn={**learn, "k": 2, "epochs": 2}, evaluate={"baselines": BASELINES, "recall": {"k": KS, **recall}}
    )


def values(store: FeatureStore, method: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = EvaluationArtifact.open(store.storage, "recall", method).read().to_pydict()
    return found


def features(store: FeatureStore, name: str) -> np.ndarray:
    """All features of all groups side by side, float64 [rows, D]."""
    found = store.open_set(name)
    blocks = [found.read_block(block) for block in range(found.info.num_blocks)]
    return np.concatenate([np.concatenate([*block.values()], 1) for block in blocks]).astype(np.float64)


def expected(scores: np.ndarray) -> dict[str, list[float]]:
    """By sorting the scores [Q, N] of all rows, in which invalid ones are NaN."""
    valid = np.delete(np.arange(ROWS["train"]), INVALID)
    ranks = {
        query: [1 + [*valid[np.argsort(-scores[query, valid], kind="stable")]].index(row) for row in rows]
        for query, rows in CONTRIBUTORS.items()
    }
    return {
        "query": [*CONTRIBUTORS],
        **{f"recall@{k}": [float(np.mean([rank <= k for rank in of])) for of in ranks.values()] for k in KS},
        **{f"precision@{k}": [sum(rank <= k for rank in of) / k for of in ranks.values()] for k in KS},
        "reciprocal_rank": [1 / min(of) for of in ranks.values()],
    }


@pytest.mark.parametrize("mode", ["tensor", "streamed"])
def test_values_are_those_of_sorted_scores_and_are_kept(mode: str, tmp_path: Path) -> None:
    store = make_store(invalid=INVALID)
    contributing.run(make_spec(store))
    c = stored_c(store, "eval")
    if mode == "streamed":
        store = make_store(invalid=INVALID)
        contributing.run(make_spec(store, contribute={"mode": mode}))
    give_weights(store, WEIGHTS)
    spec = spec_of(store, pairs=pairs(tmp_path)).model_copy(
        update={"contribute": make_spec(store, contribute={"mode": mode}).contribute}
    )

    told = evaluate_recall(spec, ENGINE, QUIET)

    assert (told["queries"], told["queries_without"], told["contributors"]) == (3, 1, 2)
    assert [(row["method"], row["kernel"]) for row in told["methods"]] == [
        ("unweighted", "block"),
        ("given", "block"),
        ("cosine", None),
        ("random", None),
    ]
    train, queries = (features(store, name) for name in ("train", "eval"))
    scores = {
        "unweighted": c.astype(np.float64).mean(2),
        "given": c.astype(np.float64) @ np.array([*WEIGHTS.values()]),
        "cosine": queries @ train.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(train, axis=1),
    }
    for method, of_method in scores.items():
        want = expected(of_method)
        assert values(store, f"baseline.{method}" if method == "cosine" else f"block.{method}") == want
        (row,) = [row for row in told["methods"] if row["method"] == method]
        for name, of_queries in want.items():
            if name != "query":
                assert row["measures"][name]["mean"] == pytest.approx(np.mean(of_queries))
    mine, without = values(store, "block.given"), values(store, "block.unweighted")
    difference = told["methods"][1]["measures"]["recall@3"]["difference"]
    assert difference["mean"] == pytest.approx(np.mean(mine["recall@3"]) - np.mean(without["recall@3"]))
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert "difference" not in told["methods"][0]["measures"]["recall@3"]
    assert check(store.storage, full=True).problems == ()


def test_what_is_kept_is_not_measured_again_and_what_is_missing_is(store: FeatureStore, tmp_path: Path) -> None:
    spec = spec_of(store, pairs=pairs(tmp_path))
    first = evaluate_recall(spec, ENGINE, QUIET)
    before = {info.path: store.storage.read(info.path) for info in store.storage.list_objects("evaluations")}
    random = [path for path in before if "baseline.random" in path and "/commits/" in path]
    store.storage.delete(random[0])

    assert evaluate_recall(spec, ENGINE, QUIET) == first
    after = {info.path: store.storage.read(info.path) for info in store.storage.list_objects("evaluations")}
    assert {path: data for path, data in after.items() if "baseline.random" not in path} == {
        path: data for path, data in before.items() if "baseline.random" not in path
    }
    assert values(store, "baseline.random")["query"] == [*CONTRIBUTORS]


def test_other_pairs_are_refused_where_values_are_of_these(store: FeatureStore, tmp_path: Path) -> None:
    evaluate_recall(spec_of(store, pairs=pairs(tmp_path)), ENGINE, QUIET)

    with pytest.raises(ContractError, match=r"evaluations/recall/block\.unweighted.*\n?.*pairs: store has"):
        evaluate_recall(spec_of(store, pairs=pairs(tmp_path, {0: [3]})), ENGINE, QUIET)


def test_a_random_ranking_finds_by_chance_and_is_the_same_every_time(tmp_path: Path) -> None:
    rows = {"train": 400, "learn": 2, "eval": 60}
    store = make_store(rows=rows, block_rows=64)
    contributing.run(make_spec(store))
    of = {query: [*range(query, 400, 10)] for query in range(60)}
    spec = spec_of(store, weights=False, pairs=pairs(tmp_path, of), k=[40])
    give_weights(store, WEIGHTS, "missing")

    evaluate_recall(spec, ENGINE, QUIET)

    found = values(store, "baseline.random")["recall@40"]
    assert np.mean(found) == pytest.approx(0.1, abs=0.02)
    assert np.std(found) > 0.02


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "evaluate.recall: found neither pairs nor by; accepted: one of"),
        ({"pairs": "a.csv", "by": "label"}, "evaluate.recall: found both pairs and by"),
        ({"by": "label", "k": [3, 3]}, r"evaluate.recall.k: found \[3, 3\]; accepted: different numbers"),
        ({"by": "label", "k": []}, r"evaluate.recall.k: found \[\]; accepted: "),
        ({"by": "label", "name": "a.b"}, "evaluate.recall.name: found 'a.b'"),
    ],
)
def test_tables_that_say_too_little_or_too_much_are_refused(changes: dict[str, Any], match: str) -> None:
    tables: dict[str, Any] = {
        "run": {"name": "a", "store": "b"},
        "model": {"source": "c"},
        "data": {name: {"source": f"{name}.txt"} for name in ROWS},
        "evaluate": {"recall": changes},
    }
    with pytest.raises(SpecError, match=match):
        parse_spec(tables)


def test_pairs_lie_beside_the_run(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run.toml",
        {
            "run": {"name": "a", "store": "b"},
            "model": {"source": "c"},
            **{f"data.{name}": {"source": f"{name}.txt"} for name in ROWS},
            "evaluate.recall": {"pairs": "pairs.csv"},
        },
    )
    recall = read_spec(run).evaluate.recall
    assert recall is not None
    assert recall.pairs == str(tmp_path / "pairs.csv")


def test_examples_that_share_a_value_of_a_file_count_as_contributors_beside_those_of_another(
    store: FeatureStore, tmp_path: Path
) -> None:
    rows = [row for row in range(ROWS["train"]) if row not in INVALID]
    of = {query: [row for row in rows if row % 3 == query % 3] for query in range(ROWS["eval"])}
    lines = [f"example {row},{row % 3}" for row in range(ROWS["train"])]
    (tmp_path / "styles.csv").write_text("\n".join(["id,value", *lines]))
    by_file = evaluate_recall(spec_of(store, by=str(tmp_path / "styles.csv"), name="style"), ENGINE, QUIET)
    by_pairs = evaluate_recall(spec_of(store, pairs=pairs(tmp_path, of)), ENGINE, QUIET)

    assert by_file == by_pairs
    kept = EvaluationArtifact.open(store.storage, "recall.style", "block.given").read()
    assert kept.to_pydict() == values(store, "block.given")


def test_files_of_values_that_say_nothing_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    file = tmp_path / "styles.csv"
    for content, match in (
        ("id,value\nexample 0,a\nexample 0,b\n", r"styles\.csv:3: id 'example 0' has the value 'b', and 'a' before"),
        ("id,value\nsome,a\n", r"evaluate\.recall\.by: found .*styles\.csv, and no eval query has a value"),
        ("id,style\nexample 0,a\n", r"styles\.csv:2: found the columns id, style; a row has the columns id and value"),
    ):
        file.write_text(content)
        with pytest.raises(DataError, match=match):
            evaluate_recall(spec_of(store, by=str(file)), ENGINE, QUIET)
    with pytest.raises(SpecError, match=r"evaluate\.recall\.by: found topic; accepted: a file that ends in"):
        evaluate_recall(spec_of(store, by="topic"), ENGINE, QUIET)
    assert [*store.storage.list_objects("evaluations")] == []


def test_what_there_is_nothing_to_measure_by_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"evaluate.recall: is missing; accepted: a table \[evaluate.recall\]"):
        evaluate_recall(make_spec(store), ENGINE, QUIET)
    with pytest.raises(DataError, match=r'evaluate\.recall\.by: found "label", and no eval query has a value'):
        evaluate_recall(spec_of(store, by="label"), ENGINE, QUIET)
    with pytest.raises(SpecError, match=r"evaluate\.recall\.pairs: found none\.csv; there is no such file"):
        evaluate_recall(spec_of(store, pairs="none.csv"), ENGINE, QUIET)
    with pytest.raises(DataError, match="'example 99' is not the id of an example of train"):
        evaluate_recall(spec_of(store, pairs=pairs(tmp_path, {0: [99]})), ENGINE, QUIET)
    with pytest.raises(NotReadyError, match="weights/missing"):
        evaluate_recall(spec_of(store, weights=False, pairs=pairs(tmp_path)), ENGINE, QUIET)
    assert [*store.storage.list_objects("evaluations")] == []


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from gradstore.stages.run import STAGES
    from tests.runs import InThisProcess
    from tests.synthetic import make

    spec = make(tmp_path / "run", rows=160, queries=12)
    planted = json.loads((tmp_path / "run" / "planted.json").read_text())
    for stage in STAGES:
        stage(spec, InThisProcess(), QUIET)  # type: ignore[arg-type]
    store = FeatureStore.open(spec.run.store)
    ids = {name: store.open_set(name).read_column("example_id") for name in ("train", "eval")}
    lines = [
        json.dumps({"query": ids["eval"][query], "example": ids["train"][row]}) + "\n"
        for query, rows in enumerate(planted["contributors"]["eval"])
        for row in rows
    ]
    (tmp_path / "run" / "pairs.jsonl").write_text("".join(lines))
    run = tmp_path / "run" / "run.toml"
    run.write_text(run.read_text() + '\n[evaluate.recall]\npairs = "pairs.jsonl"\nk = [2, 20]\n')

    def invoke(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["gradstore", "evaluate", "recall", str(run), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    found = json.loads(invoke("--json", "--quiet"))
    recall = {row["method"]: row["measures"]["recall@20"]["mean"] for row in found["methods"]}
    assert recall["random"] < 0.4 < recall["unweighted"]
    assert recall["learned"] >= recall["unweighted"]
    shown = invoke("--quiet")
    assert "recall of 12 queries" in shown
    assert all(word in shown for word in ("identity.learned", "random", "reciprocal_rank"))
