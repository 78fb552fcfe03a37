"""What train examples do to the eval queries together: summed, by label, and chosen by."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from gradstore.cluster import Engine
from gradstore.errors import NotReadyError, SpecError, StorageError
from gradstore.plan import sizes
from gradstore.stages.contribute import contribute
from gradstore.stages.influence import _count, influence, render_influence, select, set_influence
from gradstore.stages.kernel import build_kernel
from gradstore.stages.output import replacing
from gradstore.stages.progress import Progress
from gradstore.store.features import FeatureStore
from tests import oracle, stores
from tests.contributing import give_weights, stored_c
from tests.gradients import RandomStore, random_store
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

    found = set_influence(made.url, None, weights)

    vector = np.full(len(GIVEN), 1 / len(GIVEN)) if weights is None else np.array([*GIVEN.values()])
    valid = [row for row in range(11) if row not in INVALID]
    assert found.rows.tolist() == valid
    assert (found.queries, found.kernel) == (3, "block")
    np.testing.assert_allclose(found.totals, expected(made, vector)[valid], rtol=1e-6, atol=1e-9)


def test_scores_in_place_of_c_give_the_same_influence(made: RandomStore) -> None:
    scores = made_of(random_store(invalid=INVALID), {"contribute": {"mode": "scores"}})

    found = set_influence(scores.url, "block", None)

    np.testing.assert_allclose(found.totals, set_influence(made.url, "block", None).totals, rtol=1e-4, atol=1e-6)
    with pytest.raises(NotReadyError, match=r"score-matrices/block\.given/eval"):
        set_influence(scores.url, None, "given")


def test_squares_are_summed_where_scores_are_squared_in_the_end() -> None:
    made = made_of(random_store(output="das"), {"kernel": {"kind": "full"}})

    found = set_influence(made.url, None, None)

    c = stored_c(FeatureStore.open(made.url), "eval", "full")
    squares = oracle.scores(c, np.full(c.shape[2], 1 / c.shape[2])) ** 2
    np.testing.assert_allclose(found.totals, squares.sum(0), rtol=1e-5)


def test_labels_are_summed_largest_first(made: RandomStore) -> None:
    totals = set_influence(made.url, None, None)
    labels = FeatureStore.open(made.url).open_set("train").read_column("label")

    found = influence(made.url, None, None, "label")

    sums: dict[str | None, list[float]] = {}
    for row, total in zip(totals.rows, totals.totals, strict=True):
        sums.setdefault(labels[row], []).append(total)
    assert {row["label"]: (row["rows"], row["sum"]) for row in found["rows"]} == {
        label: (len(of), pytest.approx(sum(of))) for label, of in sums.items()
    }
    assert [row["sum"] for row in found["rows"]] == sorted((row["sum"] for row in found["rows"]), reverse=True)
    assert render_influence(found).row_count == len(sums)
    assert sum(row["rows"] for row in influence(made.url, None, None, "source")["rows"]) == len(totals.rows)


@pytest.mark.parametrize(("top", "count"), [("3", 3), ("25%", 3), ("100%", 9), ("0.1%", 1)])
@pytest.mark.parametrize("lowest", [False, True])
def test_select_writes_the_ids_of_the_largest_or_lowest(
    made: RandomStore, tmp_path: Path, top: str, count: int, lowest: bool
) -> None:
    found = set_influence(made.url, None, "given")
    best = oracle.top(-found.totals if lowest else found.totals, count)
    ids = FeatureStore.open(made.url).open_set("train").read_column("example_id")

    told = select(made.url, tmp_path / "ids.txt", top, (None, "given"), lowest=lowest)
    select(made.url, tmp_path / "ids.jsonl", top, (None, "given"), lowest=lowest)

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
        select(made.url, tmp_path / "ids.txt", top, (None, None))
    assert not list(tmp_path.iterdir())


def test_what_is_not_there_is_told(made: RandomStore, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"--kernel: found none; .* has contributions or scores of: block"):
        set_influence(made.url, "none", None)
    with pytest.raises(NotReadyError, match="weights/none"):
        set_influence(made.url, None, "none")
    with pytest.raises(NotReadyError, match="holds no contributions of eval"):
        set_influence(random_store().url, None, None)
    with pytest.raises(SpecError, match=r"the folder .* does not exist"):
        select(made.url, tmp_path / "no" / "ids.txt", "1", (None, None))


def test_no_file_is_replaced_unasked_and_none_of_a_store(tmp_path: Path) -> None:
    made, output = made_of(random_store(tmp_path)), tmp_path / "ids.txt"
    output.write_text("mine", encoding="utf-8")

    with pytest.raises(SpecError, match=r"exists already, and is left as it is\. .* --force"):
        select(made.url, output, "1", (None, None))
    with pytest.raises(SpecError, match="lies inside the store"):
        select(made.url, tmp_path / "store" / "gradstore.json", "1", (None, None), force=True)
    assert output.read_text(encoding="utf-8") == "mine"
    select(made.url, output, "1", (None, None), force=True)
    assert output.read_text(encoding="utf-8") != "mine"


@pytest.mark.parametrize(("top", "count"), [("7%", 7), ("14%", 14), ("56%", 56), ("0.5%", 1), ("1.5%", 2)])
def test_a_share_is_exact_and_rounded_up(top: str, count: int) -> None:
    assert _count(top, 100) == count


def test_labels_are_no_markup_and_kept_on_one_line() -> None:
    row = {"rows": 1, "sum": 1.0, "mean": 1.0, "positive": 1.0}
    labels = ["[/INST]", "[red]x", "two\nlines", None]
    rows = [{"label": label, **row} for label in labels]
    shown = Console(width=120, file=StringIO())

    shown.print(render_influence({"by": "label", "queries": 2, "kernel": "block", "weights": None, "rows": rows}))

    assert isinstance(shown.file, StringIO)
    text = shown.file.getvalue()
    assert all(label in text for label in ("[/INST]", "[red]x", "two lines", "(none)"))


@pytest.mark.parametrize("place", ["file/x.html", "no/x.html", "n" * 300])
def test_a_file_that_cannot_be_is_told_as_such(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"), replacing(tmp_path / place) as temporary:
        temporary.write_text("", encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_commands_print_and_write(tmp_path: Path) -> None:
    made = made_of(random_store(tmp_path))

    table = gradstore("influence", made.url, "--by", "source")
    chosen = gradstore("select", made.url, tmp_path / "ids.txt", "--top", "2", "--json")

    assert table.returncode == 0, table.stderr
    assert "influence on 3 queries: block, unweighted" in table.stdout
    assert json.loads(chosen.stdout)["examples"] == 2
    assert len((tmp_path / "ids.txt").read_text(encoding="utf-8").splitlines()) == 2


def test_queries_are_read_in_whole_tiles() -> None:
    assert sizes.verified_queries((100, 224), 2048, 17) == 17
    assert sizes.verified_queries((5, 4), 8, 2) == 5
