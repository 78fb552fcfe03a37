"""Numbers with a unit, as run.toml and the command line spell them."""

from __future__ import annotations

import re

from gradstore.errors import SpecError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(key: str, text: str) -> int:
    """Return the number of bytes that a size such as 4GiB or 500MB stands for.

    Raises
    ------
    SpecError
        If it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise SpecError(f'{key}: found {text!r}; accepted: a size such as "4GiB" or "500MB".')
    return int(float(match[1]) * _UNITS[match[2].upper()])
