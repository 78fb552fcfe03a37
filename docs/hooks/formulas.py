"""Formulas of docstrings, which are written for Sphinx, as blocks of the site: it draws no mathematics, but keeps them apart."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_FORMULA = re.compile(r"^\.\. math::[ ]*(.+?)(?=\n[ ]*\n|\Z)", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r":math:`([^`]+)`")


class Formulas(griffe.Extension):
    """Rewrites the docstrings that the site shows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one."""
        if obj.docstring is not None:
            text = _FORMULA.sub(lambda found: f"```text\n{textwrap.dedent(found[1]).strip()}\n```", obj.docstring.value)
            obj.docstring.value = _INLINE.sub(r"`\1`", text)
