"""The screen lets through every row that reaches a score, whatever the magnitudes, and few others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from gradstore.numerics.learner.kept import top_rows
from gradstore.numerics.learner.screen import Screen
from gradstore.numerics.learner.trajectory import TIE

ROWS = 300


def softmax(raw: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(raw) / np.exp(raw).sum(-1, keepdims=True))


def cancelling(c: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    signs = np.where(np.arange(c.shape[1]) % 2, 1, -1)
    return np.asarray(1e4 * np.abs(c) * signs + 1e-3 * draw.standard_normal(c.shape))


def one_outlier(c: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.where(np.arange(ROWS)[:, None] == 7, 1e20 * c, c)


# What becomes of normal numbers [N, M].
MAGNITUDES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "normal": lambda c, draw: c,
    "cancelling": cancelling,
    "near equal": lambda c, draw: 1 + 1e-7 * c,
    "huge": lambda c, draw: c * 1e37 / np.abs(c).max(),
    "small": lambda c, draw: c * 1e-33,
    "tiny": lambda c, draw: c * 1e-37,
    "below normal": lambda c, draw: c * 1e-42,
    "columns of all scales": lambda c, draw: c * 10.0 ** draw.integers(-30, 30, c.shape[1]),
    "rows of all scales": lambda c, draw: c * 10.0 ** draw.integers(-30, 30, (ROWS, 1)),
    "one outlier": one_outlier,
}


def adversarial(kind: str, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """C [N, M] and w [3, M] whose scores are hard for float32."""
    draw = np.random.default_rng(groups)
    c, raw = draw.standard_normal((ROWS, groups)), draw.standard_normal((3, groups))
    if kind == "weights that vanish":
        raw = raw * 120
        c = c * np.exp(np.minimum(-raw[0] + raw[0].max(), 80))
    elif kind == "weights below normal":
        c, raw = 1e36 * c, raw - 98
        c[:, 0], c[0, 0], raw[:, 0] = 0, 1, 0
    else:
        c = MAGNITUDES[kind](c, draw)
    return c.astype(np.float32), softmax(raw)


def exact(c: np.ndarray, w: np.ndarray) -> np.ndarray:
    """C w with 64 bits of precision at least, [N, V]."""
    return np.asarray(np.einsum("nm,vm->nv", c.astype(np.longdouble), w.astype(np.longdouble)))


def screen_of(c: np.ndarray, w: np.ndarray, square: bool) -> Screen:
    return Screen(
        w,
        norms_V=np.sqrt((exact(c, w) ** 2).sum(0)).astype(np.float64),
        group_norms_M=np.sqrt((c.astype(np.longdouble) ** 2).sum(0)).astype(np.float64),
        square_V=np.full(len(w), square),
    )


def passed(screen: Screen, c: np.ndarray) -> np.ndarray:
    score = screen.scores(c)
    near = screen.near(score)
    return np.asarray(near[screen.nearer(score[near], c[near])])


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 17, 224, 1000])
@pytest.mark.parametrize("kind", [*MAGNITUDES, "weights that vanish", "weights below normal"])
def test_no_row_that_reaches_a_score_is_lost(kind: str, groups: int, square: bool) -> None:
    c, w = adversarial(kind, groups)
    screen = screen_of(c, w, square)
    placing = np.abs(exact(c, w)) if square else exact(c, w)
    slack = TIE * np.abs(exact(np.abs(c), w))

    for rank in (0, 5, 100, ROWS - 1):
        least = np.sort(placing, axis=0)[::-1][rank].astype(np.float64)
        screen.require(least)
        reached = np.flatnonzero((placing >= least - slack).any(1))
        assert set(reached) <= set(passed(screen, c))
    assert screen.is_finite()


@pytest.mark.parametrize("kind", ["normal", "cancelling", "huge", "small", "rows of all scales", "one outlier"])
def test_few_other_rows_are_let_through(kind: str) -> None:
    c, w = adversarial(kind, 224)
    w = w[:1]
    screen = screen_of(c, w, square=False)
    placing = exact(c, w)[:, 0]

    screen.require(np.sort(placing)[::-1][[5]].astype(np.float64))

    assert len(passed(screen, c)) <= 6 + 0.05 * ROWS


def test_the_first_margin_alone_keeps_most_rows_out() -> None:
    draw = np.random.default_rng(0)
    c, w = draw.standard_normal((20_000, 224)).astype(np.float32), softmax(0.01 * draw.standard_normal((10, 224)))
    screen = screen_of(c, w, square=False)

    screen.require(np.sort(exact(c, w), axis=0)[-100].astype(np.float64))

    assert len(screen.near(screen.scores(c))) < 400


def test_norms_of_the_scores_are_compared_with_those_given() -> None:
    c, w = adversarial("normal", 5)
    norms = np.sqrt((exact(c, w) ** 2).sum(0)).astype(np.float64)
    wrong = Screen(
        w,
        norms_V=norms * [1, 1.01, 0],
        group_norms_M=np.linalg.norm(c.astype(np.float64), axis=0),
        square_V=np.zeros(3, bool),
    )

    right = screen_of(c, w, square=False)
    for screen in (right, wrong):
        screen.scores(c[:100])
        screen.scores(c[100:])

    np.testing.assert_allclose(right.norm_errors(), 0, atol=1e-6)
    np.testing.assert_allclose(wrong.norm_errors(), [0, 0.01, 1], atol=1e-3)


def test_a_zero_norm_is_told_from_the_smallest_scores() -> None:
    c, w = np.full((4, 2), 1e-44, np.float32), np.full((1, 2), 0.5)
    zero = np.zeros(1)

    for scores, expected in ((c, True), (0 * c, False)):
        screen = Screen(w, norms_V=zero, group_norms_M=np.zeros(2), square_V=np.zeros(1, bool))
        screen.scores(scores)
        assert bool((screen.norm_errors() > 0.5).all()) == expected


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_noticed(value: float) -> None:
    c, w = adversarial("normal", 5)
    screen = screen_of(c, w, square=False)
    bad = c.copy()
    bad[3, 2] = value

    screen.scores(c)
    assert screen.is_finite()
    screen.scores(bad)
    assert not screen.is_finite()


def test_of_equal_scores_the_first_rows_are_the_top() -> None:
    placing = np.array([[1.0, 5.0], [3.0, 5.0], [3.0, 5.0], [2.0, 5.0], [3.0, 6.0]])

    found = [np.flatnonzero(top).tolist() for top in top_rows(placing, 2).T]

    assert found == [[1, 2], [0, 4]]
    assert top_rows(placing, 5).all()
    assert top_rows(placing, 9).all()
