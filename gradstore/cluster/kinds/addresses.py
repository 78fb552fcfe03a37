"""Which addresses of a scheduler are refused."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlparse

from gradstore.errors import SpecError

SCHEMES = ("tcp", "tls")


def refuse_address(key: str, address: str) -> None:
    """Refuse the address of a scheduler that anyone on a network could use, or that is none.

    Raises
    ------
    SpecError
        If it is neither on this machine nor encrypted.
    """
    scheme = urlparse(address).scheme
    if scheme not in SCHEMES:
        raise SpecError(f"{key}: found {address!r}; accepted: tls://HOST:PORT, or on this machine tcp://HOST:PORT.")
    if scheme != "tls" and not _is_loopback(address):
        raise SpecError(
            f"{key}: {address} is not on this machine and not encrypted: anyone on its network could run code there. Use "
            "tls:// with the files that `gradstore certificates` makes, and DASK_CONFIG set to their dask.yaml."
        )


def _is_loopback(address: str) -> bool:
    host = urlparse(address).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
