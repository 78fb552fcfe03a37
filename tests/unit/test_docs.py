"""Pages of the docs: the reference of commands is what the program says, every page has its place, and what is shown is whole."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md"), *(ROOT / "pipelines").rglob("*.md")])
NOTEBOOKS = sorted((ROOT / "pipelines").rglob("*.ipynb"))


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every block of a language."""
    found = []
    for page in PAGES:
        for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found.append((str(page.relative_to(ROOT)), text))
    return found


def test_the_reference_of_commands_is_what_the_program_says(tmp_path: Path) -> None:
    written = tmp_path / "commands.md"
    program = Path(sys.executable).parent / "typer"
    arguments = [
        "gradstore.cli",
        "utils",
        "docs",
        "--name",
        "gradstore",
        "--title",
        "Commands",
        "--output",
        str(written),
    ]
    subprocess.run([program, *arguments], capture_output=True, check=True)

    # `make docs` writes it anew.
    assert written.read_text(encoding="utf-8").strip() == (DOCS / "commands.md").read_text(encoding="utf-8").strip()


def test_every_page_has_its_place_in_the_navigation() -> None:
    class Loader(yaml.SafeLoader):
        """Reads mkdocs.yml, which may name Python objects."""

    # Nothing else is read of them.
    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def pages(node: object) -> list[str]:
        if isinstance(node, dict):
            return [page for value in node.values() for page in pages(value)]
        return [page for item in node for page in pages(item)] if isinstance(node, list) else [str(node)]

    listed = pages(site["nav"])
    assert len(listed) == len({*listed})
    assert {*listed} == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_what_is_shown_of_a_run_is_toml(page: str, text: str) -> None:
    assert tomllib.loads(text), page


def test_every_language_of_a_block_is_run_or_checked_somewhere() -> None:
    """Python runs beside the demo and commands exist (tests/slow/test_documentation.py), TOML is read above; the rest only shows."""
    shown = {"console", "text", "json", "jinja"}
    for page in PAGES:
        languages = re.findall(r"^```(\w*)\n.*?^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        assert {*languages} <= {"python", "sh", "toml"} | shown, page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.name for path in NOTEBOOKS])
def test_a_notebook_is_kept_without_what_it_printed(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells
    assert [cell for cell in cells if cell.outputs or cell.execution_count is not None] == []
