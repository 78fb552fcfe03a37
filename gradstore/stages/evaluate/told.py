"""What the values of an evaluation amount to: means with their intervals, and differences to the unweighted scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import RenderableType

from gradstore.stages.evaluate.methods import described
from gradstore.stages.score.sources import Method
from gradstore.stages.weights import UNWEIGHTED

if TYPE_CHECKING:
    import pyarrow as pa

    from gradstore.numerics.metrics import Comparison

_QUERY: Final = "query"
AUC: Final = "auc"
NORMALIZED_AUC: Final = "auc normalized"


def compared(
    tables: Sequence[tuple[Mapping[str, str | None], Mapping[str, Sequence[Any]]]], *, seed: int
) -> list[dict[str, Any]]:
    r"""Return, for each method and measure, the mean over queries and, for weights, that of the paired differences.

    .. math:: \frac{1}{|Q|} \sum_{q \in Q} (m_w(q) - m_{1/M}(q))

    over the queries Q that both were measured on; each with its 95 % bootstrap interval.

    Parameters
    ----------
    tables
        Of each method what it is, and its columns: the rows of the queries, and their values by measure.
    seed
        Of the bootstrap.
    """
    from gradstore.numerics.metrics import mean_interval, paired_interval

    unweighted = {of["kernel"]: columns for of, columns in tables if of["method"] == UNWEIGHTED}
    found = []
    for of, columns in tables:
        without = unweighted.get(of["kernel"]) if of["weights"] is not None else None
        measures: dict[str, dict[str, Any]] = {}
        for name, values in columns.items():
            if name == _QUERY:
                continue
            told: dict[str, Any] = mean_interval(values, seed=seed)._asdict()
            if without is not None:
                difference = paired_interval(_by_query(columns, name), _by_query(without, name), seed=seed)
                told["difference"] = None if difference is None else difference._asdict()
            measures[name] = told
        found.append({**of, "queries": len(columns[_QUERY]), "measures": measures})
    return found


def compared_detection(
    found: Sequence[tuple[Method, pa.Table]], wrong_N: np.ndarray, *, seed: int
) -> list[dict[str, Any]]:
    """Return the AUC of each method and measure; differences of weights are to no weights under the same kernel."""
    from gradstore.numerics.metrics import compare_detection

    told: list[dict[str, Any]] = [{**described(method), "queries": len(wrong_N), "measures": {}} for method, _ in found]
    for kernel in dict.fromkeys(method.kernel for method, _ in found):
        for measure in (AUC, NORMALIZED_AUC):
            scores = {
                method.artifact: table[measure].to_numpy()
                for method, table in found
                if method.kernel == kernel and measure in table.column_names
            }
            if not scores:
                continue
            unweighted = Method(name=UNWEIGHTED, kernel=kernel).artifact
            against = unweighted if unweighted in scores else None
            compared = compare_detection(scores, wrong_N, against=against, seed=seed)
            for row, (method, _) in zip(told, found, strict=True):
                if method.artifact in compared:
                    row["measures"][measure] = told_comparison(compared[method.artifact])
    return told


def told_comparison(comparison: Comparison) -> dict[str, Any]:
    """Mean and interval as plain values, with the difference where there is one."""
    told: dict[str, Any] = comparison.interval._asdict()
    return told if comparison.difference is None else {**told, "difference": comparison.difference._asdict()}


def _by_query(columns: Mapping[str, Sequence[Any]], name: str) -> dict[int, float]:
    return dict(zip(columns[_QUERY], columns[name], strict=True))


def render_evaluation(found: Mapping[str, Any]) -> RenderableType:
    """Draw what was measured as a table for a terminal."""
    from rich.table import Table

    title = f"{found['measure']} of {found['queries']:,} {'examples' if 'wrong' in found else 'queries'}, with 95 % intervals"
    table = Table("measure", "method", title=title, title_justify="left")
    for column in ("mean", "less unweighted"):
        table.add_column(column, justify="right")
    for name in found["methods"][0]["measures"]:
        for row in found["methods"]:
            # Baselines lack what is made of scores alone.
            if name not in row["measures"]:
                continue
            told = row["measures"][name]
            difference = "" if told.get("difference") is None else _interval(told["difference"], sign="+")
            method = f"{row['kernel']}.{row['method']}" if row["kernel"] else row["method"]
            table.add_row(name, method, _interval(told), difference)
        table.add_section()
    return table


def _interval(told: Mapping[str, Any], sign: str = "") -> str:
    return f"{told['mean']:{sign}.3f} [{told['low']:{sign}.3f}, {told['high']:{sign}.3f}]"
