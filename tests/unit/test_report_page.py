from __future__ import annotations

import base64
import dataclasses
import hashlib
import itertools
import math
import re
from html.parser import HTMLParser
from importlib import resources

import numpy as np
import pytest

from gradstore.stages.report import (
    UNWEIGHTED,
    Comparison,
    Group,
    MeasuredRow,
    PrecisionRow,
    RankedExample,
    ReportData,
    render_page,
)
from gradstore.stages.report.page import TEXT_LIMIT
from tests.reports import make_report

HOSTILE = (
    """</script></style></title></textarea>--><img src=x onerror="hit()"><svg onload='hit()'>" ' &lt; {{ 7 * 7 }}"""
)


class Parsed(HTMLParser):
    """Every tag, attribute and piece of text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, attribute: str) -> list[str]:
        return [value or "" for name, value in self.attributes if name == attribute]


@pytest.fixture(scope="module")
def report() -> ReportData:
    return make_report(num_queries=3, k=4, num_depths=5, num_train=40)


def replace_ranked(report: ReportData, **changes: object) -> ReportData:
    """The report with the same changes made to every ranked example."""
    queries = [
        dataclasses.replace(
            query,
            rankings={
                name: [dataclasses.replace(example, **changes) for example in ranked]  # type: ignore[arg-type]
                for name, ranked in query.rankings.items()
            },
        )
        for query in report.queries
    ]
    return dataclasses.replace(report, queries=queries)


def filled_with(report: ReportData, text: str) -> ReportData:
    """The report with one text wherever a text of the store or of run.toml can stand."""
    report = replace_ranked(report, text=text, label=text, example_id=text)
    return dataclasses.replace(
        report,
        name=text,
        facts=[(text, text)],
        groups=[Group(name=text, depth=group.depth, function=group.function + text) for group in report.groups],
        weights=[dataclasses.replace(vector, name=text) for vector in (*report.weights, *report.weights)],
        queries=[
            dataclasses.replace(
                query,
                query_id=text,
                label=text,
                text=text,
                rankings={UNWEIGHTED: query.rankings[UNWEIGHTED], text: query.rankings["learned"]},
            )
            for query in report.queries
        ],
        precision=[PrecisionRow(method=text, precision=0.5, chance=0.2)],
        tail_patch=[MeasuredRow(method=text, mean=1, ci_low=0, ci_high=2, queries=10)],
        comparisons=[
            Comparison(measure="x", weights=text, difference=1, ci_low=low, ci_high=2, queries=10) for low in (-1, 1)
        ],
        notes=[text],
    )


def test_every_text_of_the_store_stays_text(report: ReportData) -> None:
    clean, parsed = (Parsed(render_page(filled_with(report, text))) for text in ("plain", HOSTILE))

    assert parsed.tags == clean.tags
    assert {name for name, _ in parsed.attributes} == {name for name, _ in clean.attributes}
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert sum(HOSTILE in text for text in parsed.texts) > 50


def test_the_page_asks_the_network_for_nothing(report: ReportData) -> None:
    page = render_page(report)
    parsed = Parsed(page)

    assert all(target.startswith("#") for target in parsed.values("href"))
    assert not parsed.values("src")
    assert not parsed.values("style")
    assert "link" not in parsed.tags
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|import\(", page)


def test_the_policy_allows_the_pages_own_script_and_style_and_nothing_else(report: ReportData) -> None:
    page = render_page(report)

    (policy,) = [value for value in Parsed(page).values("content") if "default-src" in value]
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy


def test_the_page_of_the_demo_stays_under_six_megabytes() -> None:
    page = render_page(make_report(num_queries=60, k=10, num_depths=30))

    assert len(page.encode()) < 6e6


def test_a_long_text_is_cut_and_says_so(report: ReportData) -> None:
    page = render_page(replace_ranked(report, text="x" * (TEXT_LIMIT + 1234)))

    assert "x" * TEXT_LIMIT in page
    assert "x" * (TEXT_LIMIT + 1) not in page
    assert "1,234 more characters" in page


def test_what_utf8_cannot_hold_or_html_may_not_is_replaced(report: ReportData) -> None:
    page = render_page(replace_ranked(report, text="a\x00b\ud800c\x1b[31md\r\ne"))

    assert "a\ufffdb\ufffdc\ufffd[31md\ne" in page
    page.encode("utf-8")


def test_the_stored_sums_of_parts_add_up_to_the_score(report: ReportData) -> None:
    example = report.queries[0].rankings["learned"][0]

    encoded = Parsed(render_page(report)).values("data-parts")

    best = next(code for code in encoded if decode(code, "depth") == pytest.approx(sums(example, report), abs=0.02))
    assert sum(decode(best, "depth")) == pytest.approx(1e3 * example.score, rel=0.01)
    assert sum(decode(best, "function")) == pytest.approx(1e3 * example.score, rel=0.01)


def sums(example: RankedExample, report: ReportData) -> list[float]:
    by_depth = dict.fromkeys(range(5), 0.0)
    for group, part in zip(report.groups, example.parts, strict=True):
        assert group.depth is not None
        by_depth[group.depth] += 1e3 * part
    return list(by_depth.values())


def decode(code: str, axis: str) -> list[float]:
    unit, *axes = code.split("|")
    return [int(whole) * float(unit) for whole in axes[axis == "function"].split(",")]


def test_a_ranking_says_where_its_examples_stood_without_weights(report: ReportData) -> None:
    def ranked(*examples: str) -> list[RankedExample]:
        parts = [0.5] * len(report.groups)
        return [
            RankedExample(
                side="proponent", rank=rank, example_id=name, label=None, text=name, score=sum(parts), parts=parts
            )
            for rank, name in enumerate(examples, start=1)
        ]

    rankings = {UNWEIGHTED: ranked("a", "b", "c", "d"), "learned": ranked("c", "b", "x", "a")}
    query = dataclasses.replace(report.queries[0], rankings=rankings)

    page = render_page(dataclasses.replace(report, queries=[query]))

    moves = re.findall(r'<span class="move" title="([^"]*)">([^<]*)</span>', page)
    assert moves == [
        ("rank 3 without weights", "↑2"),
        ("same rank without weights", "="),
        ("not in the list without weights", "new"),
        ("rank 1 without weights", "↓3"),
    ]
    assert "3 in both lists" in page


def test_a_label_equal_to_the_querys_is_marked_and_counted(report: ReportData) -> None:
    query = report.queries[0]
    same = sum(example.label == query.label for example in query.rankings[UNWEIGHTED] if example.side == "proponent")

    page = render_page(dataclasses.replace(report, queries=[query]))

    assert f"{same} of 4 same label" in page
    assert f'<span class="label same">{query.label}</span>' in page


def test_a_run_without_labels_weights_or_measures_shows_what_it_has(report: ReportData) -> None:
    bare = replace_ranked(report, label=None)
    queries = [
        dataclasses.replace(query, label=None, rankings={UNWEIGHTED: query.rankings[UNWEIGHTED]})
        for query in bare.queries
    ]
    page = render_page(
        dataclasses.replace(
            bare, queries=queries, weights=(), precision=(), tail_patch=(), comparisons=(), notes=(), facts=()
        )
    )

    assert "Without weights" in page
    for absent in ("same label", "Learned weights", "For and against", "Tail-patch", "precision@", 'class="move"'):
        assert absent not in page


def test_what_speaks_for_and_against_the_weights_is_said_of_each(report: ReportData) -> None:
    said = re.findall(r'<li class="(better|worse|unknown)">(.*?)</li>', render_page(report))

    assert said == [
        (
            "better",
            "Tail-patch: weights “learned” do better than none (difference +0.060, 95 % interval +0.011 to +0.12, "
            "10 queries).",
        ),
        (
            "unknown",
            "Label precision@10: with weights “learned” no difference can be told (difference \u22120.040, 95 % interval "
            "\u22120.090 to +0.0083, 60 queries).",
        ),
    ]


def test_every_vector_has_a_chart_and_every_ranking_a_column_beside_that_without_weights(report: ReportData) -> None:
    vectors = [dataclasses.replace(report.weights[0], name=name) for name in ("learned", "from-other")]
    query = report.queries[0]
    rankings = {**query.rankings, "from-other": query.rankings["learned"]}

    page = render_page(
        dataclasses.replace(report, weights=vectors, queries=[dataclasses.replace(query, rankings=rankings)])
    )

    assert page.count('class="weight-plot"') == 2
    titles = re.findall(r"<h4>(With[^<]*)", page)
    assert [title.strip() for title in titles] == 2 * [
        "Without weights",
        "With weights “learned”",
        "With weights “from-other”",
    ]


def test_a_run_without_queries_says_so(report: ReportData) -> None:
    page = render_page(dataclasses.replace(report, queries=()))

    assert "No query was scored." in page


def test_a_score_that_is_no_number_is_shown_as_missing(report: ReportData) -> None:
    parts = [math.nan] * len(report.groups)

    page = render_page(replace_ranked(report, score=math.nan, parts=parts))

    assert page.count('<span class="score">n/a</span>') == 3 * 2 * 8
    assert not Parsed(page).values("data-parts")


def test_parts_of_another_number_of_groups_are_our_bug(report: ReportData) -> None:
    with pytest.raises(AssertionError, match="2 parts, 35 groups"):
        replace_ranked(report, parts=[0.1, 0.2])


# Colours. sRGB to linear light (IEC 61966-2-1), contrast (WCAG 2.2), OKLab (Ottosson 2020), and dichromats as simulated
# by Machado, Oliveira and Fernandes (2009), severity 1.
EYES = {
    "normal": np.eye(3),
    "deuteranopic": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "protanopic": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "tritanopic": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}


def palette(mode: str) -> dict[str, str]:
    style = resources.files("gradstore.stages.report").joinpath("report.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    return colours if mode == "light" else colours | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark))


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


TO_CONES = np.array(
    [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.6806995, 0.10739696], [0.08830246, 0.28171884, 0.6299787]]
)
FROM_CONES = np.array(
    [[0.21045426, 0.79361779, -0.00407205], [1.9779985, -2.42859221, 0.45059371], [0.02590404, 0.78277177, -0.80867577]]
)


def oklab(light: np.ndarray) -> np.ndarray:
    return np.asarray(FROM_CONES @ np.cbrt(TO_CONES @ np.clip(light, 0, 1)))


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_marks_stand_out_from_their_ground(mode: str) -> None:
    colour = palette(mode)

    for text, ground in [
        ("ink", "ground"),
        ("ink", "raised"),
        ("ink", "hover"),
        ("ink", "accent-ground"),
        ("quiet", "ground"),
        ("quiet", "raised"),
        ("quiet", "hover"),
        ("quiet", "accent-ground"),
        ("accent", "accent-ground"),
        ("positive", "ground"),
        ("negative", "ground"),
    ]:
        assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
    for function in range(8):
        assert contrast(colour[f"fn-{function}"], colour["ground"]) >= 3, function


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("eyes", EYES)
def test_colours_differ_for_every_kind_of_eye(mode: str, eyes: str) -> None:
    colour = palette(mode)
    functions = [oklab(EYES[eyes] @ linear(colour[f"fn-{function}"])) for function in range(8)]
    signs = [oklab(EYES[eyes] @ linear(colour[sign])) for sign in ("positive", "negative")]

    # 0.02 is just noticeable side by side; a line among seven needs several times that.
    assert min(float(np.linalg.norm(one - other)) for one, other in itertools.combinations(functions, 2)) > 0.09
    assert float(np.linalg.norm(signs[0] - signs[1])) > 0.15
