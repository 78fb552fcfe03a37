"""URLs that hold secrets: they would be kept in records and told in messages, so that none is taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from gradstore.errors import SpecError


def holds_credentials(url: str) -> bool:
    """Whether a text is a URL with a user name or password before its host; a bucket has no colon that could be a port's."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return False
    host = rest.partition("/")[0]
    try:
        return "@" in host or (scheme == "s3" and ":" in host) or urlsplit(url).username is not None
    except ValueError:
        return False


def refuse_credentials(key: str, value: Any) -> None:
    """Refuse such URLs, also within tables and lists, without telling them.

    Raises
    ------
    SpecError
        Naming the key.
    """
    if isinstance(value, Mapping):
        for name, item in value.items():
            refuse_credentials(f"{key}.{name}" if key else str(name), item)
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_credentials(key, item)
    elif isinstance(value, str) and holds_credentials(value):
        raise SpecError(
            f"{key}: the URL holds a user name or a password, which would be kept in the store and shown (not here). Leave them "
            "out: credentials come from the environment or a profile, see docs/storage.md."
        )
