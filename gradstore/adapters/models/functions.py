"""Functions that a user names in run.toml as ``package.module:function``, and the errors of a user's own code."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradstore.errors import GradstoreError, SpecError

SHOWN_CHARACTERS = 300


def find_function(name: str, key: str) -> Callable[..., Any]:
    """Import the module of ``package.module:function`` and return the function.

    Raises
    ------
    SpecError
        If there is no such module or function, or importing it fails.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # One that the module itself imports is another matter.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise SpecError(f"{key}: {module} imports {error.name}, which is not installed here.") from error
        raise SpecError(
            f"{key}: {name!r}: Python finds no module {error.name!r}. It looks in installed packages and in the folders of "
            "PYTHONPATH; neither the working directory nor the folder of run.toml is one of them. Install the module, or "
            "set PYTHONPATH to its folder, for workers on other machines too."
        ) from error
    except Exception as error:
        raise SpecError(f"{key}: importing {module} failed: {_told(error, module)}.") from error
    for part in path.split("."):
        if not hasattr(found, part):
            public = [item for item in vars(found) if not item.startswith("_") and callable(getattr(found, item))]
            raise SpecError(f"{key}: {module} has no {path!r}. It has: {', '.join(public[:10]) or 'no functions'}.")
        found = getattr(found, part)
    if not callable(found):
        raise SpecError(f"{key}: {name!r} is {type(found).__name__}, not a function.")
    function: Callable[..., Any] = found
    return function


def source_file(name: str) -> Path | None:
    """Return the file that the module of an imported function was read from, or None if it was made otherwise."""
    module = sys.modules.get(name.partition(":")[0])
    file = None if module is None else inspect.getsourcefile(module)
    return None if file is None or not Path(file).is_file() else Path(file)


def code_hash(name: str) -> str | None:
    """Return a hash of that file, which tells code from code that was edited since."""
    file = source_file(name)
    return None if file is None else hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


@contextmanager
def users_code(what: str, name: str, advice: str) -> Iterator[None]:
    """Tell in one line where a user's code failed, and how.

    Parameters
    ----------
    what
        What was called, and for what.
    name
        The function that the code came with.
    advice
        What to do about it.

    Raises
    ------
    SpecError
        For whatever was raised, but gradstore's own errors and a lack of memory, which pass.
    """
    try:
        yield
    except (GradstoreError, MemoryError):
        raise
    except Exception as error:
        # By name, so that nothing heavy is imported here: a batch that is too large is halved by those who made it.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise SpecError(f"{what} failed: {_told(error, name.partition(':')[0])}. {advice}") from error


def _told(error: Exception, module: str) -> str:
    """One line: the error's type and text, and the last line of the module that led to it."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
    file = getattr(sys.modules.get(module), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f" ({Path(file).name}, line {lines[-1]})" if file is not None and lines else ""
    return f"{type(error).__name__}: {shown}{place}" if shown else f"{type(error).__name__}{place}"
