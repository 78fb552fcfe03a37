"""init: write a commented run.toml to start from."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from gradstore.errors import SpecError


def init(path: Path) -> None:
    """Write the template of run.toml to ``path``.

    Raises
    ------
    SpecError
        If the file exists already or cannot be written.
    """
    text = files("gradstore.stages").joinpath("run.toml").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise SpecError(f"{path}: exists already, and is left as it is. Choose another name.") from error
    except OSError as error:
        raise SpecError(f"{path}: cannot be written: {error.strerror}. Choose another place.") from error
