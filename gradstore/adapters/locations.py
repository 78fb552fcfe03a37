"""Where sources are: folders inside installed packages, local paths, URLs, and gradstore's own cache."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from gradstore.errors import SpecError

PACKAGE = "package:"


def resolve_location(source: str, key: str) -> str:
    """Return the path that ``package:NAME/sub/dir`` stands for; any other source is returned as it is.

    The package is found, not imported, so that no code of it runs.

    Raises
    ------
    SpecError
        If the package is not installed, or has no such folder or file.
    """
    if not source.startswith(PACKAGE):
        return source
    name, _, inside = source.removeprefix(PACKAGE).partition("/")
    # A dotted name would import its parents.
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = (found.submodule_search_locations if found else None) or []
    if not folders:
        raise SpecError(
            f"{key}: {source!r} names the Python package {name!r}, which is not installed here. "
            f"Install it, or set {key} to a folder or a hub id."
        )
    for folder in folders:
        path = Path(folder) / inside
        if path.exists():
            return str(path)
    raise SpecError(
        f"{key}: {source!r}: the package {name!r} has no {inside!r}. Change the part after the first slash."
    )


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder for files that can be made again: GRADSTORE_CACHE, else gradstore in the user's cache."""
    if chosen := environment.get("GRADSTORE_CACHE"):
        return Path(chosen).expanduser()
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "gradstore"
    if sys.platform == "win32":
        return Path(environment.get("LOCALAPPDATA", home / "AppData" / "Local")) / "gradstore" / "cache"
    return Path(environment.get("XDG_CACHE_HOME") or home / ".cache") / "gradstore"
