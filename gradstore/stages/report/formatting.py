"""Numbers and texts as a reader sees them, on the page and in the terminal alike."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from gradstore.stages.report.data import LEAST_QUERIES, Comparison
from gradstore.stages.weights import UNWEIGHTED

MINUS = "\u2212"
TIMES = "\u00d7"
MISSING = "n/a"
SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")

# What would end a page early, move a terminal's cursor, cannot be written as UTF-8, or may not be in XML.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# Marks that turn the direction of what follows: harmless inside an isolated paragraph, not inside a table.
DIRECTION_MARKS = re.compile("[\u202a-\u202e\u2066-\u2069]")


def clean_text(text: str) -> str:
    """A text with its line ends made plain and every unprintable character shown as U+FFFD."""
    return UNPRINTABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def paragraphs(text: str) -> str:
    """A whole text with its lines and their indentation, and without empty lines."""
    return re.sub(r"\n\s*\n", "\n", clean_text(text)).strip()


def one_line(text: str, length: int) -> str:
    """The beginning of a text, on one line, of at most ``length`` characters."""
    line = " ".join(DIRECTION_MARKS.sub("", clean_text(text)).split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def ranking_title(ranking: str) -> str:
    """What a ranking is called in a heading."""
    return "Without weights" if ranking == UNWEIGHTED else f"With weights “{one_line(ranking, 40)}”"


class Scale:
    """One power of ten and one number of decimals for a column of scores, so that they can be compared at a glance.

    Values from 0.1 to 10,000 keep their size; others are shown in units of 10^(3 i).
    """

    def __init__(self, scores: Iterable[float]) -> None:
        largest = max((abs(score) for score in scores if math.isfinite(score)), default=0.0)
        self.exponent = 0
        if largest > 0 and not 0.1 <= largest < 1e4:
            self.exponent = 3 * math.floor(math.log10(largest) / 3)
        # Division by an exact power keeps 1e-6 at 1; 10.0**-6 is not exact.
        magnitude = self.apply(largest)
        self.decimals = 3 if magnitude < 1 else 2 if magnitude < 100 else 1 if magnitude < 1000 else 0

    def apply(self, value: float) -> float:
        """The value in units of the scale."""
        return value / 10.0**self.exponent if self.exponent >= 0 else value * 10.0**-self.exponent

    @property
    def unit(self) -> str:
        """The unit for a heading, such as ``x10^-3`` typeset; empty if it is 1."""
        return f"{TIMES}10{str(self.exponent).translate(SUPERSCRIPTS)}" if self.exponent else ""

    def score(self, value: float) -> str:
        """A score with the column's decimals and always a sign."""
        return _typeset(f"{self.apply(value):+.{self.decimals}f}") if math.isfinite(value) else MISSING

    def part(self, value: float) -> str:
        """A part of a score to two significant digits, and always a sign."""
        return two_digits(self.apply(value), most=4) if math.isfinite(value) else MISSING


def percent(share: float) -> str:
    """A share between 0 and 1, in whole percent."""
    return f"{100 * share:.0f}\u00a0%" if math.isfinite(share) else MISSING


def signed(value: float, decimals: int = 2) -> str:
    """A number with a sign and a minus that is as wide as a plus."""
    return _typeset(f"{value:+.{decimals}f}") if math.isfinite(value) else MISSING


def two_digits(value: float, *, most: int = 6) -> str:
    """A number to two significant digits, or as many decimals at most, and always a sign."""
    if not math.isfinite(value):
        return MISSING
    size = math.floor(math.log10(abs(value))) if value else 0
    return _typeset(f"{value:+.{min(max(1 - size, 0), most)}f}")


def sentence(found: Comparison) -> str:
    """What a comparison of weights with none says."""
    does = {"better": "do better", "worse": "do worse", "unknown": "no difference can be told"}[found.verdict]
    who = f"weights “{one_line(found.weights, 40)}”"
    said = f"with {who} {does}" if found.verdict == "unknown" else f"{who} {does} than none"
    interval = f"95 % interval {two_digits(found.ci_low)} to {two_digits(found.ci_high)}"
    of = f"{found.queries:,} quer{'y' if found.queries == 1 else 'ies'}"
    few = f", too few to tell: it takes {LEAST_QUERIES}" if found.queries < LEAST_QUERIES else ""
    measure = found.measure[0].upper() + found.measure[1:]
    return f"{measure}: {said} (difference {two_digits(found.difference)}, {interval}, {of}{few})."


def _typeset(number: str) -> str:
    return number.replace("-", MINUS)
