"""learn: of a grid of settings the one is taken that does best on queries which nothing was learned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.cli.application import draw
from gradstore.errors import ContractError, DataError, SpecError
from gradstore.numerics.learner import LearnerSettings, initial_raw_weights, visit_order
from gradstore.stages.learn.choice import hold_out
from gradstore.stages.show_weights import render_candidates, show_weights, write_weights
from gradstore.stages.transfer import transfer
from gradstore.store.artifacts import WeightsArtifact
from tests import contributing, oracle
from tests.contributing import ROWS, make_spec, make_store, stored_c
from tests.learning import LEARN, learned, weights_of

GRID: dict[str, Any] = {"k": [2, 5], "weight_decay": [0.0, 3.0], "restarts": 2, "held_out": 0.4}


def test_the_grid_is_learned_and_chosen_from_as_the_oracle_does(capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(invalid=(2, 9))
    contributing.run(make_spec(store))

    artifact = learned(store, "chosen", **GRID)

    table = artifact.read_candidates()
    assert table is not None
    facts = artifact.log.require(0, "not written").facts
    c = np.delete(stored_c(store, "learn"), (2, 9), axis=1)
    held_out = facts["held_out"]
    rest = [query for query in range(ROWS["learn"]) if query not in held_out]
    assert len(held_out) == 2
    settings = [(k, decay, seed) for k in GRID["k"] for decay in GRID["weight_decay"] for seed in (0, 1)]
    uniform = np.full(4, 0.25)
    gains = []
    for row, (k, decay, seed) in zip(table.to_pylist(), settings, strict=True):
        visits = visit_order(len(rest), LearnerSettings(k=k, epochs=4, tile=len(rest), seed=seed))
        raw = initial_raw_weights(4, seed=seed)
        weights, _ = oracle.learn(c[rest], raw, visits, k=k, learning_rate=0.3, weight_decay=decay)
        assert (row["k"], row["weight_decay"], row["seed"]) == (k, decay, seed)
        np.testing.assert_allclose(row["weights"], weights, rtol=1e-5)
        ratios = [oracle.judged(c, weights, j, held_out) / oracle.judged(c, uniform, j, held_out) for j in (2, 5)]
        gains.append(np.mean(ratios))
    np.testing.assert_allclose(table["gain"].to_numpy(), gains, rtol=1e-5)
    assert np.ptp(gains) > 0.01
    chosen = int(np.argmax(gains))
    assert np.flatnonzero(table["chosen"].to_numpy()).tolist() == [chosen]
    np.testing.assert_array_equal(artifact.read()["weight"].to_numpy(), table["weights"].to_pylist()[chosen])
    assert {*artifact.read_trajectory()["query"].to_pylist()} == {*rest}
    k, decay, seed = settings[chosen]
    assert f"of 8 candidates k = {k}, weight_decay = {decay:g}, seed = {seed} was taken" in capsys.readouterr().err


def test_all_candidates_are_certified_in_the_same_reads() -> None:
    store = make_store()
    contributing.run(make_spec(store))

    _, facts = weights_of(store, "chosen", **GRID)

    assert facts["method"] == "certified"
    assert facts["reads_in_all"] <= 5


def test_of_equals_the_first_is_taken() -> None:
    store = make_store()
    contributing.run(make_spec(store))

    # One step of a rate that float64 hardly sees: no decay makes a difference.
    table = learned(store, "chosen", weight_decay=[0.2, 0.1], epochs=1, learning_rate=1e-300, held_out=0.5)

    candidates = table.read_candidates()
    assert candidates is not None
    assert candidates["gain"].to_pylist()[0] == candidates["gain"].to_pylist()[1]
    assert candidates["chosen"].to_pylist() == [True, False]


def test_one_candidate_may_be_judged_too() -> None:
    store = make_store()
    contributing.run(make_spec(store))

    artifact = learned(store, "judged", held_out=0.2)

    candidates = artifact.read_candidates()
    assert candidates is not None
    assert candidates["chosen"].to_pylist() == [True]
    assert len(artifact.log.require(0, "not written").facts["held_out"]) == 1
    assert learned(store, "plain").read_candidates() is None


def test_a_share_of_the_valid_queries_is_held_out_and_one_is_left() -> None:
    valid = np.array([0, 2, 3, 5, 8])

    assert hold_out(valid, 0.0, 1).tolist() == []
    for share, count in ((0.01, 1), (0.4, 2), (0.99, 4)):
        found = hold_out(valid, share, 1)
        assert len(found) == count
        assert {*found.tolist()} < {*valid.tolist()}
        np.testing.assert_array_equal(found, hold_out(valid, share, 1))
    assert len({tuple(hold_out(valid, 0.4, seed).tolist()) for seed in range(20)}) > 3
    with pytest.raises(DataError, match=r"learn\.held_out: found 0\.2 of 1 valid learn queries"):
        hold_out(valid[:1], 0.2, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, r"learn\.k: found 0; accepted: a number of at least 1, or a list of different ones"),
        ({"k": []}, r"learn\.k: found \[\]; accepted"),
        ({"k": [3, 3]}, r"learn\.k: found \[3, 3\]; accepted"),
        ({"k": [3, -1]}, r"learn\.k: found \[3, -1\]; accepted"),
        (
            {"weight_decay": [0.1, -0.1]},
            r"learn\.weight_decay: found \[0\.1, -0\.1\]; accepted: a number of at least 0",
        ),
        ({"k": [2, 3], "held_out": 0.0}, r"learn\.held_out: found 0 with 2 candidates"),
        ({"restarts": 3, "held_out": 0.0}, r"learn\.held_out: found 0 with 3 candidates"),
    ],
)
def test_a_grid_that_is_none_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_spec(make_store(), learn=settings)


def test_the_largest_k_counts_valid_rows() -> None:
    store = make_store(invalid=range(6, 23))
    contributing.run(make_spec(store))

    with pytest.raises(SpecError, match=r"learn\.k: found 7; accepted: at most the 6 train examples that are valid"):
        weights_of(store, "learned", k=[2, 7])
    assert WeightsArtifact.find_named(store.storage, "learned") is None


def test_weights_of_another_grid_are_other_weights() -> None:
    store = make_store()
    contributing.run(make_spec(store))
    learned(store, "chosen", k=[2, 3])

    learned(store, "chosen", k=[2, 3], held_out=0.2)
    others: list[dict[str, Any]] = [
        {"k": [2, 4]},
        {"k": 2},
        {"k": [2, 3], "held_out": 0.4},
        {"k": [2, 3], "restarts": 2},
    ]
    for other in others:
        with pytest.raises(ContractError, match="weights/chosen was made with other settings"):
            learned(store, "chosen", **other)


def test_candidates_stay_behind_when_weights_go_to_another_store() -> None:
    store, other = make_store(), make_store()
    contributing.run(make_spec(store))
    learned(store, "chosen", **GRID)

    transfer(store.storage.url, "chosen", other.storage.url, "taken")

    taken = WeightsArtifact.open(other.storage, "taken")
    assert taken.read_candidates() is None
    assert taken.is_complete()
    assert taken.settings["learner"]["k"] == GRID["k"]


def test_settings_that_are_left_out_are_no_other_settings() -> None:
    store = make_store()
    contributing.run(make_spec(store))

    assert {*learned(store, "plain").settings["learner"]} == {
        *("k", "weight_decay", "epochs", "learning_rate", "seed", "objective", "tile", "transform")
    }
    given: dict[str, Any] = {"solver": "algorithm_1", "start": "random", "restarts": 1, "held_out": 0.0, "noise": 0.0}
    learned(store, "plain", **given)
    assert LEARN["k"] == 3


def test_candidates_are_shown_with_what_was_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store()
    contributing.run(make_spec(store))
    learned(store, "chosen", k=[2, 5], held_out=0.2)
    learned(store, "plain")

    found = show_weights(store.storage.url, [], "group")

    by_name = {item["name"]: item["candidates"] for item in found["weights"]}
    assert by_name["plain"] == []
    assert [row["k"] for row in by_name["chosen"]] == [2, 5]
    assert sum(row["chosen"] for row in by_name["chosen"]) == 1
    draw(*render_candidates(found))
    told = capsys.readouterr().out
    assert "weights chosen were chosen from" in told
    assert all(f"{row['gain']:.4f}" in told for row in by_name["chosen"])
    write_weights(store.storage.url, [], "group", tmp_path / "weights.json")
    assert json.loads((tmp_path / "weights.json").read_text(encoding="utf-8")) == found
