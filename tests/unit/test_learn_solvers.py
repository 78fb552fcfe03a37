"""learn: the full-batch solver and the formula, where solvers begin, and contributions with noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gradstore.errors import ContractError, ResourceError, SpecError
from gradstore.numerics.learner import LearnerSettings, initial_raw_weights, visit_order, with_noise
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.features import FeatureStore
from tests import contributing, oracle
from tests.contributing import ROWS, make_spec, make_store, stored_c
from tests.learning import learned, weights_of

INVALID = (2, 9)


@pytest.fixture(scope="module")
def store() -> FeatureStore:
    made = make_store(invalid=INVALID)
    contributing.run(make_spec(made))
    return made


def valid_c(store: FeatureStore) -> np.ndarray:
    return np.delete(stored_c(store, "learn"), INVALID, axis=1)


def steps_from(c: np.ndarray, start: np.ndarray, **changes: Any) -> np.ndarray:
    """Algorithm 1 by the oracle, from given weights."""
    raw = np.log(start) - np.log(start).mean()
    visits = visit_order(len(c), LearnerSettings(k=3, epochs=4, tile=len(c)))
    asked = {"k": 3, "learning_rate": 0.3, "weight_decay": 0.1, **changes}
    return oracle.learn(c, raw, visits, **asked)[0]


def test_the_closed_form_is_the_oracles_from_one_read(store: FeatureStore) -> None:
    weights, facts = weights_of(store, "formula", solver="closed_form")

    np.testing.assert_allclose(weights, oracle.closed_form(valid_c(store), 3), rtol=1e-5)
    assert (facts["method"], facts["reads_in_all"]) == ("closed_form", 1)
    assert np.ptp(weights) > 0.05


def test_among_formulas_of_several_k_held_out_queries_choose(store: FeatureStore) -> None:
    artifact = learned(store, "formulas", solver="closed_form", k=[1, 4], held_out=0.2)

    table = artifact.read_candidates()
    assert table is not None
    held_out = artifact.log.require(0, "not written").facts["held_out"]
    c = np.delete(valid_c(store), held_out, axis=0)
    for k, weights in zip((1, 4), table["weights"].to_pylist(), strict=True):
        np.testing.assert_allclose(weights, oracle.closed_form(c, k), rtol=1e-5)
    assert len(artifact.read_trajectory()) == 0


@pytest.mark.parametrize("start", ["uniform", "closed_form"])
def test_algorithm_1_begins_where_it_is_told(store: FeatureStore, start: str) -> None:
    found, facts = weights_of(store, f"from-{start}", start=start)

    c = valid_c(store)
    begun = np.full(4, 0.25) if start == "uniform" else oracle.closed_form(c, 3)
    begun = np.maximum(begun / begun.mean(), 1e-3)
    np.testing.assert_allclose(found, steps_from(c, begun), rtol=1e-4)
    assert facts["method"] == "certified"
    assert facts["reads_in_all"] == facts["reads"] + (start == "closed_form")


def test_a_formula_is_where_streaming_begins_too(store: FeatureStore) -> None:
    found, facts = weights_of(store, "streamed-from", start="closed_form", method="streamed")

    np.testing.assert_allclose(found, weights_of(store, "from-formula", start="closed_form")[0], rtol=1e-5)
    assert facts["method"] == "streamed"


@pytest.mark.parametrize("objective", ["top", "unnormalized"])
def test_the_full_batch_solver_ends_where_the_oracles_loss_is_least(store: FeatureStore, objective: str) -> None:
    name = f"full-batch-{objective}"
    weights, facts = weights_of(store, name, solver="full_batch", objective=objective)

    c, raw = valid_c(store), np.log(weights)

    def loss(at: np.ndarray) -> float:
        return oracle.full_batch(c, at, 3, 0.1, objective=objective)

    draw = np.random.default_rng(0)
    assert facts["converged"]
    assert facts["iterations"] > 0
    assert all(loss(raw + 1e-2 * draw.standard_normal(4)) > loss(raw) - 1e-9 for _ in range(20))
    assert loss(raw) < loss(np.zeros(4)) - 1e-3
    np.testing.assert_array_equal(
        weights, weights_of(store, f"{name}-again", solver="full_batch", objective=objective)[0]
    )


def test_full_batch_restarts_begin_at_random_weights(store: FeatureStore) -> None:
    artifact = learned(store, "restarts", solver="full_batch", start="random", restarts=2, held_out=0.2)

    table = artifact.read_candidates()
    assert table is not None
    assert table["seed"].to_pylist() == [0, 1]
    first, second = table["weights"].to_pylist()
    np.testing.assert_allclose(first, second, rtol=1e-3)


@pytest.mark.parametrize("settings", [{"solver": "full_batch"}, {"solver": "closed_form"}, {"start": "closed_form"}])
def test_solvers_that_need_rows_say_so_where_these_do_not_fit(store: FeatureStore, settings: dict[str, Any]) -> None:
    with pytest.raises(ResourceError, match=r"learn\.memory: .*Raise it, or lower learn\.k"):
        weights_of(store, "too-large", memory="100B", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"solver": "full_batch", "objective": "gap"},
            r"learn\.objective: found 'gap' with solver = \"full_batch\": accepted",
        ),
        ({"solver": "full_batch", "method": "streamed"}, r"learn\.method: found 'streamed' with solver"),
        (
            {"solver": "full_batch", "restarts": 2},
            r'learn\.restarts: found 2 with solver = "full_batch": set start = "random"',
        ),
        ({"solver": "closed_form", "objective": "bottom"}, r"learn\.objective: found 'bottom' with solver"),
        ({"solver": "closed_form", "start": "uniform"}, r"learn\.start: found 'uniform' with solver"),
        ({"solver": "closed_form", "restarts": 2}, r"learn\.restarts: found 2 with solver"),
        (
            {"solver": "closed_form", "weight_decay": [0.1, 0.2]},
            r"learn\.weight_decay: found \[0\.1, 0\.2\] with solver",
        ),
    ],
)
def test_what_a_solver_has_no_use_for_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_spec(make_store(), learn=settings)


def test_another_solver_makes_other_weights_and_settings_that_it_does_not_read_change_nothing() -> None:
    made = make_store()
    contributing.run(make_spec(made))
    learned(made, "learned", solver="full_batch")

    learned(made, "learned", solver="full_batch", epochs=7, seed=5)
    others: list[dict[str, Any]] = [{}, {"solver": "closed_form"}, {"solver": "full_batch", "start": "random"}]
    for other in others:
        with pytest.raises(ContractError, match="weights/learned was made with other settings"):
            learned(made, "learned", **other)


@pytest.mark.parametrize("method", ["certified", "streamed"])
def test_noise_is_that_of_every_group_in_each_read(store: FeatureStore, method: str) -> None:
    found, facts = weights_of(store, f"noisy-{method}", noise=0.5, method=method)

    c, rows = valid_c(store), np.delete(np.arange(ROWS["train"]), INVALID)
    deviation = 0.5 * c.astype(np.float64).std((0, 1))
    noisy = np.stack([with_noise(c_NM, deviation, query=q, rows_N=rows, seed=0) for q, c_NM in enumerate(c)])
    begun = WeightsArtifact.open(store.storage, f"noisy-{method}")
    assert begun.settings["learner"]["noise"] == 0.5
    visits = visit_order(len(c), LearnerSettings(k=3, epochs=4, tile=len(c)))
    expected, _ = oracle.learn(noisy, initial_raw_weights(4, seed=0), visits, k=3, learning_rate=0.3, weight_decay=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not np.allclose(found, weights_of(store, "plain")[0], rtol=1e-2)
    assert facts["method"] == method
    # Deviations and, to certify, a first guess of noisy contributions.
    assert facts["reads_in_all"] == facts["reads"] + (2 if method == "certified" else 1)


def test_noise_is_the_same_where_queries_are_held_out(store: FeatureStore) -> None:
    artifact = learned(store, "noisy-held-out", noise=0.5, held_out=0.2)

    held_out = artifact.log.require(0, "not written").facts["held_out"]
    c, rows = valid_c(store), np.delete(np.arange(ROWS["train"]), INVALID)
    rest = np.delete(np.arange(len(c)), held_out)
    deviation = 0.5 * c[rest].astype(np.float64).std((0, 1))
    noisy = np.stack([with_noise(c[q], deviation, query=int(q), rows_N=rows, seed=0) for q in rest])
    visits = visit_order(len(rest), LearnerSettings(k=3, epochs=4, tile=len(rest)))
    expected, _ = oracle.learn(noisy, initial_raw_weights(4, seed=0), visits, k=3, learning_rate=0.3, weight_decay=0.1)
    np.testing.assert_allclose(artifact.read()["weight"].to_numpy(), expected, rtol=1e-4)
