"""Figures by matplotlib: values in, PNG out; no store, and none of matplotlib's global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gradstore.errors import SpecError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gradstore.numerics.metrics import Interval

# A palette that the colour-blind tell apart (Okabe and Ito), and marks for print without colour.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS: Final = ("o", "s", "^", "D", "v", "P", "X")
_DPI: Final = 150
# More names than these are not readable side by side.
_MOST_NAMES: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A parameter group: its name, what it does in its block, and what was measured of it."""

    group: str
    function: str
    interval: Interval


def draw_groups(bars: Sequence[Bar], *, title: str, whole: float) -> bytes:
    """Draw what groups alone reach, in the order of the model; a line is what all of them together do."""
    axes = _axes(title, "LDS", wide=len(bars) > _MOST_NAMES // 2)
    functions = [*dict.fromkeys(bar.function for bar in bars)]
    for place, function in enumerate(functions):
        at = [number for number, bar in enumerate(bars) if bar.function == function]
        means = [bars[number].interval.mean for number in at]
        below = [bars[number].interval.mean - bars[number].interval.low for number in at]
        above = [bars[number].interval.high - bars[number].interval.mean for number in at]
        axes.bar(at, means, yerr=[below, above], color=_COLOURS[place % len(_COLOURS)], label=function, capsize=2)
    axes.axhline(whole, color="0.4", linestyle="--", label="all groups, unweighted")
    _name_groups(axes, [bar.group for bar in bars])
    axes.legend(fontsize="small", ncols=2)
    return _png(axes)


def draw_weights(weights: Mapping[str, Sequence[float]], groups: Sequence[str], *, title: str) -> bytes:
    """Draw weight vectors along the groups of the model, in multiples of the uniform weight."""
    axes = _axes(title, "weight, in multiples of 1/M", wide=len(groups) > _MOST_NAMES // 2)
    for place, (name, values) in enumerate(weights.items()):
        scaled = [value * len(groups) for value in values]
        axes.plot(scaled, label=name, marker=_MARKS[place % len(_MARKS)], color=_COLOURS[place % len(_COLOURS)], ms=4)
    axes.axhline(1, color="0.4", linestyle="--", label="uniform")
    _name_groups(axes, groups)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return _png(axes)


def draw_curve(
    points: Mapping[str, Sequence[tuple[float, float]]], *, title: str, along: str, without: float, logarithmic: bool
) -> bytes:
    """Draw LDS against a setting of the learner, a line for each series; a line across is LDS without weights."""
    axes = _axes(title, "LDS", wide=False)
    for place, (name, of_series) in enumerate(points.items()):
        ordered = sorted(of_series)
        axes.plot(
            [x for x, _ in ordered],
            [y for _, y in ordered],
            label=name,
            marker=_MARKS[place % len(_MARKS)],
            color=_COLOURS[place % len(_COLOURS)],
        )
    axes.axhline(without, color="0.4", linestyle="--", label="without weights")
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(along)
    axes.legend(fontsize="small")
    return _png(axes)


def _axes(title: str, measure: str, *, wide: bool) -> Axes:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise SpecError("plots: matplotlib is not installed here: pip install 'gradstore[plots]'.") from error
    figure = Figure(figsize=(10 if wide else 6.4, 4), layout="constrained")
    axes: Any = figure.subplots()
    axes.set_title(title)
    axes.set_ylabel(measure)
    axes.spines[["top", "right"]].set_visible(False)
    return axes  # type: ignore[no-any-return]


def _name_groups(axes: Axes, names: Sequence[str]) -> None:
    """Name the groups below the axis, as many as can be read."""
    stride = -(-len(names) // _MOST_NAMES)
    at = range(0, len(names), stride)
    # Names come from a model: nothing in them is to be read as mathematics.
    shown = [names[place].replace("$", r"\$") for place in at]
    axes.set_xticks([*at], shown, rotation=60, ha="right", rotation_mode="anchor", fontsize="x-small")


def _png(axes: Axes) -> bytes:
    buffer = io.BytesIO()
    axes.get_figure().savefig(buffer, format="png", dpi=_DPI)  # type: ignore[union-attr]
    return buffer.getvalue()
