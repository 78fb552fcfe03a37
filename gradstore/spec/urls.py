"""URLs that hold secrets: they would be kept in records and told in messages, so that none is taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from gradstore.errors import SpecError

# Where what stands before an @ is a container, a user or a repository, and no secret.
_NO_SECRETS: Final = ("abfs", "abfss", "github", "hf")


def holds_credentials(url: str) -> bool:
    """Whether a text is a URL with a user name or password before its host, or what looks like one.

    A password may hold a slash, so that a host with a colon that no number follows counts as one cut off; a bucket has no port.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return False
    scheme = scheme.rpartition("::")[2].lower()
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if scheme in _NO_SECRETS:
        return False
    # Colons within brackets are an address's.
    port = re.sub(r"^\[[^\]]*\]?", "", host).partition(":")[2]
    return "@" in host or bool(port and (scheme == "s3" or not port.isdigit()))


def refuse_credentials(key: str, value: Any) -> None:
    """Refuse such URLs, also within tables and lists, without telling them.

    Raises
    ------
    SpecError
        Naming the key.
    """
    # Not by calling itself: tables may be nested deeper than calls.
    left: list[tuple[str, Any]] = [(key, value)]
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            left += [(f"{key}.{name}" if key else str(name), item) for name, item in value.items()]
        elif isinstance(value, list | tuple):
            left += [(key, item) for item in value]
        elif isinstance(value, str) and holds_credentials(value):
            raise SpecError(
                f"{key}: the URL holds a user name or a password, which would be kept in the store and shown (not here). Leave "
                "them out: credentials come from the environment or a profile, see docs/storage.md."
            )
