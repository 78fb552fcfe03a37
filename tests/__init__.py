"""Tests of gradstore."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have types of arguments and results checked, but for functions within functions, which are made anew at every call."""
    return function if "<locals>" in function.__qualname__ else beartype(function)
