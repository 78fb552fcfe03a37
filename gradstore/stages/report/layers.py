"""The M groups laid out for a reader: by depth, by function, and as points of a chart of weights."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradstore.stages.report.data import Group, WeightVector
from gradstore.stages.report.formatting import TIMES, one_line

MAX_FUNCTIONS = 8
"""Colours and marker shapes that stay distinguishable; report.css and the template hold as many."""

NO_DEPTH = "\u2013"
"""Label of the place of groups outside of the numbered blocks of layers."""

OTHER = "other functions"

MAX_HEAT = 8
"""Shades of a cell; report.css holds as many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where each group stands on the two axes of the page.

    Attributes
    ----------
    depths
        Labels of the places along depth.
    functions
        At most `MAX_FUNCTIONS` names.
    depth_of, function_of
        Place of each of the M groups on the two axes.
    axis
        What the first axis is called.
    titles
        What each of the M groups is called beside a number.
    """

    depths: tuple[str, ...]
    functions: tuple[str, ...]
    depth_of: tuple[int, ...]
    function_of: tuple[int, ...]
    axis: str
    titles: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A group's weight in a chart: ``x`` and ``y`` in percent of the plot from its top left corner."""

    x: float
    y: float
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The points of one function, in order of depth; ``joined`` if a line through them means something."""

    function: int
    points: tuple[Point, ...]
    joined: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A labelled place on an axis, in percent."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Mean weight of the groups of one depth and function, in multiples of 1/M; ``heat`` from 0 to `MAX_HEAT`."""

    weight: float
    heat: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightChart:
    """A weight vector drawn along depth, in multiples of the uniform weight 1/M.

    Attributes
    ----------
    shares, depth_shares
        Sum of the weights of each function, and at each place along depth, and what uniform weights would give it.
    uniform
        Height of the weight 1/M, in percent from the top.
    cells
        By place along depth and function; None where there is no group.
    """

    name: str
    series: tuple[Series, ...]
    shares: tuple[tuple[float, float], ...]
    depth_shares: tuple[tuple[float, float], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    uniform: float
    cells: tuple[tuple[Cell | None, ...], ...]


def lay_out(groups: Sequence[Group]) -> Layout:
    """Find the places along depth, and the functions, of a model's groups.

    Numbers inside a function's path count experts or branches: they become ``*``, so that the experts of a mixture are
    one function. Where no group has a depth, the groups themselves, in the order of the model, stand along the axis.
    """
    names = [re.sub(r"(?<![^.])\d+(?![^.])", "*", group.function) for group in groups]
    functions = list(dict.fromkeys(names))
    if len(functions) > MAX_FUNCTIONS:
        kept = {name for name, _ in Counter(names).most_common(MAX_FUNCTIONS - 1)}
        functions = [name for name in functions if name in kept] + [OTHER]
    place = {name: index for index, name in enumerate(functions)}
    known = sorted({group.depth for group in groups if group.depth is not None})
    if known:
        outside = len(known)
        slot = {depth: index for index, depth in enumerate(known)}
        depth_of = tuple(outside if group.depth is None else slot[group.depth] for group in groups)
        depths = tuple(map(str, known)) + ((NO_DEPTH,) if outside in depth_of else ())
    else:
        depth_of = tuple(range(len(groups)))
        depths = tuple(map(str, depth_of))
    return Layout(
        depths=depths,
        functions=tuple(functions),
        depth_of=depth_of,
        function_of=tuple(place.get(name, len(functions) - 1) for name in names),
        axis="depth" if known else "group",
        titles=_titles(groups),
    )


def sum_parts(parts: Sequence[float], layout: Layout) -> tuple[list[float], list[float]]:
    """Sums of a score's parts by depth and by function; both add up to the score."""
    by_depth = np.bincount(layout.depth_of, weights=parts, minlength=len(layout.depths))
    by_function = np.bincount(layout.function_of, weights=parts, minlength=len(layout.functions))
    return by_depth.tolist(), by_function.tolist()


def draw_weights(vector: WeightVector, layout: Layout) -> WeightChart:
    """Place every weight of a vector in a chart of weight against depth."""
    weights = np.asarray(vector.weights, dtype=np.float64)
    num_groups = len(weights)
    relative = weights * num_groups
    largest = float(np.max(relative, initial=1.0, where=np.isfinite(relative)))
    largest *= 1.05  # room above the highest point
    step = _step(largest / 4)
    top = step * math.ceil(largest / step)
    series = []
    for function in range(len(layout.functions)):
        members = sorted(
            (j for j in range(num_groups) if layout.function_of[j] == function and math.isfinite(relative[j])),
            key=lambda j: layout.depth_of[j],
        )
        points = tuple(
            Point(
                x=_middle(layout.depth_of[j], len(layout.depths)),
                y=100 * (1 - relative[j] / top),
                title=f"{layout.titles[j]}: {weights[j]:.3g}, {relative[j]:.2f} {TIMES} uniform",
            )
            for j in members
        )
        alone = len({layout.depth_of[j] for j in members}) == len(members)
        series.append(Series(function=function, points=points, joined=alone))
    by_depth, by_function = sum_parts(weights.tolist(), layout)
    return WeightChart(
        name=vector.name,
        series=tuple(series),
        shares=_shares(by_function, layout.function_of),
        depth_shares=_shares(by_depth, layout.depth_of),
        x_ticks=_depth_ticks(layout),
        y_ticks=tuple(
            Tick(at=100 * (1 - value / top), label=f"{value:g}{TIMES}")
            for value in np.arange(0, top + step / 2, step).tolist()
        ),
        uniform=100 * (1 - 1 / top),
        cells=_cells(relative.tolist(), layout, largest),
    )


def _titles(groups: Sequence[Group]) -> tuple[str, ...]:
    """Depth and function, or the whole name where two groups would read the same (an encoder and a decoder)."""
    short = [group.name if group.depth is None else f"{group.depth} · {group.function}" for group in groups]
    count = Counter(short)
    return tuple(
        one_line(title if count[title] == 1 else group.name, 80) for title, group in zip(short, groups, strict=True)
    )


def _shares(sums: Sequence[float], place_of: Sequence[int]) -> tuple[tuple[float, float], ...]:
    counts = Counter(place_of)
    return tuple((share, counts[place] / len(place_of)) for place, share in enumerate(sums))


def _cells(relative: Sequence[float], layout: Layout, largest: float) -> tuple[tuple[Cell | None, ...], ...]:
    members: dict[tuple[int, int], list[float]] = {}
    for j, value in enumerate(relative):
        if math.isfinite(value):
            members.setdefault((layout.depth_of[j], layout.function_of[j]), []).append(value)

    def cell(values: Sequence[float] | None) -> Cell | None:
        if not values:
            return None
        mean = sum(values) / len(values)
        return Cell(weight=mean, heat=round(MAX_HEAT * mean / largest))

    return tuple(
        tuple(cell(members.get((depth, function))) for function in range(len(layout.functions)))
        for depth in range(len(layout.depths))
    )


def _depth_ticks(layout: Layout) -> tuple[Tick, ...]:
    count = len(layout.depths)
    step = max(1, int(_step(count / 7)))
    return tuple(
        Tick(at=_middle(index, count), label=label)
        for index, label in enumerate(layout.depths)
        if index % step == 0 or label == NO_DEPTH
    )


def _middle(index: int, count: int) -> float:
    return 100 * (index + 0.5) / count


def _step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
