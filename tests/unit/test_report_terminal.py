from __future__ import annotations

import dataclasses

import pytest
from rich.cells import cell_len
from rich.console import Console

from gradstore.stages.report import ReportData, render_tables
from tests.reports import make_report


@pytest.fixture(scope="module")
def report() -> ReportData:
    return make_report(num_queries=4, k=5, num_depths=4, num_train=40)


def printed(report: ReportData, width: int = 100) -> str:
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        for table in render_tables(report):
            console.print(table)
    return capture.get()


def test_the_terminal_shows_measures_weights_and_first_proponents(report: ReportData) -> None:
    text = printed(report)

    assert "Label precision@10" in text
    assert "0.57" in text
    assert "+0.22 … +1.03" in text
    assert "Tail-patch: weights “learned” do better than none" in text
    assert "Heaviest of 28 groups, “learned”" in text
    assert "Without weights" in text
    assert "With weights “learned”" in text
    assert "Query 3" in text
    assert "Query 4" not in text


def test_the_heaviest_group_comes_first(report: ReportData) -> None:
    weights = [0.5 / 27] * 28
    weights[9] = 0.5

    text = printed(dataclasses.replace(report, weights=[dataclasses.replace(report.weights[0], weights=weights)]))

    assert "1 · self_attn.v_proj  0.5000       14.0" in text


@pytest.mark.parametrize("width", [60, 100, 160])
def test_only_the_text_gives_way_to_a_narrow_terminal(report: ReportData, width: int) -> None:
    queries = [dataclasses.replace(query, label="entertainment") for query in report.queries]

    text = printed(dataclasses.replace(report, queries=queries), width)

    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "entertainment" in text


def test_a_text_can_neither_style_nor_steer_the_terminal(report: ReportData) -> None:
    query = dataclasses.replace(report.queries[0], text="[red]loud[/red] \x1b[2Jgone [/nothing]", label="[b]")

    text = printed(dataclasses.replace(report, queries=[query], notes=["[link=x]note"]))

    assert "[red]loud[/red] \ufffd[2Jgone [/nothing]" in text
    assert "[[b]]" in text
    assert "[link=x]note" in text
    assert "\x1b[2J" not in text


def test_a_run_without_labels_weights_or_measures_prints_its_proponents(report: ReportData) -> None:
    bare = dataclasses.replace(report, precision=(), tail_patch=(), comparisons=(), weights=(), notes=())

    text = printed(bare)

    assert "Query 1" in text
    assert "precision@" not in text
