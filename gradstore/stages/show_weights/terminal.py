"""Weights as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.table import Table

# Characters of the longest bar.
_BAR: Final = 30


def render_candidates(found: Mapping[str, Any]) -> list[Table]:
    """Draw, of all weights that were chosen from several, the candidates."""
    from rich.table import Table
    from rich.text import Text

    tables = []
    for item in found["weights"]:
        if item["candidates"]:
            title = Text(f"weights {item['name']} were chosen from")
            table = Table("k", "weight_decay", "seed", "gain", "", title=title, title_justify="left")
            for row in item["candidates"]:
                cells = (str(row["k"]), f"{row['weight_decay']:g}", str(row["seed"]), f"{row['gain']:.4f}")
                table.add_row(*cells, "chosen" if row["chosen"] else "")
            tables.append(table)
    return tables


def render_weights(found: Mapping[str, Any]) -> list[Table]:
    """Draw weights for a terminal, a table for each, and one of similarities where there are several."""
    from rich.table import Table
    from rich.text import Text

    from gradstore.stages.report.layers import NO_DEPTH

    by, tables = found["by"], []
    for item in found["weights"]:
        table = Table(by, title=Text(f"weights {item['name']} ({item['kernel']})"), title_justify="left")
        for column in ("depth", "function") if by == "group" else ("groups",):
            table.add_column(column, justify="right" if column != "function" else "left")
        table.add_column("weight", justify="right")
        table.add_column("x 1/M", justify="right")
        table.add_column("")
        most = max(row["ratio"] for row in item["rows"])
        for row in item["rows"]:
            shown = (by, "depth", "function") if by == "group" else (by, "groups")
            # Groups outside of the blocks of layers have no depth.
            cells = [Text(NO_DEPTH if row[column] is None else str(row[column])) for column in shown]
            bar = "#" * round(_BAR * row["ratio"] / most)
            table.add_row(*cells, f"{row['weight']:.4f}", f"{row['ratio']:.2f}", bar)
        tables.append(table)
    if len(found["weights"]) > 1:
        names = [item["name"] for item in found["weights"]]
        alike = Table("cosine", *names, title="similarity", title_justify="left")
        for name, row in zip(names, found["similarity"], strict=True):
            alike.add_row(name, *(f"{value:.3f}" for value in row))
        tables.append(alike)
    return tables
