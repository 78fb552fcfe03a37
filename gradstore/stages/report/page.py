"""The HTML page of a run: one self-contained file that asks the network for nothing.

Every text of the store is escaped by the template, and the page's content security policy names the hashes of its own
script and style: what a corpus smuggles in cannot run, even if an escape were forgotten.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from gradstore.stages.report.data import (
    MeasuredRow,
    MeasuredTable,
    QueryReport,
    RankedExample,
    ReportData,
    Side,
    tail_patch_table,
)
from gradstore.stages.report.formatting import (
    Scale,
    clean_text,
    one_line,
    paragraphs,
    ranking_title,
    sentence,
)
from gradstore.stages.report.layers import Layout, draw_weights, lay_out, sum_parts
from gradstore.stages.report.templates import make_environment, policy_hash

TEXT_LIMIT = 1200
"""Characters of a training example's text on the page: an example is repeated wherever it ranks."""

NUM_STRONGEST = 5
"""Parts of a score that are listed by name; all the others are in the sums by depth and by function."""

PARTS_RESOLUTION = 500
"""Sums of parts are stored as whole multiples of the largest one over this: a bar is never wider in pixels."""

CAPTIONS: dict[Side, tuple[str, str]] = {
    "proponent": ("Proponents", "highest scores: a training step on them would lower this query's loss"),
    "opponent": ("Opponents", "lowest scores: a training step on them would raise it"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedView:
    """A ranked example, formatted. ``parts`` is ``unit|by depth|by function`` in whole multiples of the unit."""

    rank: int
    score: str
    label: str | None
    matches: bool
    move: str
    move_title: str
    excerpt: str
    text: str
    hidden_characters: int
    example_id: str
    strongest: tuple[tuple[str, str], ...]
    parts: str
    image: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnView:
    """One side of one ranking."""

    title: str
    unit: str
    remarks: tuple[str, ...]
    ranked: tuple[RankedView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SideView:
    """Proponents, or opponents, in every ranking."""

    title: str
    caption: str
    columns: tuple[ColumnView, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryView:
    """A query, formatted; ``matches`` counts the proponents of its label in each ranking."""

    query_id: str
    label: str | None
    excerpt: str
    text: str
    matches: tuple[int, ...]
    sides: tuple[SideView, ...]
    image: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalView:
    """A row on the axis that all rows of its table share: places in percent of its width."""

    row: MeasuredRow
    low: float
    mean: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalTable:
    """A table of methods with their intervals, and the place of zero on its axis."""

    title: str
    about: str
    rows: tuple[IntervalView, ...]
    zero: float
    has_differences: bool
    counted: str


def render_page(data: ReportData) -> str:
    """The page as HTML: works from a file, without a network, and is readable without scripts.

    Texts of examples are shown up to `TEXT_LIMIT` characters. Of the M parts of a score the page keeps the
    `NUM_STRONGEST` strongest by name, and the sums by depth and by function.
    """
    layout = lay_out(data.groups)
    style, script = _package_file("report.css"), _package_file("report.js")
    return (
        make_environment()
        .get_template("report.html.jinja")
        .render(
            data=data,
            layout=layout,
            charts=[draw_weights(vector, layout) for vector in data.weights],
            queries=[view_query(query, layout) for query in data.queries],
            tail_patch=view_table(tail_patch_table(data.tail_patch)),
            evaluations=[view_table(table) for table in data.evaluations],
            findings=[(comparison.verdict, sentence(comparison)) for comparison in data.comparisons],
            pictures=[(text, b64encode(png).decode()) for text, png in data.pictures],
            style=style,
            script=script,
            style_hash=policy_hash(style),
            script_hash=policy_hash(script),
        )
    )


def view_query(query: QueryReport, layout: Layout) -> QueryView:
    """Format a query with what every ranking holds for it."""
    rankings = tuple(query.rankings)
    proponents = {name: _of_side(query, name, "proponent") for name in rankings}
    return QueryView(
        query_id=clean_text(query.query_id),
        label=None if query.label is None else one_line(query.label, 60),
        excerpt=one_line(query.text, 90),
        text=paragraphs(query.text),
        matches=() if query.label is None else tuple(_matches(query, proponents[name]) for name in rankings),
        sides=tuple(
            SideView(
                title=title,
                caption=caption,
                columns=tuple(_view_column(query, ranking, side, layout) for ranking in rankings),
            )
            for side, (title, caption) in CAPTIONS.items()
        ),
        image=query.image,
    )


def _view_column(query: QueryReport, ranking: str, side: Side, layout: Layout) -> ColumnView:
    ranked = _of_side(query, ranking, side)
    first = next(iter(query.rankings))
    before = {example.example_id: example.rank for example in _of_side(query, first, side)}
    remarks = []
    if query.label is not None:
        remarks.append(f"{_matches(query, ranked)} of {len(ranked)} same label")
    if ranking != first:
        remarks.append(f"{sum(example.example_id in before for example in ranked)} in both lists")
    scale = Scale(example.score for example in ranked)
    return ColumnView(
        title=ranking_title(ranking),
        unit=scale.unit,
        remarks=tuple(remarks),
        ranked=tuple(
            _view_ranked(query, example, None if ranking == first else before, scale, layout) for example in ranked
        ),
    )


def _view_ranked(
    query: QueryReport, example: RankedExample, before: Mapping[str, int] | None, scale: Scale, layout: Layout
) -> RankedView:
    text = paragraphs(example.text)
    move, move_title = ("", "") if before is None else _move(example.rank, before.get(example.example_id))
    strongest = sorted(range(len(example.parts)), key=lambda j: -abs(example.parts[j]))[:NUM_STRONGEST]
    return RankedView(
        rank=example.rank,
        score=scale.score(example.score),
        label=None if example.label is None else one_line(example.label, 40),
        matches=query.label is not None and example.label == query.label,
        move=move,
        move_title=move_title,
        excerpt=one_line(text, 150),
        text=text[:TEXT_LIMIT],
        hidden_characters=max(0, len(text) - TEXT_LIMIT),
        example_id=one_line(example.example_id, 200),
        strongest=tuple((layout.titles[j], scale.part(example.parts[j])) for j in strongest),
        parts=_encode_parts(example.parts, scale, layout),
        image=example.image,
    )


def _encode_parts(parts: Sequence[float], scale: Scale, layout: Layout) -> str:
    if not parts:
        # Of scores alone there are none.
        return ""
    by_depth, by_function = sum_parts([scale.apply(part) for part in parts], layout)
    largest = max(map(abs, by_depth + by_function), default=0.0)
    if not 0 < largest < math.inf:
        return ""
    unit = largest / PARTS_RESOLUTION
    return "|".join(
        [f"{unit:.4g}", *(",".join(str(round(value / unit)) for value in sums) for sums in (by_depth, by_function))]
    )


def _move(rank: int, before: int | None) -> tuple[str, str]:
    if before is None:
        return "new", "not in the list without weights"
    if before == rank:
        return "=", "same rank without weights"
    return f"{'↑' if before > rank else '↓'}{abs(before - rank)}", f"rank {before} without weights"


def _of_side(query: QueryReport, ranking: str, side: Side) -> list[RankedExample]:
    return sorted((example for example in query.rankings[ranking] if example.side == side), key=lambda e: e.rank)


def _matches(query: QueryReport, ranked: Sequence[RankedExample]) -> int:
    return sum(example.label == query.label for example in ranked)


def view_table(table: MeasuredTable) -> IntervalTable | None:
    """The rows on one axis that holds every interval and zero; None where there are none."""
    rows = table.rows
    if not rows:
        return None
    ends = [end for row in rows for end in (row.ci_low, row.mean, row.ci_high) if math.isfinite(end)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    width = (high - low) or 1.0

    def place(value: float) -> float:
        return 2 + 96 * ((value if math.isfinite(value) else 0.0) - low) / width

    return IntervalTable(
        title=table.title,
        about=table.about,
        rows=tuple(
            IntervalView(row=row, low=place(row.ci_low), mean=place(row.mean), high=place(row.ci_high)) for row in rows
        ),
        zero=place(0.0),
        has_differences=any(row.difference is not None for row in rows),
        counted=f"{_range([row.queries for row in rows])} {table.noun}",
    )


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low} to {high}"


def _package_file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
