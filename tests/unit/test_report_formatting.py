from __future__ import annotations

import math

import pytest

from gradstore.stages.report.formatting import MINUS, TIMES, Scale, clean_text, one_line, paragraphs, signed


@pytest.mark.parametrize(
    ("scores", "unit", "shown"),
    [
        ([12.345, -0.5], "", ["+12.35", f"{MINUS}0.50"]),
        ([0.25, 0.1], "", ["+0.250", "+0.100"]),
        ([8123.4, 12.0], "", ["+8123", "+12"]),
        ([0.0042, 0.001], f"{TIMES}10⁻³", ["+4.20", "+1.00"]),
        ([31_000.0, -2e6], f"{TIMES}10⁶", ["+0.03", f"{MINUS}2.00"]),
        ([1e-6], f"{TIMES}10⁻⁶", ["+1.00"]),
        ([0.0], "", ["+0.000"]),
        ([math.nan, 2.0], "", ["n/a", "+2.00"]),
        ([], "", []),
    ],
)
def test_a_column_of_scores_shares_one_unit_and_its_decimals(scores: list[float], unit: str, shown: list[str]) -> None:
    scale = Scale(scores)

    assert scale.unit == unit
    assert [scale.score(score) for score in scores] == shown


@pytest.mark.parametrize(
    ("part", "shown"), [(3.14e-3, "+3.1"), (-0.0421e-3, f"{MINUS}0.042"), (0.0, "+0.0"), (25e-3, "+25")]
)
def test_a_part_keeps_two_significant_digits_in_the_columns_unit(part: float, shown: str) -> None:
    assert Scale([4.2e-3]).part(part) == shown


def test_a_line_is_cut_to_its_length_with_an_ellipsis() -> None:
    assert one_line("a long\n\n  line of text", 8) == "a long…"
    assert one_line("short\tline", 20) == "short line"


def test_a_line_cannot_turn_the_direction_of_what_follows() -> None:
    assert one_line("a\u202egnp.exe\u2066b", 20) == "agnp.exeb"


def test_paragraphs_keep_indentation_and_lose_empty_lines() -> None:
    assert paragraphs("\n def f():\n     return 1\n \n\n x\n") == "def f():\n     return 1\n x"


def test_line_ends_are_made_plain_and_tabs_kept() -> None:
    assert clean_text("a\r\nb\rc\td\x07") == "a\nb\nc\td\ufffd"


def test_a_signed_number_that_is_no_number_is_missing() -> None:
    assert [signed(0.5), signed(-0.5), signed(math.inf)] == ["+0.50", f"{MINUS}0.50", "n/a"]
