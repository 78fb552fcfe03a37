"""What README and docs show works: Python blocks run beside the demo's store, commands exist, links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.browser import CHROMIUM, Browser, Page
from tests.runs import gradstore
from tests.unit.test_docs import NOTEBOOKS, PAGES, ROOT, blocks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_a_block_of_python_runs_beside_the_demo(demo: Path, page: str, code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=demo, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_beside_the_demo(demo: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Notebooks call commands by their names.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]

    ran = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(demo)}}).execute()

    printed = "".join(output.get("text", "") for cell in ran.cells for output in cell.get("outputs", []))
    assert "without weights" in printed
    assert any("image/png" in output.get("data", {}) for cell in ran.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize(("page", "code"), blocks("sh"))
def test_a_command_that_is_shown_exists(page: str, code: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    targets |= {f"tables-{study.parent.name}" for study in (ROOT / "pipelines").glob("*/study.toml")}
    for line in filter(None, (text.partition("#")[0].strip() for text in code.splitlines())):
        program, *arguments = line.split()
        if program == "make":
            assert set(arguments) <= targets, f"{page}: {line}"
        elif program == "dask":
            shown = subprocess.run(
                [Path(sys.executable).parent / "dask", arguments[0], "--help"],
                capture_output=True,
                text=True,
                check=True,
            )
            options = [word for word in arguments if word.startswith("--")]
            assert all(option in shown.stdout for option in options), f"{page}: {line}"
        else:
            assert program == "gradstore", f"{page}: {line}"
            assert gradstore(arguments[0], "--help").returncode == 0, f"{page}: {line}"


def test_every_command_is_documented() -> None:
    shown = gradstore("--help").stdout
    commands = re.findall(r"^  ([\w-]+)  ", shown[shown.index("Commands:") :], re.MULTILINE)
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len(commands) == 34
    for command in commands:
        assert re.search(rf"(`|gradstore ){command}\b", text), command


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, which builds strictly."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = subprocess.run(
        [Path(sys.executable).parent / "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_has_every_page(site: Path) -> None:
    written = [page for page in (ROOT / "docs").rglob("*.md") if page.stem != "index"]
    assert (site / "index.html").exists()
    assert [
        page for page in written if not (site / page.relative_to(ROOT / "docs").with_suffix("") / "index.html").exists()
    ] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_search_of_the_site_finds_a_page_and_asks_nobody_else(site: Path, browser: Browser) -> None:
    async def look(page: Page) -> None:
        await page.open(f"{address}/", width=1440)
        await page.run("document.querySelector('[data-md-component=search-query]').focus()")
        await page.call("Input.insertText", text="kubernetes")
        for _ in range(200):
            links = await page.run("[...document.querySelectorAll('.md-search-result__link')].map((e) => e.href)")
            if links:
                break
            await page.run("new Promise((done) => setTimeout(done, 50))")
        (found, *_) = [link for link in links if link.startswith(f"{address}/clusters/")]
        await page.open(found, width=1440)
        assert "Kubernetes" in await page.run("document.querySelector('article').innerText")
        assert page.complaints == []
        assert any("search_index.json" in url for url in page.requests)
        assert {url for url in page.requests if not url.startswith((f"{address}/", "data:"))} == set()

    handler = partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            browser.visit(look)
        finally:
            server.shutdown()
            thread.join()
