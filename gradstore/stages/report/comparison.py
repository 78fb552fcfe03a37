"""What was found for and against weights: each weighting of a kernel beside none, over the same queries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gradstore.stages.report.data import Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measured:
    """One measure of a ranking: the value of every query by its row, and how it was measured."""

    values: Mapping[int, float]
    settings: Mapping[str, Any]


def compare(summaries: Sequence[Mapping[str, Any]], *, seed: int) -> list[Comparison]:
    r"""Return the mean paired difference of every weighting to no weights, with its 95 % interval, in every measure.

    .. math:: \frac{1}{|Q|} \sum_{q \in Q} (m_w(q) - m_{1/M}(q))

    over the queries Q that both were measured on. Rankings that were measured otherwise, or before values of single queries
    were kept, are not compared.

    Parameters
    ----------
    summaries
        Those of the rankings of one kernel, as `score` wrote them.
    seed
        Of the bootstrap.
    """
    from gradstore.numerics.metrics import paired_interval

    found = []
    for measure, read in _MEASURES.items():
        of = {summary["weights"]: measured for summary in summaries if (measured := read(summary)) is not None}
        without = of.pop(None, None)
        for weights, measured in of.items():
            if without is None or measured.settings != without.settings:
                continue
            interval = paired_interval(measured.values, without.values, seed=seed)
            if interval is not None:
                found.append(
                    Comparison(
                        measure=measure,
                        weights=weights,
                        difference=interval.mean,
                        ci_low=interval.low,
                        ci_high=interval.high,
                        queries=len(measured.values.keys() & without.values.keys()),
                    )
                )
    return found


def _tail_patch(summary: Mapping[str, Any]) -> _Measured | None:
    patch = summary.get("tail_patch")
    if patch is None or "rows" not in patch:
        return None
    return _Measured(
        values=dict(zip(patch["rows"], patch["percent"], strict=True)),
        settings={key: patch[key] for key in ("k", "optimizer", "learning_rate")},
    )


def _precision(summary: Mapping[str, Any]) -> _Measured | None:
    precisions = summary.get("precisions")
    if precisions is None:
        return None
    return _Measured(values=dict(zip(precisions["rows"], precisions["values"], strict=True)), settings={})


# Causal ones first.
_MEASURES: Final[Mapping[str, Callable[[Mapping[str, Any]], _Measured | None]]] = {
    "tail-patch": _tail_patch,
    "label precision@10": _precision,
}
