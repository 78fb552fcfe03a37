"""The report of a run: one self-contained HTML page, and tables for the terminal."""

from gradstore.stages.report.data import (
    Comparison,
    Group,
    MeasuredRow,
    PrecisionRow,
    QueryReport,
    RankedExample,
    ReportData,
    WeightVector,
)
from gradstore.stages.report.page import render_page
from gradstore.stages.report.stage import as_values, report
from gradstore.stages.report.terminal import render_tables
from gradstore.stages.weights import UNWEIGHTED

__all__ = [
    "UNWEIGHTED",
    "Comparison",
    "Group",
    "MeasuredRow",
    "PrecisionRow",
    "QueryReport",
    "RankedExample",
    "ReportData",
    "WeightVector",
    "as_values",
    "render_page",
    "render_tables",
    "report",
]
