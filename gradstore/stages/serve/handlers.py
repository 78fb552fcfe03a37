"""What answers: pages, pictures of examples, and the files that pages are drawn with; to whom it may."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any, Final

from tornado.web import Application, HTTPError, RequestHandler, url

from gradstore.cluster.kinds.addresses import is_loopback
from gradstore.errors import GradstoreError, NotReadyError, SpecError
from gradstore.stages.serve.pages import Pages

_LOG = logging.getLogger(__name__)
# Servers of several stores on one machine are told apart by it: cookies know no ports.
_COOKIE: Final = "gradstore-{}"
_STATIC: Final = {
    "report.css": ("gradstore.stages.report", "text/css"),
    "report.js": ("gradstore.stages.report", "text/javascript"),
    "viewer.css": ("gradstore.stages.serve", "text/css"),
    "viewer.js": ("gradstore.stages.serve", "text/javascript"),
}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Server": "gradstore",
}
_NAME: Final = r"([A-Za-z0-9][A-Za-z0-9_.-]*)"
_ROW: Final = "([0-9]{1,9})"
_MOST_DIGITS: Final = 9
_DIGITS: Final = 12

Make = Callable[..., str | bytes]
"""Makes an answer of a handler and the parts of its address."""


def make_application(pages: Pages, token: str | None, threads: ThreadPoolExecutor) -> Application:
    """Return what answers requests: by pages, which some threads make; to readers who know the token, if there is one.

    Jobs have a thread of their own, as one that is silent is watched for a while.
    """
    jobs = ThreadPoolExecutor(1, "jobs")
    files = "|".join(name.replace(".", r"\.") for name in _STATIC)
    routes: Sequence[tuple[str, Make, ThreadPoolExecutor]] = (
        ("/", lambda _: pages.overview(), threads),
        ("/health", lambda _: pages.health(), threads),
        ("/queries", _queries, threads),
        (
            f"/queries/{_NAME}/{_ROW}",
            lambda asked, kernel, row: pages.query(kernel, int(row), asked.get_query_arguments("by")),
            threads,
        ),
        ("/weights", lambda asked: pages.weights(asked.get_query_arguments("of")), threads),
        ("/evaluations", lambda asked: pages.evaluations(asked.chosen("kernel")), threads),
        ("/jobs", lambda _: pages.jobs(), jobs),
        (f"/jobs/{_NAME}", lambda _, name: pages.job(name), jobs),
        (rf"/images/{_NAME}/{_ROW}\.png", _picture, threads),
        (f"/static/({files})", _static, threads),
        ("/.*", _nothing, threads),
    )
    shared = {"pages": pages, "token": token}
    return Application(
        [url(pattern, Handler, {**shared, "make": make, "threads": of}) for pattern, make, of in routes],
        # Addresses hold the token once, and a log is no place for it.
        log_function=lambda _: None,
    )


class Handler(RequestHandler):
    """What answers a request. It answers questions alone: nothing here changes a store."""

    SUPPORTED_METHODS = ("GET", "HEAD")

    def initialize(self, pages: Pages, token: str | None, make: Make, threads: ThreadPoolExecutor) -> None:
        """Take what makes the answer, of the request and what its address holds, and in which threads."""
        self.pages, self.token, self.make, self.threads = pages, token, make, threads

    def set_default_headers(self) -> None:
        """Let no other page, script or frame take part."""
        for name, value in _HEADERS.items():
            self.set_header(name, value)

    def prepare(self) -> None:
        """Refuse strangers: who asks by another name than the loopback's, as a page from elsewhere would, or knows no token."""
        if self.token is None:
            if not is_loopback(self.request.host_name.strip("[]")):
                self.refuse(403, "Unknown host", f"this server is on the loopback, and not {self.request.host_name}.")
            return
        given = self.get_query_argument("token", None)
        if given is not None and _equal(given, self.token):
            # The token goes where neither links nor a history of pages show it.
            self.set_cookie(cookie_of(self.token), self.token, httponly=True, samesite="Strict")
            self.redirect(self.request.path)
        elif not _equal(self.get_cookie(cookie_of(self.token)) or "", self.token):
            self.refuse(401, "A token is needed", "open the address that `gradstore serve` printed.")

    async def get(self, *found: str) -> None:
        """Answer with what is made of the request."""
        loop = asyncio.get_running_loop()
        try:
            answer = await loop.run_in_executor(self.threads, self.make, self, *found)
        except NotReadyError as error:
            self.refuse(404, "Not there", str(error))
        except SpecError as error:
            self.refuse(400, "This cannot be shown", str(error))
        except GradstoreError as error:
            self.refuse(500, "The store cannot be read", str(error))
        else:
            self.finish(answer)

    async def head(self, *found: str) -> None:
        """Answer without a body."""
        await self.get(*found)

    def refuse(self, code: int, title: str, text: str) -> None:
        """Answer with a page that says why there is no other."""
        self.set_status(code)
        self.set_header("Content-Type", "text/html; charset=UTF-8")
        self.finish(self.pages.failure(title, text))

    def write_error(self, status_code: int, **_: Any) -> None:
        """Say no more than that: what our own defects look like is for the terminal."""
        self.refuse(status_code, "Not answered", f"{self.request.method} {self.request.path}")

    def log_exception(self, kind: Any, value: BaseException | None, trace: Any) -> None:
        """Tell the terminal of our own defects; not with the whole address, which may hold the token."""
        if not isinstance(value, HTTPError):
            _LOG.error("%s %s", self.request.method, self.request.path, exc_info=value)

    def chosen(self, name: str) -> str | None:
        """An argument, or None where it is empty."""
        return self.get_query_argument(name, None) or None


def _queries(asked: Handler) -> str:
    first = asked.get_query_argument("from", "0")
    if not (first.isascii() and first.isdigit() and len(first) <= _MOST_DIGITS):
        raise SpecError("from: accepted: the number of a query.")
    return asked.pages.queries(asked.chosen("kernel"), asked.get_query_argument("q", ""), int(first))


def _picture(asked: Handler, set_name: str, row: str) -> bytes:
    picture = asked.pages.examples.picture(set_name, int(row))
    asked.set_header("Content-Type", "image/png")
    return picture


def _static(asked: Handler, name: str) -> bytes:
    """A file that lies beside the code."""
    package, kind = _STATIC[name]
    asked.set_header("Content-Type", f"{kind}; charset=UTF-8")
    return resources.files(package).joinpath(name).read_bytes()


def _nothing(asked: Handler) -> str:
    raise NotReadyError(f"there is no page {asked.request.path}.")


def cookie_of(token: str) -> str:
    """Name of the cookie that holds a token."""
    return _COOKIE.format(hashlib.sha256(token.encode()).hexdigest()[:_DIGITS])


def _equal(given: str, token: str) -> bool:
    """Whether two texts are the same, in a time that does not tell where they differ."""
    return hmac.compare_digest(given.encode(), token.encode())
