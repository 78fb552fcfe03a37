"""Weights drawn: along depth, summed by function and by depth, and how alike they are; an SVG that needs nothing else.

It uses what every viewer of SVG knows: no styles, no scripts, no fonts, no sizes in percent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gradstore.stages.report.data import Group, WeightVector
from gradstore.stages.report.formatting import MISSING, one_line
from gradstore.stages.report.layers import Layout, WeightChart, draw_weights, lay_out
from gradstore.stages.report.templates import make_environment, policy_hash

# The light colours of report.css, by function.
FUNCTION_COLOURS: Final = (
    *("#1b3fad", "#75220a", "#20a28d", "#5c2d60"),
    *("#31779b", "#ae8523", "#926df9", "#9a5142"),
)

WIDTH: Final = 1280
PANEL_HEIGHT: Final = 310
LEGEND_COLUMNS: Final = 4
LEGEND_ROW: Final = 22
# From the top to the legend: the title and what it says.
HEAD: Final = 84
# Of the square of cosines.
CELL: Final = 46
SQUARE_HEAD: Final = 66


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What is drawn.

    Attributes
    ----------
    name
        The run's name.
    groups
        The M groups, in the order of every vector.
    vectors
        The weights.
    similarity
        Cosines between all pairs of them.
    """

    name: str
    groups: Sequence[Group]
    vectors: Sequence[WeightVector]
    similarity: Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A sum of weights: its length, and that of uniform weights, as shares of the longest."""

    label: str
    value: str
    length: float
    uniform: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One vector: its points along depth, and its sums; ``top`` is its place on the picture."""

    top: int
    title: str
    chart: WeightChart
    by_function: tuple[Bar, ...]
    by_depth: tuple[Bar, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    """The cosines: a title for every row, and (text, opacity) of every cell; ``top`` is its place on the picture."""

    top: int
    titles: tuple[str, ...]
    cells: tuple[tuple[tuple[str, float], ...], ...]


def draw_picture(drawing: Drawing) -> str:
    """The picture as SVG, a panel for each vector and, of several, the square of their cosines; equal weights, equal bytes."""
    return _render("weights.svg.jinja", **_views(drawing))


def draw_page(drawing: Drawing, found: Mapping[str, Any]) -> str:
    """The picture on an HTML page, with the rows that `show_weights` found as a table."""
    style = "body{margin:1.5rem;font:15px/1.5 sans-serif}svg{max-width:100%;height:auto}table{border-collapse:collapse}"
    style += "td,th{padding:.1rem .8rem;text-align:right;border-bottom:1px solid #dfe3e8}th{text-align:left}"
    items = found["weights"]
    rows = [
        (row[0][found["by"]], [(of_vector["weight"], of_vector["ratio"]) for of_vector in row])
        for row in zip(*(item["rows"] for item in items), strict=True)
    ]
    return _render(
        "weights.html.jinja",
        **_views(drawing),
        by=found["by"],
        names=[item["name"] for item in items],
        rows=rows,
        style=style,
        style_hash=policy_hash(style),
    )


def _render(template: str, **views: Any) -> str:
    return make_environment(__package__).get_template(template).render(**views)


def _views(drawing: Drawing) -> dict[str, Any]:
    layout = lay_out(drawing.groups)
    legend_rows = math.ceil(len(layout.functions) / LEGEND_COLUMNS)
    top = HEAD + LEGEND_ROW * legend_rows + 16
    panels = [
        _panel(draw_weights(vector, layout), layout, top + PANEL_HEIGHT * place)
        for place, vector in enumerate(drawing.vectors)
    ]
    height, square = top + PANEL_HEIGHT * len(panels), None
    if len(panels) > 1:
        square = _square(drawing, height)
        height += SQUARE_HEAD + CELL * len(panels) + 24
    return {
        "title": f"Weights of {one_line(drawing.name, 80)}",
        "num_groups": len(drawing.groups),
        "layout": layout,
        "legend": [
            (one_line(name, 36), 40 + 310 * (place % LEGEND_COLUMNS), HEAD + LEGEND_ROW * (place // LEGEND_COLUMNS))
            for place, name in enumerate(layout.functions)
        ],
        "panels": panels,
        "square": square,
        # The square may be wider than the panels are.
        "width": max(WIDTH, 360 + CELL * len(panels)),
        "height": height,
        "cell": CELL,
        "colours": FUNCTION_COLOURS,
    }


def _panel(chart: WeightChart, layout: Layout, top: int) -> Panel:
    return Panel(
        top=top,
        title=one_line(chart.name, 80),
        chart=chart,
        by_function=_bars(layout.functions, chart.shares),
        by_depth=_bars(layout.depths, chart.depth_shares),
    )


def _bars(labels: Sequence[str], shares: Sequence[tuple[float, float]]) -> tuple[Bar, ...]:
    longest = max(value for pair in shares for value in pair if math.isfinite(value))
    return tuple(
        Bar(
            label=one_line(label, 24),
            value=f"{100 * share:.1f} %" if math.isfinite(share) else MISSING,
            length=share / longest if math.isfinite(share) else 0.0,
            uniform=uniform / longest,
        )
        for label, (share, uniform) in zip(labels, shares, strict=True)
    )


def _square(drawing: Drawing, top: int) -> Square:
    return Square(
        top=top,
        titles=tuple(one_line(vector.name, 36) for vector in drawing.vectors),
        cells=tuple(
            tuple((f"{cosine:.2f}", min(max(cosine, 0.0), 1.0)) for cosine in row) for row in drawing.similarity
        ),
    )
