"""What train examples do to the eval queries, or to themselves: summed, by label, and chosen by."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from gradstore.cluster import Engine
from gradstore.errors import ContractError, NotReadyError, SpecError, StorageError
from gradstore.plan import sizes
from gradstore.stages.contribute import contribute
from gradstore.stages.featurize.tables import statistics_of
from gradstore.stages.influence import Asked, find_influence, influence, render_influence, select
from gradstore.stages.influence.stage import _count
from gradstore.stages.kernel import build_kernel
from gradstore.stages.output import replacing
from gradstore.stages.progress import Progress
from gradstore.stages.self_influence import self_influence
from gradstore.store.artifacts import SelfInfluenceArtifact
from gradstore.store.features import FeatureStore
from gradstore.store.features.erasure import erase_rows
from tests import oracle, stores
from tests.contributing import give_weights, stored_c
from tests.gradients import RandomStore, random_store
from tests.oracle.pooling import attention_pooled
from tests.runs import InThisProcess, gradstore

ENGINE, QUIET = cast(Engine, InThisProcess()), Progress(quiet=True)
INVALID = (2, 7)
GIVEN = {group: 1.0 + place for place, group in enumerate(stores.GROUPS)}


def made_of(made: RandomStore, tables: dict[str, dict[str, Any]] | None = None) -> RandomStore:
    """The store with kernel and contributions."""
    spec = made.spec(tables or {})
    for stage in (build_kernel, contribute):
        stage(spec, ENGINE, QUIET)
    return made


@pytest.fixture(scope="module")
def made() -> RandomStore:
    found = made_of(random_store(invalid=INVALID))
    give_weights(FeatureStore.open(found.url), GIVEN)
    return found


def expected(made: RandomStore, weights: np.ndarray) -> np.ndarray:
    """The sum of scores over the queries, of every train row."""
    return np.asarray(oracle.scores(stored_c(FeatureStore.open(made.url), "eval"), weights).sum(0))


@pytest.mark.parametrize("weights", [None, "given"])
def test_influence_is_the_sum_of_scores_over_the_queries(
    made: RandomStore, weights: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that queries are read in several parts.
    monkeypatch.setattr("gradstore.stages.contributions.verified_queries", lambda *_: 2)

    found = find_influence(made.url, Asked(weights=weights))

    vector = np.full(len(GIVEN), 1 / len(GIVEN)) if weights is None else np.array([*GIVEN.values()])
    valid = [row for row in range(11) if row not in INVALID]
    assert found.rows.tolist() == valid
    assert (found.queries, found.kernel) == (3, "block")
    np.testing.assert_allclose(found.totals, expected(made, vector)[valid], rtol=1e-6, atol=1e-9)


def test_scores_in_place_of_c_give_the_same_influence(made: RandomStore) -> None:
    scores = made_of(random_store(invalid=INVALID), {"contribute": {"mode": "scores"}})

    found = find_influence(scores.url, Asked(kernel="block"))

    np.testing.assert_allclose(
        found.totals, find_influence(made.url, Asked(kernel="block")).totals, rtol=1e-4, atol=1e-6
    )
    with pytest.raises(NotReadyError, match=r"score-matrices/block\.given/eval"):
        find_influence(scores.url, Asked(weights="given"))


def test_squares_are_summed_where_scores_are_squared_in_the_end() -> None:
    made = made_of(random_store(output="das"), {"kernel": {"kind": "full"}})

    found = find_influence(made.url, Asked())

    c = stored_c(FeatureStore.open(made.url), "eval", "full")
    squares = oracle.scores(c, np.full(c.shape[2], 1 / c.shape[2])) ** 2
    np.testing.assert_allclose(found.totals, squares.sum(0), rtol=1e-5)


def test_the_influence_on_one_query_is_its_scores(made: RandomStore) -> None:
    found = find_influence(made.url, Asked(query="eval-1", weights="given"))

    scores = oracle.scores(stored_c(FeatureStore.open(made.url), "eval"), np.array([*GIVEN.values()]))[1]
    assert found.queries == 1
    np.testing.assert_allclose(found.totals, scores[found.rows], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", [None, "given"])
def test_self_influence_is_summed_over_groups_and_members(weights: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    etas = {"a": 0.5, "b": 2.0}
    members = [{"name": name, "eta": eta} for name, eta in etas.items()]
    monkeypatch.setattr(stores, "RUN", {**stores.RUN, "model": {"members": members}})
    made = random_store(etas=etas, invalid=INVALID)
    give_weights(FeatureStore.open(made.url), GIVEN)
    self_influence(made.spec({"kernel": {"kind": "identity"}}), ENGINE, QUIET)

    found = find_influence(made.url, Asked(on_itself=True, weights=weights))

    expected_N = np.zeros(11)
    for member, eta in etas.items():
        for group, rows in made.features("train", member).items():
            for n, row in enumerate(rows.astype(np.float64)):
                expected_N[n] += eta * (1 if weights is None else GIVEN[group]) * sum(value**2 for value in row)
    assert found.rows.tolist() == [row for row in range(11) if row not in INVALID]
    assert (found.queries, found.kernel) == (0, "identity")
    np.testing.assert_allclose(found.totals, expected_N[found.rows], rtol=1e-5)


def test_rows_are_summed_and_chosen_by_self_influence(tmp_path: Path) -> None:
    made = random_store(zero=[4])
    spec = made.spec({})
    build_kernel(spec, ENGINE, QUIET)
    with pytest.raises(NotReadyError, match=r"holds no self-influence\. Run `gradstore self-influence` first\."):
        select(made.url, tmp_path / "ids.txt", "1", Asked(on_itself=True))
    self_influence(spec, ENGINE, QUIET)

    select(made.url, tmp_path / "ids.txt", "1", Asked(on_itself=True), lowest=True)
    found = influence(made.url, Asked(on_itself=True), "label")

    assert (tmp_path / "ids.txt").read_text(encoding="utf-8") == "train-4\n"
    tau = SelfInfluenceArtifact.open(FeatureStore.open(made.url).storage, "block", "m0").read()
    assert sum(row["sum"] for row in found["rows"]) == pytest.approx(float(tau.sum()))
    shown = Console(width=120, file=StringIO())
    shown.print(render_influence(found))
    assert isinstance(shown.file, StringIO)
    assert "self-influence: block, unweighted" in shown.file.getvalue()


def test_self_influence_of_other_rows_than_the_train_set_has_now_is_refused() -> None:
    made = random_store()
    spec = made.spec({"kernel": {"kind": "identity"}})
    self_influence(spec, ENGINE, QUIET)
    erase_rows(FeatureStore.open(made.url), "train", [3], statistics_of)

    with pytest.raises(ContractError, match="self-influence/identity/m0: is stale"):
        find_influence(made.url, Asked(on_itself=True))


def test_an_id_that_is_not_one_line_goes_to_jsonl_only(
    made: RandomStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = "two\u2028lines"
    monkeypatch.setattr("gradstore.store.features.FeatureSet.read_column", lambda *_: [strange] * 11)

    with pytest.raises(SpecError, match=r"the id 'two\\u2028lines' is not one line.*ends in \.jsonl"):
        select(made.url, tmp_path / "ids.txt", "2", Asked())
    assert not list(tmp_path.iterdir())
    select(made.url, tmp_path / "ids.jsonl", "2", Asked())
    lines = (tmp_path / "ids.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["example"] for line in lines] == [strange] * 2


def test_labels_are_summed_largest_first(made: RandomStore) -> None:
    totals = find_influence(made.url, Asked())
    labels = FeatureStore.open(made.url).open_set("train").read_column("label")

    found = influence(made.url, Asked(), "label")

    sums: dict[str | None, list[float]] = {}
    for row, total in zip(totals.rows, totals.totals, strict=True):
        sums.setdefault(labels[row], []).append(total)
    assert {row["label"]: (row["rows"], row["sum"]) for row in found["rows"]} == {
        label: (len(of), pytest.approx(sum(of))) for label, of in sums.items()
    }
    assert [row["sum"] for row in found["rows"]] == sorted((row["sum"] for row in found["rows"]), reverse=True)
    assert render_influence(found).row_count == len(sums)
    assert sum(row["rows"] for row in influence(made.url, Asked(), "source")["rows"]) == len(totals.rows)


@pytest.mark.parametrize(("top", "count"), [("3", 3), ("25%", 3), ("100%", 9), ("0.1%", 1)])
@pytest.mark.parametrize("lowest", [False, True])
def test_select_writes_the_ids_of_the_largest_or_lowest(
    made: RandomStore, tmp_path: Path, top: str, count: int, lowest: bool
) -> None:
    found = find_influence(made.url, Asked(weights="given"))
    best = oracle.top(-found.totals if lowest else found.totals, count)
    ids = FeatureStore.open(made.url).open_set("train").read_column("example_id")

    told = select(made.url, tmp_path / "ids.txt", top, Asked(weights="given"), lowest=lowest)
    select(made.url, tmp_path / "ids.jsonl", top, Asked(weights="given"), lowest=lowest)

    chosen = [ids[found.rows[place]] for place in best]
    assert (tmp_path / "ids.txt").read_text(encoding="utf-8").splitlines() == chosen
    rows = [json.loads(line) for line in (tmp_path / "ids.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["row"], row["example"]) for row in rows] == [
        (int(found.rows[place]), ids[found.rows[place]]) for place in best
    ]
    assert (told["examples"], told["of"]) == (count, 9)


@pytest.mark.parametrize("top", ["0", "-1", "0%", "101%", "half", "10", "1.5"])
def test_a_number_that_is_none_or_too_large_is_refused_and_no_file_written(
    made: RandomStore, tmp_path: Path, top: str
) -> None:
    with pytest.raises(SpecError, match="--top: found"):
        select(made.url, tmp_path / "ids.txt", top, Asked())
    assert not list(tmp_path.iterdir())


def test_what_is_not_there_is_told(made: RandomStore, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"--kernel: found none; .* has contributions or scores of: block"):
        find_influence(made.url, Asked(kernel="none"))
    with pytest.raises(NotReadyError, match="weights/none"):
        find_influence(made.url, Asked(weights="none"))
    with pytest.raises(NotReadyError, match="holds no contributions of eval"):
        find_influence(random_store().url, Asked())
    with pytest.raises(SpecError, match=r"--query: found 'train-1'; .*features/eval has no example of this id"):
        find_influence(made.url, Asked(query="train-1"))
    with pytest.raises(SpecError, match="--query: found 'eval-1' with --self, in which no query takes part"):
        Asked(query="eval-1", on_itself=True)
    with pytest.raises(SpecError, match=r"the folder .* does not exist"):
        select(made.url, tmp_path / "no" / "ids.txt", "1", Asked())


def test_no_file_is_replaced_unasked_and_none_of_a_store(tmp_path: Path) -> None:
    made, output = made_of(random_store(tmp_path)), tmp_path / "ids.txt"
    output.write_text("mine", encoding="utf-8")

    with pytest.raises(SpecError, match=r"exists already, and is left as it is\. .* --force"):
        select(made.url, output, "1", Asked())
    with pytest.raises(SpecError, match="lies inside the store"):
        select(made.url, tmp_path / "store" / "gradstore.json", "1", Asked(), force=True)
    assert output.read_text(encoding="utf-8") == "mine"
    select(made.url, output, "1", Asked(), force=True)
    assert output.read_text(encoding="utf-8") != "mine"


@pytest.mark.parametrize(("top", "count"), [("7%", 7), ("14%", 14), ("56%", 56), ("0.5%", 1), ("1.5%", 2)])
def test_a_share_is_exact_and_rounded_up(top: str, count: int) -> None:
    assert _count(top, 100) == count


def test_labels_are_no_markup_and_kept_on_one_line() -> None:
    row = {"rows": 1, "sum": 1.0, "mean": 1.0, "positive": 1.0}
    labels = ["[/INST]", "[red]x", "two\nlines", None]
    rows = [{"label": label, **row} for label in labels]
    shown = Console(width=120, file=StringIO())

    made = {"queries": 1, "query": "[red]q", "self": False, "kernel": "block", "weights": None, "pool": "sum"}
    shown.print(render_influence({"by": "label", **made, "rows": rows}))

    assert isinstance(shown.file, StringIO)
    text = shown.file.getvalue()
    assert all(part in text for part in ("[/INST]", "[red]x", "two lines", "(none)", "influence on [red]q: block"))


@pytest.mark.parametrize("place", ["file/x.html", "no/x.html", "n" * 300])
def test_a_file_that_cannot_be_is_told_as_such(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"), replacing(tmp_path / place) as temporary:
        temporary.write_text("", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_commands_print_and_write(tmp_path: Path) -> None:
    made = made_of(random_store(tmp_path))

    table = gradstore("influence", made.url, "--by", "source")
    of_one = gradstore("influence", made.url, "--query", "eval-2", "--json")
    missing = gradstore("influence", made.url, "--self")
    chosen = gradstore("select", made.url, tmp_path / "ids.txt", "--top", "2", "--json")

    assert table.returncode == 0, table.stderr
    assert "influence on 3 queries: block, unweighted" in table.stdout
    assert json.loads(of_one.stdout)["query"] == "eval-2"
    assert missing.returncode == 6
    assert "Run `gradstore self-influence` first" in missing.stderr
    assert json.loads(chosen.stdout)["examples"] == 2
    assert len((tmp_path / "ids.txt").read_text(encoding="utf-8").splitlines()) == 2


def test_queries_are_read_in_whole_tiles() -> None:
    assert sizes.verified_queries((100, 224), 2048, 17) == 17
    assert sizes.verified_queries((5, 4), 8, 2) == 5


def test_a_set_has_on_every_query_the_pool_of_its_rows(made: RandomStore, tmp_path: Path) -> None:
    store = FeatureStore.open(made.url)
    ids = store.open_set("train").read_column("example_id")
    # A row that is not valid takes no part.
    chosen = [0, 1, 4, INVALID[0]]
    (tmp_path / "some.txt").write_text("".join(f"{ids[row]}\n" for row in chosen), encoding="utf-8")

    told = influence(made.url, Asked(weights="given"), "label", pool="attention", examples=tmp_path / "some.txt")

    scores = oracle.scores(stored_c(store, "eval"), np.array([*GIVEN.values()]))
    pools = attention_pooled(scores, [[0, 1, 4]])[:, 0]
    (row,) = told["rows"]
    assert (row["examples"], row["rows"], told["queries"], told["pool"]) == ("some.txt", 3, 3, "attention")
    assert row["sum"] == pytest.approx(pools.sum())
    assert row["mean"] == pytest.approx(pools.mean())
    assert row["positive"] == pytest.approx((pools > 0).mean())
    sharply = influence(
        made.url, Asked(weights="given"), "label", pool="attention", sharpness=3.0, examples=tmp_path / "some.txt"
    )
    assert sharply["rows"][0]["sum"] == pytest.approx(attention_pooled(scores, [[0, 1, 4]], 3.0).sum())
    (summed,) = influence(made.url, Asked(weights="given"), "label", examples=tmp_path / "some.txt")["rows"]
    assert summed["sum"] == pytest.approx(scores[:, [0, 1, 4]].sum())


def test_sets_are_labels_unless_a_file_names_one(made: RandomStore) -> None:
    store = FeatureStore.open(made.url)
    labels = store.open_set("train").read_column("label")

    told = influence(made.url, Asked(), "label", pool="attention")

    scores = oracle.scores(stored_c(store, "eval"), np.full(len(GIVEN), 1 / len(GIVEN)))
    valid = [row for row in range(11) if row not in INVALID]
    for row in told["rows"]:
        rows = [place for place in valid if labels[place] == row["label"]]
        assert row["rows"] == len(rows)
        assert row["sum"] == pytest.approx(attention_pooled(scores, [rows]).sum())
    assert told["rows"] == sorted(told["rows"], key=lambda row: -row["sum"])
    console = Console(file=StringIO(), width=200)
    console.print(render_influence(told))
    assert "pooled by attention" in cast(StringIO, console.file).getvalue()


@pytest.mark.parametrize(
    ("text", "message"),
    [("\n", "holds no id"), ("nobody\n", r"1 of 1 ids are not in the train set, such as 'nobody'")],
)
def test_a_file_without_train_examples_is_refused(made: RandomStore, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "some.txt").write_text(text, encoding="utf-8")

    with pytest.raises(SpecError, match=rf"--examples: .*some\.txt: {message}"):
        influence(made.url, Asked(), "label", examples=tmp_path / "some.txt")


def test_a_file_that_is_not_there_self_influence_by_attention_and_rows_without_features_are_refused(
    made: RandomStore, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=r"--examples: .*none\.txt: not readable"):
        influence(made.url, Asked(), "label", examples=tmp_path / "none.txt")
    with pytest.raises(SpecError, match="--pool: found attention with --self"):
        influence(made.url, Asked(on_itself=True), "label", pool="attention")
    with pytest.raises(SpecError, match=r"--sharpness: found 2\.0 with --pool sum; accepted: .* with attention\."):
        influence(made.url, Asked(), "label", sharpness=2.0)
    with pytest.raises(SpecError, match=r"--sharpness: found nan with --pool attention; accepted: a number above 0"):
        influence(made.url, Asked(), "label", pool="attention", sharpness=float("nan"))
    ids = FeatureStore.open(made.url).open_set("train").read_column("example_id")
    (tmp_path / "invalid.txt").write_text(f"{ids[INVALID[0]]}\n", encoding="utf-8")
    with pytest.raises(SpecError, match="none of the rows that are asked for has valid features"):
        influence(made.url, Asked(), "label", pool="attention", examples=tmp_path / "invalid.txt")
