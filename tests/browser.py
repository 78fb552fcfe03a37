"""A headless Chromium that tests drive over its own debugging protocol; it talks to loopback only."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tornado.websocket import WebSocketClientConnection, websocket_connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync --disable-component-update
    --no-first-run --disable-dev-shm-usage --hide-scrollbars --remote-debugging-port=0
"""
START_SECONDS = 60


class Page:
    """An open tab: what it requested, what it complained about, and what it looks like."""

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self._connection = connection
        self._last = 0
        self.requests: list[str] = []
        self.complaints: list[str] = []

    async def call(self, method: str, **parameters: Any) -> Any:
        """Send one command and wait for its answer, keeping the events that come before it."""
        self._last += 1
        await self._connection.write_message(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            message = await self._receive()
            if message.get("id") == self._last:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    async def open(self, place: Path | str, *, width: int, scheme: str = "light", scripts: bool = True) -> None:
        """Load a file or an address at a width of CSS pixels, in a light or dark colour scheme."""
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        await self.call("Page.navigate", url=place if isinstance(place, str) else place.as_uri())
        while (await self._receive()).get("method") != "Page.loadEventFired":
            pass

    async def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def press(self, key: str) -> None:
        """Press and release a key."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Tab": 9, "Escape": 27, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        event = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    async def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of what is seen, or of the whole page."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    async def _receive(self) -> dict[str, Any]:
        text = await self._connection.read_message()
        assert text is not None, "the browser closed the page"
        message: dict[str, Any] = json.loads(text)
        parameters = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.complaints.append(str(parameters["entry"]))
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(str(parameters["args"]))
        return message


class Browser:
    """Chromium with a profile of its own, ended on leaving the context."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None, "no chromium on PATH"
        self._port_file = profile / "DevToolsActivePort"
        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)

    def visit(self, work: Callable[[Page], Coroutine[Any, Any, None]]) -> None:
        """Open a fresh tab, do the work with it, and close it."""
        asyncio.run(self._visit(work))

    async def _visit(self, work: Callable[[Page], Coroutine[Any, Any, None]]) -> None:
        address = f"http://127.0.0.1:{self._port()}/json"
        request = urllib.request.Request(f"{address}/new?about:blank", method="PUT")
        with urllib.request.urlopen(request, timeout=30) as answer:
            target = json.load(answer)
        connection = await websocket_connect(target["webSocketDebuggerUrl"], max_message_size=2**28)
        try:
            await work(Page(connection))
        finally:
            connection.close()
            while await connection.read_message() is not None:  # until the browser has said goodbye as well
                pass
            with urllib.request.urlopen(f"{address}/close/{target['id']}", timeout=30):
                pass

    def _port(self) -> int:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self._process.poll() is None, f"chromium ended with {self._process.returncode}"
            if self._port_file.exists() and (lines := self._port_file.read_text().splitlines()):
                return int(lines[0])
            time.sleep(0.1)
        raise TimeoutError(f"chromium opened no debugging port within {START_SECONDS} s")
