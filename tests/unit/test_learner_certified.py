"""The certified learner says what it took, what it could not do, and refuses what the streamed learner refuses."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from gradstore.errors import DataError, SpecError
from gradstore.numerics.learner import (
    Certification,
    CertifiedWeights,
    KeptRows,
    LearnedWeights,
    LearnerSettings,
    initial_raw_weights,
    learn_certified,
    learn_weights,
)
from gradstore.numerics.learner.trajectory import Trajectory, run_visits
from gradstore.numerics.moments import Candidates, SecondMoments, kept_rows
from tests.tensors import contributions, keep, moments, reader

PLENTY = 2**40


def certify(c: np.ndarray, *settings: LearnerSettings, kept: KeptRows | None = None) -> Certification[CertifiedWeights]:
    return learn_certified(moments(c), kept or keep(c, []), reader(c), settings=settings, limit_bytes=PLENTY)


def streamed(c: np.ndarray, settings: LearnerSettings) -> LearnedWeights:
    return learn_weights(lambda query: [c[query]], num_queries=len(c), num_groups=c.shape[2], settings=settings)


def test_moments_and_candidates_of_contribute_give_the_streamed_weights_to_float32() -> None:
    c, settings = contributions(num_rows=3000), LearnerSettings(k=10)
    second_moments = SecondMoments(num_queries=6, num_groups=5)
    w = np.exp(initial_raw_weights(5, seed=0))
    candidates = Candidates(num_queries=6, kept=kept_rows(10), weights_M=w / w.sum(), transform="none")
    second_moments.add(0, c)
    candidates.offer(0, c, np.arange(3000))
    kept = KeptRows(list(candidates.rows_QK), list(candidates.c_QKM), num_groups=5)

    outcome = learn_certified(second_moments.total_QMM, kept, reader(c), settings=[settings], limit_bytes=PLENTY)

    found = outcome.certified[0]
    np.testing.assert_allclose(found.learned.weights, streamed(c, settings).weights, rtol=1e-5)
    assert found.certificate.reads <= 2
    assert found.certificate.norm_error < 1e-5


def test_a_certificate_tells_reads_and_kept_rows() -> None:
    c, settings = contributions(), LearnerSettings(k=4, learning_rate=0.1)
    kept = keep(c, [])

    certificate = certify(c, settings, kept=kept).certified[0].certificate

    assert certificate.reads == len(certificate.added) > 1
    assert certificate.added[-1] == 0
    assert certificate.added[0] >= 6 * 4
    assert sum(certificate.added) == sum(len(kept.rows(query)) for query in range(6))
    assert certificate.kept_rows == max(len(kept.rows(query)) for query in range(6))
    assert certificate.kept_bytes == sum(certificate.added) * (8 + 5 * 4)
    assert certificate.ties == 0


def test_rows_that_were_found_once_are_enough_the_next_time() -> None:
    c, settings = contributions(), LearnerSettings(k=4, learning_rate=0.1)
    kept = keep(c, [])
    first = certify(c, settings, kept=kept).certified[0]

    again = certify(c, settings, kept=kept).certified[0]

    assert again.certificate.added == (0,)
    np.testing.assert_allclose(again.learned.weights, first.learned.weights, rtol=1e-14)


def test_a_setting_is_certified_by_the_read_that_finds_all_its_visits_right() -> None:
    c = contributions(num_rows=600)
    easy, hard = LearnerSettings(k=1, epochs=1, learning_rate=1e-9), LearnerSettings(k=7, learning_rate=0.3)

    outcome = certify(c, hard, easy)

    reads = [outcome.certified[place].certificate.reads for place in (0, 1)]
    assert reads[1] == 2 < reads[0]
    for place, settings in ((0, hard), (1, easy)):
        np.testing.assert_allclose(outcome.certified[place].learned.weights, streamed(c, settings).weights, rtol=1e-12)


def test_a_replay_of_settled_visits_gives_the_same_bits_whatever_rows_came_and_whatever_runs_beside() -> None:
    c, kept = contributions(num_groups=37), keep(contributions(num_groups=37), [0, 1, 2])
    settings = [LearnerSettings(k=k, learning_rate=0.1, epochs=3) for k in (3, 2, 5)]
    first, *others = (Trajectory(each, num_queries=6, num_groups=37) for each in settings)
    run_visits([first, *others], moments(c), kept)
    weights, losses = first.weights_TM.copy(), first.losses_T.copy()
    for query in range(6):
        kept.add(query, np.arange(60), c[query])
    first.settled = 11

    run_visits([first], moments(c), kept)

    np.testing.assert_array_equal(first.weights_TM[:12], weights[:12])
    np.testing.assert_array_equal(first.losses_T[:11], losses[:11])
    assert (first.weights_TM[12:] != weights[12:]).any()


def test_queries_whose_visits_are_all_settled_need_nothing_more() -> None:
    c, settings = contributions(num_queries=8), LearnerSettings(k=6, epochs=1, learning_rate=0.3)

    found = certify(c, settings).certified[0]

    assert found.certificate.reads > 2
    np.testing.assert_allclose(found.learned.weights, streamed(c, settings).weights, rtol=1e-12)


def test_of_rows_that_tie_at_the_kth_place_any_may_be_taken_and_the_visits_are_counted() -> None:
    c = contributions(num_queries=2)
    c[0, 20:30] = c[0].max(0) + 1  # ten copies of a row that is best at any weights
    settings = LearnerSettings(k=4, epochs=3)

    for rows in ([], [25, 26, 27, 28], list(range(60))):
        found = certify(c, settings, kept=keep(c, rows)).certified[0]
        np.testing.assert_allclose(found.learned.weights, streamed(c, settings).weights, rtol=1e-12)
        assert found.certificate.ties == 3


def test_a_query_of_zero_norm_takes_no_step_and_keeps_no_rows() -> None:
    c, settings, kept = contributions(), LearnerSettings(k=3, epochs=3), keep(contributions(), [])
    c[2] = 0

    found = certify(c, settings, kept=kept).certified[0].learned

    np.testing.assert_allclose(found.losses, streamed(c, settings).losses, rtol=1e-11)
    assert np.isnan(found.losses).sum() == 3
    assert len(kept.rows(2)) == 0


def test_past_the_limit_the_settings_that_are_left_are_named_and_the_others_certified() -> None:
    c = contributions(num_rows=600)
    kept = keep(c, [])
    settings = [LearnerSettings(k=2, epochs=1, learning_rate=1e-9), LearnerSettings(k=50, epochs=5, learning_rate=0.3)]
    limit = 6 * 55 * (8 + 5 * 4)

    outcome = learn_certified(moments(c), kept, reader(c), settings=settings, limit_bytes=limit)

    assert list(outcome.certified) == [0]
    np.testing.assert_allclose(outcome.certified[0].learned.weights, streamed(c, settings[0]).weights, rtol=1e-12)
    assert outcome.uncertified[1] == (
        f"it needs more rows than {limit} bytes hold, which is the limit of kept rows; 2 reads were made"
    )
    assert kept.num_bytes <= limit


def test_a_first_guess_past_the_limit_is_not_read_for() -> None:
    c = contributions()

    outcome = learn_certified(moments(c), keep(c, [0]), reader(c), settings=[LearnerSettings(k=1)], limit_bytes=100)

    assert outcome.certified == {}
    assert "100 bytes" in outcome.uncertified[0]
    assert "0 reads were made" in outcome.uncertified[0]


@pytest.mark.parametrize("wrong", ["other rows", "zeros"])
def test_second_moments_of_other_contributions_certify_nothing(wrong: str) -> None:
    c = contributions()
    second_moments = moments(c)
    second_moments[3] = 0 if wrong == "zeros" else moments(c[3:4, :50])[0]

    outcome = learn_certified(
        second_moments, keep(c, []), reader(c), settings=[LearnerSettings(k=2)], limit_bytes=PLENTY
    )

    assert outcome.certified == {}
    assert "||S|| by the second moments A_q differs from that of the scores" in outcome.uncertified[0]


@pytest.mark.parametrize("kept", [[], list(range(20, 40))])
def test_pairs_take_a_read_for_rows_that_are_not_kept_and_one_that_verifies(kept: list[int]) -> None:
    c, settings = contributions(), [LearnerSettings(objective="pairs", epochs=epochs) for epochs in (3, 1)]
    positives = [np.array([20, 33, 20 + query]) for query in range(6)]
    positives[3] = np.array([], np.int64)

    rows = keep(c, kept)
    outcome = learn_certified(moments(c), rows, reader(c), settings=settings, limit_bytes=PLENTY, positives=positives)

    for place, each in enumerate(settings):
        found = outcome.certified[place]
        expected = learn_weights(
            lambda query: [c[query]], num_queries=6, num_groups=5, settings=each, positives=positives
        )
        np.testing.assert_allclose(found.learned.weights, expected.weights, rtol=1e-12)
        np.testing.assert_allclose(found.learned.losses, expected.losses, rtol=1e-12)
        assert found.certificate.added == ((0,) if kept else (2 + 3 + 3 + 3 + 3, 0))


def test_pairs_past_the_limit_are_not_read_for() -> None:
    c, settings, positives = contributions(), LearnerSettings(objective="pairs"), [np.arange(20)] * 6

    outcome = learn_certified(
        moments(c), keep(c, []), reader(c), settings=[settings], limit_bytes=3000, positives=positives
    )

    assert outcome.uncertified == {
        0: "it needs more rows than 3000 bytes hold, which is the limit of kept rows; 0 reads were made"
    }


def test_pairs_of_rows_that_are_not_read_or_not_finite_are_refused() -> None:
    c, settings = contributions(), [LearnerSettings(objective="pairs")]
    with pytest.raises(SpecError, match=r"learn\.pairs: row 60, a positive of query 0, is not among the training rows"):
        learn_certified(
            moments(c), keep(c, []), reader(c), settings=settings, limit_bytes=PLENTY, positives=[np.array([5, 60])] * 6
        )
    c[4, 23, 2] = np.inf
    for row in (5, 23):
        with pytest.raises(DataError, match="contributions of query 4: training row 23 of group 2 is inf"):
            learn_certified(
                moments(np.nan_to_num(c, posinf=1)),
                keep(c, []),
                reader(c),
                settings=settings,
                limit_bytes=PLENTY,
                positives=[np.array([row])] * 6,
            )


def test_contributions_that_are_not_finite_are_refused_by_row_and_group() -> None:
    c = contributions()
    bad = c.copy()
    bad[4, 23, 2] = np.nan

    for second_moments in (moments(c), moments(bad)):
        with pytest.raises(DataError, match="contributions of query 4: training row 23 of group 2 is nan"):
            learn_certified(second_moments, keep(c, []), reader(bad), settings=[LearnerSettings()], limit_bytes=PLENTY)


def test_second_moments_that_are_not_finite_though_c_is_are_refused() -> None:
    c = contributions()

    with pytest.raises(DataError, match="second moments or kept rows hold NaN or infinite values, though the contr"):
        learn_certified(np.inf * moments(c), keep(c, []), reader(c), settings=[LearnerSettings()], limit_bytes=PLENTY)


def test_k_above_the_number_of_rows_is_refused() -> None:
    with pytest.raises(SpecError, match=r"learn\.k: found 61; accepted: 1 to 60, the number of training examples"):
        certify(contributions(), LearnerSettings(k=3), LearnerSettings(k=61))


def test_an_empty_query_set_is_refused() -> None:
    with pytest.raises(SpecError, match=r"data\.learn: found 0 queries"):
        certify(contributions(num_queries=0), LearnerSettings())


def test_kept_rows_are_in_order_and_each_is_held_once() -> None:
    c = contributions(num_queries=1)[0]
    kept = KeptRows([np.array([9, -1, 3, 9])], [c[[9, 0, 3, 9]]], num_groups=5)

    kept.add(0, np.array([4, 3]), c[[4, 3]])

    assert kept.rows(0).tolist() == [3, 4, 9]
    np.testing.assert_array_equal(kept.c(0), c[[3, 4, 9]])
    assert kept.holds(0, np.array([0, 3, 5, 9, 80])).tolist() == [False, True, False, True, False]
    assert kept.num_bytes == 3 * (8 + 5 * 4)


def test_memory_beside_the_kept_rows_does_not_grow_with_rows() -> None:
    settings = [LearnerSettings(k=20, weight_decay=decay, epochs=4) for decay in np.linspace(0, 1, 20).tolist()]
    peaks = []
    for num_rows in (10_000, 40_000):
        c = np.random.default_rng(0).standard_normal((1, num_rows, 32)).astype(np.float32)
        kept, second_moments = keep(c, []), moments(c)
        tracemalloc.start()
        learn_certified(second_moments, kept, reader(c, rows=num_rows), settings=settings, limit_bytes=PLENTY)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert max(peaks) < 32 * 2**20
    assert peaks[1] < peaks[0] + 2 * 2**20
