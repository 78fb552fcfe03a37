"""Inputs that mean harm, or are broken, give one clear error each, and leave the store as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradstore.cli import app
from gradstore.errors import GradstoreError
from tests.hostile import DOCUMENTS, Hostile, arguments, inputs, make
from tests.runs import gradstore

pytestmark = pytest.mark.slow

# A message tells of an input; it does not repeat it.
LONGEST = 3_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("hostile") / "run"
    make(found)
    return found


@pytest.fixture(scope="module")
def hostile(folder: Path) -> list[Hostile]:
    return list(inputs(folder))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def in_place(folder: Path, item: Hostile) -> Iterator[None]:
    path = folder / item.path
    sound = path.read_bytes()
    path.write_bytes(item.content)
    try:
        yield
    finally:
        path.write_bytes(sound)


def is_named(item: Hostile, told: str) -> bool:
    """Whether a message names the file, or of run.toml the key."""
    is_key = item.path == "run.toml" and re.search(r"^[a-z]+\.[a-z_.]+: ", told, re.MULTILINE)
    return Path(item.path).name in re.sub(r"\s+", "", told) or bool(is_key)


def complaint(folder: Path, item: Hostile) -> str | None:
    """What is wrong with how a command takes an input; None if it is as it should be."""
    with in_place(folder, item):
        before = contents(folder)
        result = CliRunner().invoke(app, arguments(folder, item.command))
        after = contents(folder)
    if result.exception is None:
        return "was taken for sound"
    if not isinstance(result.exception, GradstoreError):
        return f"ended in {result.exception!r:.200}"
    told = f"{result.output}\n{result.exception}"
    if not is_named(item, told):
        return f"is not named: {told[:300]}"
    if len(str(result.exception)) > LONGEST:
        return f"is told in {len(str(result.exception)):,} characters"
    return None if after == before else "changed what is stored"


def test_every_hostile_input_is_told_by_name_and_changes_nothing(folder: Path, hostile: list[Hostile]) -> None:
    assert len(hostile) >= 200
    assert len({item.name for item in hostile}) == len(hostile)
    found = {item.name: wrong for item in hostile if (wrong := complaint(folder, item)) is not None}
    assert found == {}


@pytest.mark.parametrize("command", sorted({*DOCUMENTS.values(), "plan", "verify"}))
def test_the_commands_take_what_is_sound(folder: Path, command: str) -> None:
    result = CliRunner().invoke(app, arguments(folder, command))
    (folder / "out.parquet").unlink(missing_ok=True)
    assert result.exit_code == 0, result.output


def test_the_command_line_tells_of_twenty_of_them_without_a_traceback(folder: Path, hostile: list[Hostile]) -> None:
    chosen = hostile[:: len(hostile) // 20][:20]
    assert len({item.path for item in chosen}) >= 5
    for item in chosen:
        with in_place(folder, item):
            before = contents(folder)
            done = gradstore(*arguments(folder, item.command))
            assert done.returncode not in (0, 1), item.name
            assert "Traceback" not in done.stderr, item.name
            assert re.search(r"^error: ", done.stderr, re.MULTILINE), item.name
            assert is_named(item, done.stdout + done.stderr.replace("error: ", "")), f"{item.name}: {done.stderr}"
            assert contents(folder) == before, item.name
