"""A faulty S3: an HTTP proxy on the loopback that passes requests to a real server and now and then fails them.

The Host header stays what the client signed. Every connection carries one request, so that a fault hits one alone.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

_ALL: Final = ("GET", "PUT", "HEAD", "DELETE", "POST")
KINDS: Final = {
    "internal error": _ALL,
    "slow down": _ALL,
    "reset before": _ALL,
    "reset within upload": ("PUT",),
    "reset within download": ("GET",),
    "truncated": ("GET",),
    "late": _ALL,
    "lost reply": ("PUT", "DELETE", "POST"),
    "silence": _ALL,
}
"""Kinds of faults, and the requests that each may hit; with silence, a request is taken and never answered."""

_ERRORS: Final = {"internal error": (500, "InternalError"), "slow down": (503, "SlowDown")}
_LATEST_SECONDS: Final = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    head: bytes
    method: str
    length: int
    waits: bool


class FaultyProxy:
    """The proxy, running in a thread while it is entered.

    Parameters
    ----------
    server
        URL of the server behind it.
    rates
        For each kind of fault, the share of the requests that it may hit, which it does hit.
    seed
        Of the choice of requests.

    Attributes
    ----------
    url
        Its endpoint.
    injected
        How often each kind of fault has happened.
    """

    def __init__(self, server: str, rates: Mapping[str, float], seed: int = 0) -> None:
        found = urlsplit(server)
        assert found.hostname is not None
        assert found.port is not None
        assert rates.keys() <= KINDS.keys()
        self._server = found.hostname, found.port
        self._rates = dict(rates)
        self._random = random.Random(seed)
        self._serving: set[asyncio.Task[None] | None] = set()
        self.injected: Counter[str] = Counter()
        self.url = ""

    def become(self, rates: Mapping[str, float]) -> None:
        """Change the weather."""
        self._rates = dict(rates)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        listening: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(listening,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{listening.result(timeout=30)}"
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self, listening: Future[int]) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen(listening))
        self._loop.close()

    async def _listen(self, listening: Future[int]) -> None:
        self._stopped = asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        listening.set_result(server.sockets[0].getsockname()[1])
        await self._stopped.wait()
        server.close()
        begun = asyncio.all_tasks() - {asyncio.current_task()}
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
        # A transport that is closed lets go of its socket in a later round of the loop.
        await asyncio.sleep(0.1)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The loop holds a connection's task by its transport alone, and lets go of that when a client is gone.
        self._serving.add(task := asyncio.current_task())
        try:
            # A client that is killed, or that this proxy has cut off, may be gone at any moment.
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                request = _parse(await reader.readuntil(b"\r\n\r\n"))
                if request.waits:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                await self._answer(request, reader, writer, self._draw(request))
            writer.close()
        except asyncio.CancelledError:
            # What a dead client never reads would keep a transport that is only closed.
            _reset(writer)
        finally:
            self._serving.discard(task)

    async def _answer(
        self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str | None
    ) -> None:
        if fault == "reset before":
            _reset(writer)
        elif fault == "reset within upload":
            await self._cut_upload(request, reader, writer)
        elif fault == "silence":
            await self._stopped.wait()
        elif fault in _ERRORS:
            await reader.readexactly(request.length)
            writer.write(_error(*_ERRORS[fault]))
            await writer.drain()
        else:
            if fault == "late":
                await asyncio.sleep(self._random.uniform(0, _LATEST_SECONDS))
            await self._pass_on(request, reader, writer, fault)

    async def _pass_on(
        self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: str | None
    ) -> None:
        head, content = await self._forward(request, await reader.readexactly(request.length))
        if fault == "lost reply":
            _reset(writer)
            return
        if fault in ("reset within download", "truncated") and content:
            content = content[: self._random.randrange(len(content))]
        writer.write(head + content)
        await writer.drain()
        if fault == "reset within download":
            # Else what was written would be thrown away with the connection.
            await asyncio.sleep(0.02)
            _reset(writer)

    async def _forward(self, request: _Request, body: bytes) -> tuple[bytes, bytes]:
        """Head and body of the server's answer."""
        reader, writer = await asyncio.open_connection(*self._server)
        try:
            writer.write(request.head + body)
            head = await reader.readuntil(b"\r\n\r\n")
            return head, await reader.read()
        finally:
            writer.close()

    async def _cut_upload(self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        half = await reader.readexactly(request.length // 2)
        _, onward = await asyncio.open_connection(*self._server)
        onward.write(request.head + half)
        await onward.drain()
        await asyncio.sleep(0.02)
        _reset(onward)
        _reset(writer)

    def _draw(self, request: _Request) -> str | None:
        """Kind of fault for a request, or None."""
        left = self._random.random()
        for kind, rate in self._rates.items():
            if request.method not in KINDS[kind] or (kind == "reset within upload" and request.length < 2):
                continue
            left -= rate
            if left < 0:
                self.injected[kind] += 1
                return kind
        return None


def _parse(head: bytes) -> _Request:
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    headers = [line.partition(":")[::2] for line in lines]
    values = {name.lower(): value.strip() for name, value in headers}
    assert "transfer-encoding" not in values, "the proxy takes no chunked uploads"
    kept = [f"{name}:{value}" for name, value in headers if name.lower() not in ("connection", "expect")]
    return _Request(
        head="\r\n".join([first, *kept, "Connection: close", "", ""]).encode("latin-1"),
        method=first.partition(" ")[0],
        length=int(values.get("content-length", 0)),
        waits=values.get("expect", "").lower() == "100-continue",
    )


def _error(status: int, code: str) -> bytes:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection by RST, without a word."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
