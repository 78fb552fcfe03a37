from __future__ import annotations

import math

import pytest

from gradstore.stages.report import Group, WeightVector
from gradstore.stages.report.formatting import TIMES
from gradstore.stages.report.layers import MAX_FUNCTIONS, NO_DEPTH, OTHER, draw_weights, lay_out, sum_parts
from tests.reports import FUNCTIONS, make_groups


def test_groups_stand_at_their_depth_and_function() -> None:
    layout = lay_out(make_groups(3))

    assert layout.depths == ("0", "1", "2")
    assert layout.functions == FUNCTIONS
    assert (layout.depth_of[8], layout.function_of[8]) == (1, 1)
    assert layout.titles[8] == "1 · self_attn.k_proj"


def test_the_experts_of_a_mixture_are_one_function() -> None:
    groups = [
        Group(name=f"layers.{depth}.mlp.experts.{expert}.up", depth=depth, function=f"mlp.experts.{expert}.up")
        for depth in range(2)
        for expert in range(64)
    ]

    layout = lay_out(groups)
    chart = draw_weights(WeightVector(name="w", weights=[1 / 128] * 128), layout)

    assert layout.functions == ("mlp.experts.*.up",)
    assert not chart.series[0].joined


def test_functions_beyond_the_colours_are_told_as_other() -> None:
    groups = [Group(name=f"0.{name}", depth=0, function=name) for name in "abcdefghijkl"]

    layout = lay_out(groups)

    assert len(layout.functions) == MAX_FUNCTIONS
    assert layout.functions[-1] == OTHER
    assert layout.function_of == (0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 7, 7)


def test_groups_outside_of_the_blocks_have_a_place_of_their_own() -> None:
    groups = [*make_groups(2), Group(name="score", depth=None, function="score")]

    layout = lay_out(groups)

    assert layout.depths == ("0", "1", NO_DEPTH)
    assert layout.depth_of[-1] == 2
    assert layout.titles[-1] == "score"


def test_a_model_without_depths_is_laid_out_in_its_own_order() -> None:
    layout = lay_out([Group(name=name, depth=None, function=name) for name in ("fc1", "fc2", "fc3")])

    assert layout.axis == "group"
    assert layout.depth_of == (0, 1, 2)


def test_groups_that_would_read_the_same_keep_their_names() -> None:
    groups = [Group(name=f"{part}.0.attn.q", depth=0, function="attn.q") for part in ("encoder", "decoder")]

    layout = lay_out(groups)

    assert layout.titles == ("encoder.0.attn.q", "decoder.0.attn.q")


def test_sums_by_depth_and_by_function_add_up_to_the_score() -> None:
    parts = [0.1 * j for j in range(21)]

    by_depth, by_function = sum_parts(parts, lay_out(make_groups(3)))

    assert by_depth == pytest.approx([2.1, 7.0, 11.9])
    assert by_function[6] == pytest.approx(0.6 + 1.3 + 2.0)
    assert sum(by_function) == pytest.approx(sum(parts))


def test_a_weight_is_drawn_at_its_multiple_of_the_uniform_weight() -> None:
    groups = [Group(name=f"{depth}.up", depth=depth, function="up") for depth in range(4)]

    chart = draw_weights(WeightVector(name="w", weights=[0.1, 0.2, 0.3, 0.4]), lay_out(groups))

    # The axis ends at 2 times the uniform weight 1/4, a round number above 1.6.
    assert [tick.label for tick in chart.y_ticks] == [value + TIMES for value in ("0", "0.5", "1", "1.5", "2")]
    assert [point.x for point in chart.series[0].points] == pytest.approx([12.5, 37.5, 62.5, 87.5])
    assert [point.y for point in chart.series[0].points] == pytest.approx([80, 60, 40, 20])
    assert chart.uniform == pytest.approx(50)
    assert chart.series[0].points[3].title == f"3 · up: 0.4, 1.60 {TIMES} uniform"


def test_a_functions_share_of_all_weight_is_told_beside_its_uniform_share() -> None:
    groups = [Group(name=f"0.{name}", depth=0, function=name) for name in ("a", "b")]

    chart = draw_weights(WeightVector(name="w", weights=[0.25, 0.75]), lay_out(groups))

    assert chart.shares == ((0.25, 0.5), (0.75, 0.5))
    assert [[cell and cell.weight for cell in row] for row in chart.cells] == [[0.5, 1.5]]


def test_a_weight_that_is_no_number_is_left_out() -> None:
    chart = draw_weights(WeightVector(name="w", weights=[math.nan] * 7), lay_out(make_groups(1)))

    assert all(not series.points for series in chart.series)
    assert all(cell is None for row in chart.cells for cell in row)
