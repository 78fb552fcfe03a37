"""Which addresses are this machine's own, and which of a scheduler are refused."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

from gradstore.errors import SpecError

SCHEMES = ("tcp", "tls")


def refuse_address(key: str, address: str) -> None:
    """Refuse the address of a scheduler that anyone on a network could use, or that is none.

    Raises
    ------
    SpecError
        If it is no address with a host and a port, or neither on this machine nor encrypted.
    """
    scheme, host = _parsed(address)
    if scheme not in SCHEMES or not host:
        raise SpecError(f"{key}: found {address!r}; accepted: tls://HOST:PORT, or on this machine tcp://HOST:PORT.")
    if scheme != "tls" and not is_loopback(host):
        raise SpecError(
            f"{key}: {address} is not on this machine and not encrypted: anyone on its network could run code there. Use "
            "tls:// with the files that `gradstore certificates` makes, and DASK_CONFIG set to their dask.yaml."
        )


def _parsed(address: str) -> tuple[str, str]:
    """Scheme and host; no host where the address is more than these and a port, or has no port."""
    try:
        parts = urlsplit(address)
        is_whole = parts.port and not any(
            (parts.path, parts.query, parts.fragment, parts.username, address.split() != [address])
        )
    except ValueError:
        return "", ""
    return parts.scheme, (parts.hostname or "") if is_whole else ""


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine as only it can see itself."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
