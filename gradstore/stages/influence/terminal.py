"""The influence of labels or sources as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from gradstore.stages.weights import UNWEIGHTED

if TYPE_CHECKING:
    from rich.table import Table

# Characters of a label or source in a table.
_LABEL_LENGTH: Final = 60


def render_influence(found: Mapping[str, Any]) -> Table:
    """Draw the influence of labels or sources for a terminal."""
    from rich.table import Table
    from rich.text import Text

    from gradstore.stages.report.formatting import one_line

    of = f"influence on {found['queries']:,} queries"
    if found["self"]:
        of = "self-influence"
    elif found["query"] is not None:
        of = f"influence on {one_line(found['query'], _LABEL_LENGTH)}"
    if found["pool"] == "attention":
        of += ", pooled by attention"
    title = f"{of}: {found['kernel']}, {found['weights'] or UNWEIGHTED}"
    table = Table(found["by"], title=Text(title), title_justify="left")
    of_queries = found["pool"] == "attention"
    for column in (
        "rows",
        "sum",
        "mean of a query" if of_queries else "mean",
        "queries above 0" if of_queries else "above 0",
    ):
        table.add_column(column, justify="right")
    for row in found["rows"]:
        name = "(none)" if row[found["by"]] is None else one_line(row[found["by"]], _LABEL_LENGTH)
        # Not as markup, which labels may look like.
        table.add_row(
            Text(name), f"{row['rows']:,}", f"{row['sum']:.4g}", f"{row['mean']:.4g}", f"{row['positive']:.0%}"
        )
    return table
