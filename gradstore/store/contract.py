"""Refusing what was made otherwise, with the differing fields side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from gradstore.errors import ContractError
from gradstore.spec import differences
from gradstore.store.layout import FORMAT_VERSION

_MOST_LINES: Final = 20


def require_equal(where: str, stored: Mapping[str, Any], asked: Mapping[str, Any], *, remedy: str) -> None:
    """Compare what exists with what a run asks for.

    Raises
    ------
    ContractError
        If they differ: one line for each field, then ``remedy``.
    """
    found = differences(stored, asked)
    if found:
        lines = [f"  {key}: store has {_text(theirs)}, the run asks for {_text(ours)}" for key, theirs, ours in found]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES:] = [f"  and {len(lines) - _MOST_LINES} more"]
        raise ContractError("\n".join([f"{where} was made with other settings:", *lines, remedy]))


def require_version(where: str, document: Mapping[str, Any]) -> None:
    """Check the format version of a document.

    Raises
    ------
    ContractError
        If a gradstore made it in a format that this one does not know.
    """
    found = document.get("format_version")
    if found != FORMAT_VERSION:
        raise ContractError(
            f"{where} has format version {found}; this gradstore reads version {FORMAT_VERSION}. "
            "Use the gradstore that made it, or a newer one."
        )


def _text(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
