"""learn: weights of stores in memory are certified in a few reads of C, or streamed where that cannot be, which is said."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from gradstore.errors import DataError, SpecError
from gradstore.numerics.learner import ENDS
from gradstore.plan import sizes
from gradstore.plan.combinations import LOWEST_OBJECTIVES
from gradstore.spec.learning import LearnSection
from gradstore.store.artifacts import WeightsArtifact
from tests import contributing
from tests.contributing import make_spec, make_store
from tests.learning import LEARN, weights_of


@pytest.mark.parametrize("invalid", [(), (2, 9)], ids=["all rows", "rows that are not valid"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_certified_weights_are_those_of_streaming_c(
    dtype: str, invalid: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    store, tables = make_store(invalid=invalid), {"contribute": {"dtype": dtype}}
    contributing.run(make_spec(store, **tables))

    certified, facts = weights_of(store, "certified", tables)
    streamed, other = weights_of(store, "streamed", tables, method="streamed")

    np.testing.assert_allclose(certified, streamed, rtol=1e-5)
    assert np.ptp(certified) > 0.05
    assert (facts["method"], other["method"], other["reads"]) == ("certified", "streamed", 4)
    assert 1 <= facts["reads"] <= 4
    assert facts["added"][-1] == 0
    assert facts["kept_rows"] >= 3
    assert facts["norm_error"] < 1e-5
    assert f"certified by {facts['reads']} reads of C" in capsys.readouterr().err


def test_c_is_verified_in_whole_tiles_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store()
    contributing.run(make_spec(store))
    whole, _ = weights_of(store, "whole")

    monkeypatch.setattr(sizes, "LEARNER_BUFFER_BYTES", 2 * 4 * 8 * len(contributing.GROUPS))
    monkeypatch.setattr(
        "gradstore.stages.contributions.verified_queries", lambda of, rows, tile: sizes.verified_queries(of, rows, 1)
    )

    assert sizes.verified_queries((5, 4), 8, 1) == 2
    np.testing.assert_array_equal(weights_of(store, "in-parts")[0], whole)


@pytest.mark.parametrize(
    ("tables", "settings", "message"),
    [
        (
            {},
            {"memory": "100B"},
            "moments/block/learn has 960 B of rows to begin with in every span, more than learn.memory",
        ),
        ({}, {"memory": "1000B"}, "needs more rows than 1000 bytes hold"),
        ({}, {"objective": "gap"}, "its objective 'gap' asks for the lowest scores too"),
        ({}, {"objective": "bottom"}, "its objective 'bottom' asks for the lowest scores too"),
    ],
    ids=["no room", "little room", "gap", "bottom"],
)
def test_weights_that_cannot_be_certified_are_streamed_and_that_is_said(
    tables: dict[str, dict[str, Any]], settings: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store()
    contributing.run(make_spec(store, **tables))

    found, facts = weights_of(store, "learned", tables, **settings)

    assert facts["method"] == "streamed"
    said = capsys.readouterr().err
    assert f"weights are not certified but streamed, in {LEARN['epochs']} reads of C" in said
    assert message in said
    np.testing.assert_array_equal(found, weights_of(store, "streamed", tables, **settings, method="streamed")[0])


def test_without_second_moments_one_read_more_makes_them() -> None:
    store, tables = make_store(invalid=(2, 9)), {"contribute": {"second_moments": False}}
    contributing.run(make_spec(store, **tables))

    certified, facts = weights_of(store, "certified", tables)

    np.testing.assert_allclose(certified, weights_of(store, "streamed", tables, method="streamed")[0], rtol=1e-5)
    assert facts["method"] == "certified"
    assert facts["reads_in_all"] == facts["reads"] + 1


def test_second_moments_and_rows_that_do_not_fit_are_not_made(capsys: pytest.CaptureFixture[str]) -> None:
    store, tables = make_store(), {"contribute": {"second_moments": False}}
    contributing.run(make_spec(store, **tables))

    # Twice 18 rows of 5 queries, 24 bytes each, and 5 matrices of 16 numbers take 4,960 bytes.
    _, facts = weights_of(store, "streamed", tables, memory="4959B")
    said = capsys.readouterr().err
    _, other = weights_of(store, "certified", tables, memory="4960B")

    assert "rows to begin with and A_q take 4.96 kB, more than learn.memory" in said
    assert (facts["method"], other["method"]) == ("streamed", "certified")


def test_objectives_that_need_the_lowest_scores_are_those_that_the_plan_knows() -> None:
    assert {objective for objective, ends in ENDS.items() if -1 in ends} == {*LOWEST_OBJECTIVES}
    assert set(ENDS) == set(get_args(LearnSection.model_fields["objective"].annotation))


def test_k_counts_valid_rows_before_anything_is_written() -> None:
    store = make_store(invalid=range(6, 23))
    contributing.run(make_spec(store))

    with pytest.raises(SpecError, match=r"learn\.k: found 10; accepted: at most the 6 train examples that are valid"):
        weights_of(store, "learned", k=10)
    assert WeightsArtifact.find_named(store.storage, "learned") is None
    assert weights_of(store, "learned", k=6)[0].sum() == pytest.approx(1)


def test_memory_is_a_size() -> None:
    with pytest.raises(SpecError, match=r"learn\.memory: found 'much'; accepted: a size such as"):
        make_spec(make_store(), learn={"memory": "much"})


def test_without_a_valid_query_there_is_nothing_to_learn_from() -> None:
    store = make_store(invalid_queries=range(5))
    contributing.run(make_spec(store))

    with pytest.raises(DataError, match=r"features/learn: no query has valid features, .* See data\.learn"):
        weights_of(store, "learned")
    assert WeightsArtifact.find_named(store.storage, "learned") is None


def test_queries_that_are_not_valid_are_never_held_out() -> None:
    store = make_store(invalid_queries=(0, 2, 3))
    contributing.run(make_spec(store))

    for seed in range(5):
        _, facts = weights_of(store, f"seed-{seed}", held_out=0.9, seed=seed)
        assert facts["held_out"] in ([1], [4])
