"""Weights that are there: shown, summed, compared, taken to another store, and ranked by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from pyarrow import parquet

from gradstore.cluster import Engine
from gradstore.errors import ContractError, NotReadyError, SpecError
from gradstore.stages.contribute import contribute
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.score import score
from gradstore.stages.show_weights import render_weights, show_weights, write_weights
from gradstore.stages.transfer import transfer
from gradstore.store.artifacts import ScoresArtifact, WeightsArtifact, list_artifacts, stale_blocks
from gradstore.store.features import FeatureStore
from tests import contributing, oracle, stores
from tests.contributing import GROUPS, give_weights, make_spec, make_store, stored_c
from tests.gradients import random_store
from tests.runs import InThisProcess, gradstore
from tests.stores import all_objects

ENGINE, QUIET = cast(Engine, InThisProcess()), Progress(quiet=True)
GIVEN = {"d": 0.4, "a": 0.3, "b": 0.2, "c": 0.1}


@pytest.fixture(scope="module")
def learned() -> FeatureStore:
    """A store with C, and weights that were learned on it."""
    store = make_store()
    spec = make_spec(store)
    contributing.run(spec)
    learn(spec, ENGINE, QUIET)
    return store


def test_weights_are_shown_in_the_order_of_the_groups_and_compared() -> None:
    store = make_store()
    give_weights(store, GIVEN)
    give_weights(store, dict.fromkeys(GROUPS, 0.25), "equal")
    give_weights(store, {}, "stopped")

    found = show_weights(store.storage.url, [], "group")

    by_name = {item["name"]: item for item in found["weights"]}
    assert set(by_name) == {"given", "equal"}
    assert [(row["group"], row["weight"]) for row in by_name["given"]["rows"]] == [
        (group, GIVEN[group]) for group in GROUPS
    ]
    assert [row["ratio"] for row in by_name["given"]["rows"]] == pytest.approx([4 * GIVEN[group] for group in GROUPS])
    cosine = 0.25 / (0.5 * np.sqrt(sum(weight**2 for weight in GIVEN.values())))
    first = [item["name"] for item in found["weights"]].index("given")
    assert found["similarity"][first] == pytest.approx([1, cosine][:: 1 if first == 0 else -1])


@pytest.mark.parametrize("by", ["depth", "function"])
def test_weights_are_summed_over_the_groups_of_a_depth_or_function(by: Any) -> None:
    store = make_store()
    give_weights(store, GIVEN)

    (item,) = show_weights(store.storage.url, ["given"], by)["weights"]

    assert [(row[by], row["groups"]) for row in item["rows"]] == [({"depth": 0, "function": "mlp"}[by], 4)]
    assert item["rows"][0]["weight"] == pytest.approx(1)
    assert item["rows"][0]["ratio"] == pytest.approx(1)
    assert len(render_weights(show_weights(store.storage.url, [], by))) == 1


def test_weights_are_written_as_a_table_a_document_a_picture_or_a_page(tmp_path: Path) -> None:
    store = make_store()
    give_weights(store, GIVEN)
    give_weights(store, dict.fromkeys(GROUPS, 0.25), "equal")
    found = show_weights(store.storage.url, ["given", "equal"], "group")

    for ending in ("parquet", "json", "svg", "html"):
        written = tmp_path / f"weights.{ending}"
        assert write_weights(store.storage.url, ["given", "equal"], "group", written) == found

    assert json.loads((tmp_path / "weights.json").read_text(encoding="utf-8")) == found
    rows = parquet.read_table(tmp_path / "weights.parquet").to_pylist()
    assert rows == [
        {"name": item["name"], "kernel": "block", **row} for item in found["weights"] for row in item["rows"]
    ]
    picture = ET.parse(tmp_path / "weights.svg")
    assert picture.getroot().find("{http://www.w3.org/2000/svg}title") is not None
    page = (tmp_path / "weights.html").read_text(encoding="utf-8")
    assert "Weights of test" in page
    assert "<td>0.400000</td><td>1.600</td>" in page


def test_a_file_of_weights_replaces_none_unasked_and_has_a_known_ending(tmp_path: Path) -> None:
    store = make_store()
    give_weights(store, GIVEN)
    taken = tmp_path / "weights.svg"
    taken.write_text("mine", encoding="utf-8")

    with pytest.raises(SpecError, match=r"weights\.svg: exists already"):
        write_weights(store.storage.url, [], "group", taken)
    with pytest.raises(SpecError, match=r"weights\.png: found \.png; accepted: \.parquet, \.json, \.svg, \.html"):
        write_weights(store.storage.url, [], "group", tmp_path / "weights.png")
    assert taken.read_text(encoding="utf-8") == "mine"
    write_weights(store.storage.url, [], "group", taken, force=True)
    assert taken.read_text(encoding="utf-8").startswith("<svg ")


def test_a_store_without_weights_and_unknown_ones_say_so() -> None:
    store = make_store()
    with pytest.raises(NotReadyError, match=r"holds no weights\. Run `gradstore learn`"):
        show_weights(store.storage.url, [], "group")
    with pytest.raises(NotReadyError, match="weights/none: there is no such artifact"):
        show_weights(store.storage.url, ["none"], "group")


def test_transferred_weights_are_those_of_their_store_and_never_stale(learned: FeatureStore) -> None:
    store = make_store(rows={"train": 11, "learn": 3, "eval": 2})

    told = transfer(learned.storage.url, "learned", store.storage.url, "from-other")

    assert told["to"] == f"{store.storage.url}/weights/from-other"
    before, after = (
        WeightsArtifact.open(of.storage, name) for of, name in ((learned, "learned"), (store, "from-other"))
    )
    assert after.read().equals(before.read())
    assert after.settings["transferred_from"]["store"] == learned.storage.url
    assert after.settings["learner"] == before.settings["learner"]
    assert stale_blocks(store, list_artifacts(store.storage)) == {}
    # Once more is no other.
    assert transfer(learned.storage.url, "learned", store.storage.url, "from-other") == told


def test_weights_of_other_groups_or_under_a_name_that_is_taken_or_none_are_not_transferred(
    learned: FeatureStore,
) -> None:
    store = make_store()
    before = all_objects(store.storage)
    give_weights(store, {"a": 0.5, "strange": 0.5}, "other")
    with pytest.raises(ContractError, match=r"weights/other: its groups are not those of features/train: b is in one"):
        transfer(store.storage.url, "other", learned.storage.url, "again")
    with pytest.raises(SpecError, match="has learned already"):
        transfer(learned.storage.url, "learned", learned.storage.url, "again")
    with pytest.raises(SpecError, match="but not unweighted"):
        transfer(learned.storage.url, "learned", store.storage.url, "unweighted")
    with pytest.raises(ContractError, match="weights/other"):
        transfer(learned.storage.url, "learned", store.storage.url, "other")
    with pytest.raises(SpecError, match=r"--as: found '\.\./out'; accepted"):
        transfer(learned.storage.url, "learned", store.storage.url, "../out")
    with pytest.raises(NotReadyError, match="weights/none"):
        transfer(learned.storage.url, "none", store.storage.url, "none")
    assert {path for path in all_objects(store.storage) if not path.startswith("weights/other/")} >= set(before)
    assert not any(path.startswith("weights/") and "other" not in path for path in all_objects(store.storage))


def test_rankings_are_made_by_all_weights_in_one_read() -> None:
    made = random_store()
    spec = made.spec({"score": {"k": 3, "weights": ["given", "learned"], "tail_patch": {"queries": 0}}})
    store = FeatureStore.open(made.url)
    give_weights(store, {group: 1.0 + place for place, group in enumerate(stores.GROUPS)})

    for stage in (build_kernel, contribute, learn, score):
        stage(spec, ENGINE, QUIET)

    c = stored_c(store, "eval")
    for name in ("given", "learned"):
        ranked = ScoresArtifact.open(store.storage, f"block.{name}").read().to_pylist()
        (weights,) = show_weights(made.url, [name], "group")["weights"]
        expected = oracle.scores(c, np.array([row["weight"] for row in weights["rows"]]))
        for query, scores in enumerate(expected):
            of_query = [row for row in ranked if row["query"] == query and row["side"] == "proponent"]
            found = [row["example"] for row in sorted(of_query, key=lambda row: row["rank"])[:3]]
            assert found == oracle.top(scores, 3)


def test_the_commands_print_tables_or_json(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    store, other = (FeatureStore.open(random_store(folder).url) for folder in (tmp_path, tmp_path / "other"))
    give_weights(store, dict.fromkeys(stores.GROUPS, 0.25))
    give_weights(other, dict.fromkeys(stores.GROUPS, 0.25))

    table = gradstore("weights", store.storage.url, "--by", "depth")
    moved = gradstore("transfer", other.storage.url, "given", store.storage.url, "--as", "again", "--json")
    found = gradstore("weights", store.storage.url, "--json")
    drawn = gradstore("weights", store.storage.url, "given", "-o", tmp_path / "given.svg")

    assert (table.returncode, moved.returncode, found.returncode) == (0, 0, 0)
    assert drawn.stdout == f"{tmp_path / 'given.svg'}: weights given\n"
    assert "weights given (block)" in table.stdout
    assert json.loads(moved.stdout)["groups"] == len(stores.GROUPS)
    shown = json.loads(found.stdout)["weights"]
    assert [item["name"] for item in shown] == ["again", "given"]
    assert {row["weight"] for row in shown[0]["rows"]} == {0.25}
