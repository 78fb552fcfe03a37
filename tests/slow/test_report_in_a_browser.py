"""The page in a real, headless Chromium: no request, no complaint, no overflow, and hands on the keyboard."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gradstore.stages.report import render_page
from tests.browser import CHROMIUM, Browser, Page
from tests.reports import make_report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")]

# The width is written in: a page that overflows on a telephone widens what the window says of itself.
OVERFLOWING = """[...document.querySelectorAll('body *')]
    .filter((e) => e.getClientRects().length && !e.closest('.scroll, .hidden, .skip, .defs')
        && e.getBoundingClientRect().right > WIDTH + 1)
    .map((e) => `${e.tagName}.${e.getAttribute('class')}`).slice(0, 5)"""
SHOWN = "[...document.querySelectorAll('.query')].filter((e) => e.offsetHeight > 0).map((e) => e.id)"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(make_report()), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1440])
def test_the_page_fits_its_window_and_asks_for_nothing(browser: Browser, demo: Path, width: int, scheme: str) -> None:
    async def look(page: Page) -> None:
        await page.open(demo, width=width, scheme=scheme)
        await page.run("for (const d of document.querySelectorAll('.current details, .table-of')) d.open = true")
        await page.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

        assert await page.run("document.documentElement.scrollWidth") == width
        assert await page.run(OVERFLOWING.replace("WIDTH", str(width))) == []
        assert await page.run("document.querySelectorAll('.current .layers').length") == 40
        assert len(await page.screenshot()) > 20_000
        assert page.complaints == []
        assert set(page.requests) == {demo.as_uri()}

    browser.visit(look)


def test_light_and_dark_are_not_the_same(browser: Browser, demo: Path) -> None:
    async def look(page: Page) -> None:
        grounds = []
        for scheme in ("light", "dark"):
            await page.open(demo, width=1440, scheme=scheme)
            grounds.append(await page.run("getComputedStyle(document.body).backgroundColor"))

        assert grounds == ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]

    browser.visit(look)


def test_arrow_keys_step_through_the_queries_and_the_address_follows(browser: Browser, demo: Path) -> None:
    async def look(page: Page) -> None:
        await page.open(demo, width=1440)
        assert await page.run(SHOWN) == ["query-1"]

        await page.press("ArrowRight")
        await page.press("ArrowRight")
        await page.press("ArrowLeft")

        assert await page.run(SHOWN) == ["query-2"]
        assert await page.run("location.hash") == "#query-2"
        assert await page.run("document.querySelector('nav [aria-current]').hash") == "#query-2"

    browser.visit(look)


def test_a_link_to_a_query_opens_it(browser: Browser, demo: Path) -> None:
    async def look(page: Page) -> None:
        await page.open(demo, width=1440)

        await page.run("document.querySelectorAll('nav a')[41].click()")
        assert await page.run(SHOWN) == ["query-42"]

        await page.run("history.back(); new Promise((done) => setTimeout(done, 200))")
        await page.run("location.hash = '#query-7'; new Promise((done) => setTimeout(done, 200))")
        assert await page.run(SHOWN) == ["query-7"]

    browser.visit(look)


def test_a_score_opens_by_key_and_draws_its_layers(browser: Browser, demo: Path) -> None:
    async def look(page: Page) -> None:
        await page.open(demo, width=1440)

        await page.run("document.querySelector('.current summary').focus()")
        await page.press("Enter")
        await page.run("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")

        layers = "document.querySelector('.current .layers')"
        assert await page.run(f"{layers}.querySelectorAll('dt').length") == 7
        assert await page.run(f"{layers}.querySelectorAll('[data-tip]').length") == 30
        assert await page.run(f"{layers}.querySelector('[role=img]').ariaLabel.startsWith('Sums of parts by depth')")

    browser.visit(look)


def test_the_list_of_queries_opens_on_a_narrow_screen_and_filters(browser: Browser, demo: Path) -> None:
    listed = "[...document.querySelectorAll('nav li')].filter((e) => e.offsetHeight > 0).length"

    async def look(page: Page) -> None:
        await page.open(demo, width=360)
        assert await page.run(listed) == 0

        await page.run("document.getElementById('choose').click()")
        assert await page.run(listed) == 60

        await page.run("filter.value = 'SPORT'; filter.dispatchEvent(new Event('input'))")
        sport = sum("sport" in (query.label or "") + query.text for query in make_report().queries)
        assert await page.run(listed) == sport

    browser.visit(look)


@pytest.mark.parametrize("width", [360, 1440])
def test_every_marker_stands_at_its_weight(browser: Browser, demo: Path, width: int) -> None:
    off = """(() => {
        const plot = document.querySelector('.weight-plot').getBoundingClientRect();
        return Math.max(...[...document.querySelectorAll('.weight-plot use')].map((use) => {
            const box = use.getBoundingClientRect();
            const across = plot.left + plot.width * parseFloat(use.getAttribute('x')) / 100;
            const down = plot.top + plot.height * parseFloat(use.getAttribute('y')) / 100;
            return Math.hypot(box.left + box.width / 2 - across, box.top + box.height / 2 - down);
        }));
    })()"""

    async def look(page: Page) -> None:
        await page.open(demo, width=width)

        assert await page.run(off) < 1.5

    browser.visit(look)


def test_unticking_a_function_hides_its_line(browser: Browser, demo: Path) -> None:
    async def look(page: Page) -> None:
        await page.open(demo, width=1440)

        await page.run("document.querySelector('.toggle-3').click()")

        displays = await page.run("[...document.querySelectorAll('g.series')].map((g) => getComputedStyle(g).display)")
        assert displays == ["inline"] * 3 + ["none"] + ["inline"] * 3

    browser.visit(look)


def test_without_scripts_every_query_can_be_read(browser: Browser, demo: Path) -> None:
    async def look(page: Page) -> None:
        await page.open(demo, width=1440, scripts=False)

        tree = await page.call("Page.getLayoutMetrics")

        # One query is about 1,500 pixels tall; without scripts all sixty stand below each other.
        assert tree["cssContentSize"]["height"] > 40_000
        assert page.complaints == []

    browser.visit(look)


def test_a_text_that_smuggles_in_a_script_stays_text(browser: Browser, tmp_path: Path) -> None:
    hostile = "</script><img src=x onerror='window.hit = true'><svg onload='window.hit = true'><b id=hit>"
    report = make_report(num_queries=2, k=2, num_depths=3, num_train=20, texts=[hostile] * 22)
    path = tmp_path / "hostile.html"
    path.write_text(render_page(dataclasses.replace(report, name=hostile)), encoding="utf-8")

    async def look(page: Page) -> None:
        await page.open(path, width=1440)
        await page.run("for (const d of document.querySelectorAll('details')) d.open = true")
        await page.run("new Promise((done) => setTimeout(done, 100))")

        assert await page.run("'hit' in window || document.images.length > 0") is False
        assert await page.run("document.querySelector('.current .asked .text').textContent") == hostile
        assert page.complaints == []

    browser.visit(look)


def test_a_script_that_got_past_the_escaping_would_not_run(browser: Browser, tmp_path: Path) -> None:
    page_text = render_page(make_report(num_queries=1, k=1, num_depths=2, num_train=5))
    path = tmp_path / "forged.html"
    path.write_text(page_text.replace("</main>", "<script>window.hit = true</script></main>"), encoding="utf-8")

    async def look(page: Page) -> None:
        await page.open(path, width=1440)

        assert await page.run("'hit' in window") is False
        assert any("Content Security Policy" in complaint for complaint in page.complaints)

    browser.visit(look)
