"""A server on the loopback, or with a token elsewhere, for as long as nobody ends it."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import secrets
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from gradstore.cluster.kinds.addresses import is_loopback
from gradstore.errors import SpecError
from gradstore.stages.serve.handlers import make_application
from gradstore.stages.serve.pages import Pages

TOKEN: Final = "GRADSTORE_TOKEN"  # noqa: S105 - the name of a variable
"""The variable that holds the token; one is made up where it has none and there must be one."""

_TOKEN: Final = "[A-Za-z0-9_-]{16,}"  # noqa: S105 - what one looks like
_THREADS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Where a store is served.

    Attributes
    ----------
    url
        The store.
    host, port
        The address to listen on; port 0 takes a free one.
    token
        What readers must know; None for everybody on this machine.
    """

    url: str
    host: str
    port: int
    token: str | None

    @classmethod
    def of(cls, url: str, host: str, port: int, token: str | None) -> Serving:
        """Make a token up where others than this machine may ask and none was given.

        Raises
        ------
        SpecError
            If the host is no address, or the token is too short to keep anybody out.
        """
        try:
            address = str(ipaddress.ip_address("127.0.0.1" if host == "localhost" else host))
        except ValueError as error:
            raise SpecError(
                f"--host: found {host!r}; accepted: an address of this machine, such as 127.0.0.1 or 0.0.0.0."
            ) from error
        if token is not None and not re.fullmatch(_TOKEN, token):
            raise SpecError(
                f"{TOKEN}: found a token of {len(token)} characters; accepted: 16 at least, of letters, digits, - and _."
            )
        if token is None and not is_loopback(address):
            token = secrets.token_urlsafe(24)
        return cls(url=url, host=address, port=port, token=token)

    def address(self, sockets: list[socket.socket]) -> str:
        """Return where the first page is, with the token if there is one."""
        port = sockets[0].getsockname()[1]
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{port}/" + (f"?token={self.token}" if self.token else "")


def serve(serving: Serving, told: Callable[[str], None], *, redact: bool = False) -> None:
    """Serve a store until the process is interrupted; ``told`` gets the address of its first page.

    With ``redact`` no text and no image of it is shown.

    Raises
    ------
    NotReadyError
        If there is no store at the URL.
    SpecError
        If nobody can listen there.
    """
    asyncio.run(_serve(serving, Pages(url=serving.url, redact=redact), told))


async def _serve(serving: Serving, pages: Pages, told: Callable[[str], None]) -> None:
    ended = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, ended.set)
    threads = ThreadPoolExecutor(_THREADS, "pages")
    # A store that is not there is told of before anybody asks.
    pages.overview()
    sockets = _listen(serving)
    server = HTTPServer(make_application(pages, serving.token, threads))
    server.add_sockets(sockets)
    told(serving.address(sockets))
    await ended.wait()
    server.stop()
    await server.close_all_connections()
    threads.shutdown(wait=False, cancel_futures=True)


def _listen(serving: Serving) -> list[socket.socket]:
    try:
        return bind_sockets(serving.port, serving.host)
    except OSError as error:
        where = f"--host {serving.host} --port {serving.port}"
        raise SpecError(f"{where}: {error.strerror or error}. Give another; port 0 takes a free one.") from error
