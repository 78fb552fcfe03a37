"""The report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from gradstore.stages.report.data import (
    MeasuredTable,
    QueryReport,
    ReportData,
    WeightVector,
    tail_patch_table,
)
from gradstore.stages.report.formatting import TIMES, Scale, one_line, ranking_title, sentence, signed
from gradstore.stages.report.layers import Layout, lay_out

NUM_QUERIES = 3
NUM_PROPONENTS = 3
NUM_GROUPS = 5


def render_tables(data: ReportData) -> list[RenderableType]:
    """Tables of precision, tail-patch, what both say of the weights, the heaviest groups, and the first proponents.

    Texts of the store reach the terminal without control characters and without being read as rich's markup.
    """
    layout = lay_out(data.groups)
    tables: list[RenderableType] = []
    if data.precision:
        tables.append(_precision(data))
    if data.tail_patch:
        tables.append(_measured(tail_patch_table(data.tail_patch)))
    tables += [_measured(table) for table in data.evaluations]
    tables += [Text(one_line(sentence(comparison), 400)) for comparison in data.comparisons]
    tables += [_heaviest(vector, layout) for vector in data.weights]
    tables += [_proponents(number, query) for number, query in enumerate(data.queries[:NUM_QUERIES], start=1)]
    tables += [Text(one_line(note, 400), style="dim") for note in data.notes]
    return tables


def _precision(data: ReportData) -> Table:
    table = _table(f"Label precision@{data.precision_k}", ("method", "precision", "chance"))
    for row in data.precision:
        table.add_row(_cell(row.method), f"{row.precision:.2f}", Text(f"{row.chance:.2f}", style="dim"))
    return table


def _measured(measured: MeasuredTable) -> Table:
    title = one_line(f"{measured.title}, {measured.about}", 200)
    table = _table(title, ("method", "mean", "95 % interval", "less no weights", measured.noun))
    for row in measured.rows:
        difference = "" if row.difference is None else _interval(*row.difference)
        interval = f"{signed(row.ci_low)} … {signed(row.ci_high)}"
        table.add_row(_cell(row.method), signed(row.mean), interval, difference, str(row.queries))
    return table


def _interval(mean: float, low: float, high: float) -> str:
    return f"{signed(mean)} ({signed(low)} … {signed(high)})"


def _heaviest(vector: WeightVector, layout: Layout) -> Table:
    num_groups = len(vector.weights)
    table = _table(
        f"Heaviest of {num_groups} groups, “{one_line(vector.name, 40)}”", ("group", "weight", f"{TIMES} uniform")
    )
    for j in sorted(range(num_groups), key=lambda j: -vector.weights[j])[:NUM_GROUPS]:
        weight = vector.weights[j]
        table.add_row(_cell(layout.titles[j]), f"{weight:.4f}", f"{weight * num_groups:.1f}")
    return table


def _proponents(number: int, query: QueryReport) -> Table:
    label = "" if query.label is None else f" [{one_line(query.label, 30)}]"
    table = _table(f"Query {number}{label}: {one_line(query.text, 70)}", ("rank", "score", "label"))
    table.columns[2].justify = "left"
    # Only the text gives way to a narrow terminal.
    table.add_column("proponent", ratio=1, no_wrap=True, overflow="ellipsis")
    table.expand = True
    for ranking, ranked in query.rankings.items():
        best = sorted((example for example in ranked if example.side == "proponent"), key=lambda e: e.rank)
        scale = Scale(example.score for example in best)
        table.add_row("", "", "", Text(f"{ranking_title(ranking)} {scale.unit}".rstrip(), style="italic dim"))
        for example in best[:NUM_PROPONENTS]:
            same = query.label is not None and example.label == query.label
            table.add_row(
                str(example.rank),
                scale.score(example.score),
                _cell(example.label or "", length=20, style="bold" if same else ""),
                _cell(example.text, length=200),
            )
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _cell(text: str, *, length: int = 60, style: str = "") -> Text:
    return Text(one_line(text, length), style=style)
