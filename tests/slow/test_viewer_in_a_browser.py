"""What `gradstore serve` shows in a real, headless Chromium: it fits, complains of nothing, and asks nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import CHROMIUM, Browser, Page
from tests.slow.test_report_in_a_browser import OVERFLOWING
from tests.unit.test_report_page import contrast
from tests.viewer import HOSTILE, make_hostile_run, served

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")]

PLACES = ("/", "/queries", "/queries/block/1", "/weights", "/evaluations", "/jobs", "/health", "/nothing")
# Of whatever takes the focus or is a picture: those without a name for who cannot see it.
NAMELESS = """[...document.querySelectorAll('a, button, input:not([type=hidden]), select, summary, meter, [role=img], img')]
    .filter((e) => !(e.getAttribute('alt') === '' || e.getAttribute('aria-hidden') || e.innerText?.trim() || e.alt
        || e.ariaLabel || e.labels?.[0]?.innerText.trim())).map((e) => e.outerHTML.slice(0, 80))"""
# Headings that skip a level, and references to what is not there.
SKIPPING = """[...document.querySelectorAll('h1, h2, h3, h4, h5')].map((e) => +e.tagName[1])
    .filter((level, index, all) => level > (index ? all[index - 1] : 0) + 1)"""
DANGLING = """[...document.querySelectorAll('[aria-labelledby], [aria-controls], [for]')]
    .flatMap((e) => ['aria-labelledby', 'aria-controls', 'for'].map((name) => e.getAttribute(name)))
    .filter((id) => id && !document.getElementById(id))"""
# Texts with the colours that they have and stand on.
COLOURS = """[...document.querySelectorAll('body *')].filter((e) => e.getClientRects().length
        && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) && !e.closest('svg, .hidden, .skip'))
    .map((e) => {
        let ground = e;
        while (ground && /rgba\\(0, 0, 0, 0\\)|oklab/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
        return [getComputedStyle(e).color, ground ? getComputedStyle(ground).backgroundColor : 'rgb(255, 255, 255)', e.outerHTML.slice(0, 60)];
    })"""
FOCUSED = "document.activeElement.outerHTML.slice(0, 200)"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    spec = make_hostile_run(tmp_path_factory.mktemp("viewed"))
    with served(spec.run.store) as address:
        yield address


def settled() -> str:
    return "new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))"


def hexadecimal(colour: str) -> str:
    """``rgb(r, g, b)`` or ``rgba(r, g, b, a)`` as ``#rrggbb``."""
    red, green, blue, *_ = (int(part) for part in colour.partition("(")[2].strip(")").split(",")[:3])
    return f"#{red:02x}{green:02x}{blue:02x}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("place", PLACES)
def test_a_page_fits_can_be_read_and_asks_nobody_else(
    browser: Browser, address: str, place: str, width: int, scheme: str
) -> None:
    async def look(page: Page) -> None:
        await page.open(address + place, width=width, scheme=scheme)
        await page.run("for (const d of document.querySelectorAll('details')) d.open = true")
        await page.run(settled())

        assert await page.run("document.documentElement.scrollWidth") == width
        assert await page.run(OVERFLOWING.replace("WIDTH", str(width))) == []
        assert await page.run(NAMELESS) == []
        assert await page.run(SKIPPING) == []
        assert await page.run(DANGLING) == []
        assert await page.run("document.querySelectorAll('h1').length") == 1
        assert await page.run("document.querySelectorAll('main').length") == 1
        faint = [
            (colour, ground, where)
            for colour, ground, where in await page.run(COLOURS)
            if contrast(hexadecimal(colour), hexadecimal(ground)) < 4.5
        ]
        assert faint == []
        expected = ["404"] if place == "/nothing" else []
        assert [complaint for complaint in page.complaints if not any(code in complaint for code in expected)] == []
        assert {url for url in page.requests if not url.startswith((address, "data:"))} == set()

    browser.visit(look)


def test_what_a_corpus_smuggles_in_stays_text(browser: Browser, address: str) -> None:
    async def look(page: Page) -> None:
        for place in PLACES:
            await page.open(address + place, width=1440)
            await page.run("for (const d of document.querySelectorAll('details')) d.open = true")
            await page.run(settled())
            assert await page.run("'hit' in window || !!document.getElementById('hit')") is False, place
            assert await page.run("document.querySelectorAll('img').length") == 0, place
        await page.open(f"{address}/queries/block/1", width=1440)
        label = await page.run("document.querySelector('.asked .label').textContent")
        assert label == f"{HOSTILE[:59]}\N{HORIZONTAL ELLIPSIS}"

    browser.visit(look)


def test_keys_reach_everything_in_its_order_and_step_through_the_queries(browser: Browser, address: str) -> None:
    async def look(page: Page) -> None:
        await page.open(f"{address}/queries/block/1", width=1440)
        seen = []
        for _ in range(12):
            await page.press("Tab")
            seen.append(await page.run(FOCUSED))
            assert "none" not in await page.run("getComputedStyle(document.activeElement).outlineStyle")
        assert "Skip to the content" in seen[0]
        assert [title for title in ("Overview", "Queries", "Weights", "Jobs") if any(title in one for one in seen)] == [
            "Overview",
            "Queries",
            "Weights",
            "Jobs",
        ]
        assert any('rel="prev"' in one for one in seen)

        await page.run("document.activeElement.blur()")
        await follow(page, "ArrowRight")
        assert await page.run("location.pathname") == "/queries/block/2"
        await follow(page, "ArrowLeft")
        assert await page.run("location.pathname") == "/queries/block/1"

        await page.run("document.querySelector('summary').focus()")
        await page.press("Enter")
        await page.run(settled())
        assert await page.run("document.querySelectorAll('.layers dt').length") > 1

    browser.visit(look)


async def follow(page: Page, key: str) -> None:
    """Press a key, and wait for the page that it leads to."""
    await page.run("window.old = true")
    await page.press(key)
    for _ in range(100):
        if not await page.run("'old' in window") and await page.run("document.readyState") == "complete":
            return
        await page.run("new Promise((done) => setTimeout(done, 50))")
    raise TimeoutError(key)


def test_weights_and_rankings_are_chosen_and_set_side_by_side(browser: Browser, address: str) -> None:
    async def look(page: Page) -> None:
        await page.open(f"{address}/weights", width=1440)
        boxes = "[...document.querySelectorAll('.choose input')].map((e) => [e.value, e.checked])"
        assert await page.run(boxes) == [["learned", True], ["learned-style", True]]
        assert await page.run("document.querySelectorAll('figure').length") == 2
        assert await page.run("document.querySelectorAll('.cells').length") >= 1

        await page.open(f"{address}/queries/block/0?by=unweighted&by=learned&by=learned-style", width=1440)
        columns: Any = await page.run(
            "[...document.querySelectorAll('.side:first-of-type .column')].map((e) => e.offsetTop)"
        )
        assert len(columns) == 3
        assert await page.run("document.querySelectorAll('.column .ranked > li').length") == 60

    browser.visit(look)


def test_pages_are_whole_without_scripts(browser: Browser, address: str) -> None:
    async def look(page: Page) -> None:
        await page.open(f"{address}/queries/block/0", width=1440, scripts=False)
        tree = await page.call("Page.getLayoutMetrics")

        assert tree["cssContentSize"]["height"] > 1500
        assert page.complaints == []

    browser.visit(look)


@pytest.mark.skipif("SCREENSHOTS" not in os.environ, reason="make screenshots takes them, of a store of images")
def test_the_screenshots_of_the_docs(browser: Browser) -> None:
    folder = Path(__file__).parents[2] / "docs" / "images"
    folder.mkdir(exist_ok=True)

    async def look(page: Page) -> None:
        await page.open(f"{images}/queries", width=1100)
        query = await page.run("document.querySelector('.listed li:nth-child(4) a').getAttribute('href')")
        for name, place in {"query": query, "weights": "/weights", "evaluations": "/evaluations"}.items():
            await page.open(images + place, width=1100)
            await page.run(settled())
            (folder / f"viewer-{name}.png").write_bytes(await page.screenshot())

    with served(os.environ["SCREENSHOTS"]) as images:
        browser.visit(look)
