"""A store that is served on the loopback while a test looks at it, and a run whose texts attack who shows them."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from gradstore.spec import RunSpec, read_spec
from gradstore.stages.evaluate import evaluate_recall
from gradstore.stages.progress import Progress
from gradstore.stages.run import stages_of
from gradstore.stages.serve.handlers import make_application
from gradstore.stages.serve.pages import Pages
from tests.runs import InThisProcess, make_run

HOSTILE = "</script><img src=x onerror='window.hit = true'><svg onload='window.hit = true'><b id=hit>"
QUIET = Progress(quiet=True)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back."""

    code: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode("utf-8")


class _Stay(urllib.request.HTTPRedirectHandler):
    """A browser that goes nowhere by itself."""

    def redirect_request(self, *_: Any) -> None:
        return None


def ask(address: str, *, method: str = "GET", **headers: str) -> Answer:
    """Ask once, follow nothing."""
    request = urllib.request.Request(
        address, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    try:
        with urllib.request.build_opener(_Stay).open(request, timeout=60) as answer:
            return Answer(code=answer.status, headers=dict(answer.headers), body=answer.read())
    except urllib.error.HTTPError as error:
        return Answer(code=error.code, headers=dict(error.headers), body=error.read())


@contextmanager
def served(url: str, token: str | None = None) -> Iterator[str]:
    """The address of a store's pages."""
    threads = ThreadPoolExecutor(2)
    (sock,) = bind_sockets(0, "127.0.0.1")
    begun, ended, loops = threading.Event(), asyncio.Event(), []

    async def run() -> None:
        server = HTTPServer(make_application(Pages(url=url), token, threads))
        server.add_sockets([sock])
        loops.append(asyncio.get_running_loop())
        begun.set()
        await ended.wait()
        server.stop()
        await server.close_all_connections()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    begun.wait()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        loops[0].call_soon_threadsafe(ended.set)
        thread.join()
        threads.shutdown()


def make_hostile_run(folder: Path) -> RunSpec:
    """A small language model's run to its scores, whose texts, labels and ids are all meant to be code."""
    make_run(folder, str(folder / "store"))
    texts = folder / "texts.jsonl"
    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["text"] = f"{row['text']} {HOSTILE}"
        row["topic"] = f"{HOSTILE}{row['topic']}"
        row["id"] = f"{HOSTILE}{row['id']}"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes: dict[str, Any] = {
        "data.aspects.style": {"rows": 6},
        "evaluate": {"baselines": ["random"]},
        "evaluate.recall": {"by": "label", "k": [5]},
    }
    spec = read_spec(make_run(folder, str(folder / "store"), changes))
    for stage in stages_of(spec):
        stage(spec, InThisProcess(), QUIET)  # type: ignore[arg-type]
    evaluate_recall(spec, InThisProcess(), QUIET)  # type: ignore[arg-type]
    return spec
