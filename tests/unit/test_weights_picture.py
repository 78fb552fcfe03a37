"""Weights drawn: one SVG that any viewer takes, whatever groups and weights are called."""

from __future__ import annotations

import dataclasses
import re
from importlib import resources
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from gradstore.stages.report import Group, WeightVector
from gradstore.stages.report.formatting import TIMES
from gradstore.stages.report.layers import NO_DEPTH
from gradstore.stages.show_weights.picture import FUNCTION_COLOURS, Drawing, draw_page, draw_picture
from tests.reports import make_groups

SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
HOSTILE = "</svg><script>hit()</script>\x00\ufffe\ud800\x1b[2J \"'&lt;{{ 7 * 7 }}]]>"


def drawing(*names: str, num_depths: int = 3) -> Drawing:
    """Weights that grow along the groups, those of every name a bit steeper."""
    groups = make_groups(num_depths)
    raw = [np.arange(1.0, len(groups) + 1) ** power for power in range(1, len(names) + 1)]
    weights = [values / values.sum() for values in raw]
    units = [values / np.linalg.norm(values) for values in weights]
    return Drawing(
        name="run",
        groups=groups,
        vectors=[WeightVector(name=name, weights=w.tolist()) for name, w in zip(names, weights, strict=True)],
        similarity=[[float(one @ other) for other in units] for one in units],
    )


def texts(root: ET.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_a_vector_has_one_mark_for_each_group_and_its_sums_beside() -> None:
    root = ET.fromstring(draw_picture(drawing("learned")))

    panel = root.findall(f"{SVG}g")[0]
    marks = [use for use in panel.iter(f"{SVG}use") if use.find(f"{SVG}title") is not None]
    assert len(marks) == 21
    assert {use.get(LINK) for use in marks} == {f"#marker-{function}" for function in range(7)}
    shown = texts(root)
    # Weights are 1 ... 21 over 231: the first function has 1 + 8 + 15 of it, the first depth 1 + ... + 7.
    assert f"{100 * 24 / 231:.1f} %" in shown
    titles = [element.text for element in root.iter(f"{SVG}title")]
    assert f"depth 0: {100 * 28 / 231:.1f} %" in titles
    assert f"2 · mlp.down_proj: {21 / 231:.3g}, {21 * 21 / 231:.2f} {TIMES} uniform" in titles
    assert "Cosines between the weights" not in shown


def test_a_mark_stands_at_its_multiple_of_the_uniform_weight() -> None:
    groups = [Group(name=f"{depth}.up", depth=depth, function="up") for depth in range(4)]
    made = Drawing(
        name="run",
        groups=groups,
        vectors=[WeightVector(name="w", weights=[0.0, 0.25, 0.25, 0.5])],
        similarity=[[1.0]],
    )

    root = ET.fromstring(draw_picture(made))

    heights = [float(use.get("y") or "") for use in root.iter(f"{SVG}use") if use.find(f"{SVG}title") is not None]
    (uniform,) = [line for line in root.iter(f"{SVG}line") if line.get("stroke-dasharray")]
    bottom = max(heights)
    assert heights[1] == heights[2] == float(uniform.get("y1") or "")
    assert bottom == heights[0] == 220
    assert bottom - heights[3] == pytest.approx(2 * (bottom - heights[1]), abs=0.05)


def test_several_vectors_have_a_panel_each_and_the_square_of_their_cosines() -> None:
    made = drawing("learned", "from-other", "third")

    root = ET.fromstring(draw_picture(made))

    *panels, square = root.findall(f"{SVG}g")
    assert [texts(panel)[0] for panel in panels] == ["learned", "from-other", "third"]
    cells = [text for text in texts(square) if re.fullmatch(r"[01]\.\d\d", text)]
    assert cells == [f"{value:.2f}" for row in made.similarity for value in row]


def test_names_stay_text_and_the_file_is_whole_xml() -> None:
    made = drawing("learned", "from-other")
    hostile = Drawing(
        name=HOSTILE,
        groups=[Group(name=HOSTILE, depth=group.depth, function=group.function + HOSTILE) for group in made.groups],
        vectors=[dataclasses.replace(vector, name=HOSTILE) for vector in made.vectors],
        similarity=made.similarity,
    )

    plain, root = (ET.fromstring(draw_picture(of).encode("utf-8")) for of in (made, hostile))

    assert [element.tag for element in root.iter()] == [element.tag for element in plain.iter()]
    assert any("<script>hit()" in text for text in texts(root))


@pytest.mark.parametrize("depths", [(None,), (None, None, None), (0, None, 70)])
def test_groups_without_depth_or_far_apart_are_drawn(depths: tuple[int | None, ...]) -> None:
    groups = [Group(name=f"g{place}", depth=depth, function=f"f{place}") for place, depth in enumerate(depths)]
    weights = [1 / len(groups)] * len(groups)
    made = Drawing(name="run", groups=groups, vectors=[WeightVector(name="w", weights=weights)], similarity=[[1.0]])

    root = ET.fromstring(draw_picture(made))

    assert sum(use.find(f"{SVG}title") is not None for use in root.iter(f"{SVG}use")) == len(groups)


def test_the_page_holds_the_picture_and_the_rows_and_asks_for_nothing() -> None:
    made = drawing(HOSTILE, "other", num_depths=1)
    items = [
        {
            "name": vector.name,
            "rows": [{"group": HOSTILE, "weight": 0.25, "ratio": 1.75}, {"group": None, "weight": 0.75, "ratio": 0.5}],
        }
        for vector in made.vectors
    ]

    page = draw_page(made, {"by": "group", "weights": items})

    assert "<svg " in page
    assert page.count("<td>0.250000</td><td>1.750</td>") == 2
    assert f'<th scope="row">{NO_DEPTH}</th>' in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"(?<!xlink:)href=|src=|url\(", page)
    page.encode("utf-8")


def test_equal_weights_make_equal_bytes_in_the_colours_of_the_report() -> None:
    assert draw_picture(drawing("learned")) == draw_picture(drawing("learned"))
    style = resources.files("gradstore.stages.report").joinpath("report.css").read_text(encoding="utf-8")
    light = re.findall(r"--fn-\d: (#[0-9a-f]{6})", style)[:8]
    assert tuple(light) == FUNCTION_COLOURS
