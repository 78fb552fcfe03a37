"""serve: what pages say, to whom, and that a store stays as it is."""

from __future__ import annotations

import io
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gradstore.errors import NotReadyError, SpecError
from gradstore.stages.delete import Query, delete
from gradstore.stages.progress import Progress
from gradstore.stages.serve import Serving
from gradstore.stages.serve.examples import _is_of_images
from gradstore.stages.serve.handlers import cookie_of
from gradstore.stages.serve.pages import Pages
from gradstore.store.examples import Example, from_table, to_table
from gradstore.store.features import FeatureStore
from tests.runs import TOPICS, command, gradstore
from tests.stores import all_objects
from tests.unit.test_evaluate_mislabel import attribute
from tests.viewer import HOSTILE, Answer, ask, make_hostile_run, served

TOKEN = "a-token-that-is-long-enough"
PLACES = ("/", "/queries", "/queries/block/0", "/weights", "/evaluations", "/jobs", "/health")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_hostile_run(tmp_path_factory.mktemp("served")).run.store


@pytest.fixture(scope="module")
def address(store: str) -> Iterator[str]:
    with served(store) as address:
        yield address


@pytest.mark.parametrize("place", PLACES)
def test_a_page_is_whole_and_asks_nobody_else(address: str, place: str) -> None:
    answer = ask(address + place)

    assert answer.code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=UTF-8"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    linked = re.findall(r'(?:src|href|action)="([^"]*)"', answer.text)
    assert linked
    assert [link for link in linked if not re.match("/(?!/)|#|data:", link)] == []
    # Nothing of the store's own texts is read as HTML.
    assert "<img src=x" not in answer.text
    assert "<svg onload" not in answer.text
    assert "<b id=hit" not in answer.text


def test_pages_say_what_the_store_holds(address: str, store: str) -> None:
    overview = ask(f"{address}/").text
    assert all(
        f"features/{name}" in overview or f">{name}<" in overview for name in ("train", "learn", "eval", "learn-style")
    )
    assert all(name in overview for name in ("weights/learned", "weights/learned-style", "scores/block.learned"))

    queries = ask(f"{address}/queries?q=TEXTS.jsonl").text
    assert "12 queries with" in queries
    texts = FeatureStore.open(store).open_set("eval").read_inputs(0)["text"].to_pylist()
    assert f"{sum('guitar' in text for text in texts)} quer" in ask(f"{address}/queries?q=Guitar").text
    assert "0 queries with" in ask(f"{address}/queries?q=nothing+of+the+kind").text

    query = ask(f"{address}/queries/block/3?by=unweighted&by=learned-style").text
    assert query.count("<h4>") == 4
    assert 'rel="prev"' in query
    assert 'rel="next"' in query
    assert 'href="/queries/block/4"' in query

    weights = ask(f"{address}/weights").text
    assert "How alike they are" in weights
    assert "What tells them apart" in weights
    assert "What tells them apart" not in ask(f"{address}/weights?of=learned").text

    assert "Known contributors, recall@5" in ask(f"{address}/evaluations").text
    assert "None were found" in ask(f"{address}/health").text
    assert "No run was submitted" in ask(f"{address}/jobs").text


@pytest.mark.parametrize(
    ("place", "code", "says"),
    [
        ("/nothing", 404, "there is no page /nothing"),
        ("/queries/block/12", 404, "has no query in row 12"),
        ("/queries/block/999999999", 404, "has no query in row 999,999,999"),
        ("/queries/none/0", 400, "found &#39;none&#39;; "),
        ("/queries?kernel=none", 400, "found &#39;none&#39;; "),
        ("/queries/block/0?by=none", 404, "has no ranking &#39;none&#39;; it has: unweighted, learned, learned-style"),
        ("/queries?from=-1", 400, "from: accepted: the number of a query"),
        ("/queries?from=13", 404, "there is no query 13 of 12"),
        ("/queries?from=%D9%A3", 400, "from: accepted: the number of a query"),
        ("/weights?of=none", 404, "has no weights &#39;none&#39;"),
        ("/images/train/0.png", 404, "row 0 is no image"),
        ("/images/none/0.png", 404, "has no set none"),
        ("/images/train/999.png", 404, "has no row 999"),
        ("/images/..%2Ftrain/0.png", 404, "there is no page"),
        ("/static/../handlers.py", 404, "there is no page"),
        ("/static/..%2Fhandlers.py", 404, "there is no page"),
        ("/jobs/none", 404, "none"),
        ("/jobs/..%2F..%2Fgradstore.json", 404, "there is no page"),
        ("/queries/%3Cscript%3E/0", 404, "there is no page"),
    ],
)
def test_what_is_not_there_is_told_by_name(address: str, place: str, code: int, says: str) -> None:
    answer = ask(address + place)

    assert (answer.code, says in answer.text) == (code, True), answer.text
    assert "Traceback" not in answer.text
    assert "<script>" not in answer.text.replace("<script src", "")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_asked_but_to_show(address: str, method: str) -> None:
    assert ask(f"{address}/", method=method).code == 405


def test_a_store_that_was_looked_at_is_as_it_was(store: str) -> None:
    before = all_objects(FeatureStore.open(store).storage)
    with served(store) as address:
        for place in PLACES:
            assert ask(address + place).code == 200
            assert ask(address + place, method="HEAD").body == b""

    assert all_objects(FeatureStore.open(store).storage) == before


def test_a_page_from_elsewhere_that_points_its_name_here_is_refused(address: str) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "0.0.0.0", "[2001:db8::1]", ""):
        answer = ask(f"{address}/", Host=host)
        assert answer.code in (400, 403), host
        assert "Feature sets" not in answer.text
    for host in ("localhost", "localhost:1234", "[::1]:8321", "127.0.0.1"):
        assert ask(f"{address}/", Host=host).code == 200, host


def test_where_there_is_a_token_nothing_is_shown_without_it(
    store: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def refused(answer: Answer) -> bool:
        return answer.code == 401 and "A token is needed" in answer.text and "Feature sets" not in answer.text

    with served(store, TOKEN) as address:
        for place in (*PLACES, "/static/report.css", "/images/train/0.png", "/nothing"):
            assert refused(ask(address + place)), place
            assert refused(ask(f"{address}{place}?token=wrong")), place
            assert refused(ask(address + place, Cookie=f"{cookie_of(TOKEN)}=wrong")), place

        entered = ask(f"{address}/weights?token={TOKEN}")
        assert (entered.code, entered.headers["Location"]) == (302, "/weights")
        cookie = entered.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        shown = ask(f"{address}/", Cookie=cookie.partition(";")[0], Host="somewhere.example")
        assert "Feature sets" in shown.text
        assert TOKEN not in shown.text
    assert TOKEN not in "".join([*capfd.readouterr(), caplog.text])


def test_an_address_for_others_gets_a_token_and_a_weak_one_is_refused() -> None:
    made = Serving.of("store", "0.0.0.0", 0, None)
    assert made.token is not None
    assert len(made.token) >= 32
    assert Serving.of("store", "127.0.0.1", 0, None).token is None
    assert Serving.of("store", "localhost", 0, None).host == "127.0.0.1"
    with pytest.raises(SpecError, match="GRADSTORE_TOKEN: found a token of 5 characters; accepted: 16 at least"):
        Serving.of("store", "0.0.0.0", 0, "short")
    with pytest.raises(SpecError, match="--host: found 'my machine'; accepted: an address of this machine"):
        Serving.of("store", "my machine", 0, None)


def test_no_text_is_shown_where_that_is_asked_for(store: str) -> None:
    pages = Pages(url=store, redact=True)
    examples = FeatureStore.open(store).open_set("eval").read_inputs(0).slice(0, 1).to_pylist()[0]

    words = {word for topic in TOPICS.values() for word in topic.split()}
    for page in (pages.queries(None, "", 0), pages.query("block", 0, [])):
        assert {word for word in words if f"{word} " in page} == set()
    assert "(redacted)" in pages.query("block", 0, [])
    assert "Query 0" in pages.query("block", 0, [])
    # Nor is it told by what it is found with.
    assert "0 queries with" in pages.queries(None, examples["text"].split()[0], 0)


def test_the_report_and_answers_are_redacted_too(store: str, tmp_path: Path) -> None:
    words = {word for topic in TOPICS.values() for word in topic.split()}
    page = tmp_path / "report.html"

    told = [
        gradstore("report", store, "-o", page, "--redact-text").stdout,
        gradstore("query", store, "--index", "eval:0", "--redact-text").stdout,
        gradstore("query", store, "--index", "eval:0", "--redact-text", "--json").stdout,
        page.read_text(encoding="utf-8"),
    ]

    for text in told:
        assert "(redacted)" in text
        # Labels stay, and are named after some topics.
        assert {word for word in words if f" {word} " in text} == set()


def test_an_erased_query_is_not_there_and_evaluations_need_no_scores(store: str, tmp_path: Path) -> None:
    copied = shutil.copytree(store, tmp_path / "copied")
    pages = Pages(url=str(copied))
    assert "Query 3" in pages.query("block", 3, [])
    (erased,) = FeatureStore.open(str(copied)).open_set("eval").read_inputs(0).slice(3, 1)["example_id"].to_pylist()

    delete(str(copied), Query(ids=frozenset({erased})), (), Progress(quiet=True), dry_run=False)

    # Also who has looked before sees no more of it.
    with pytest.raises(NotReadyError, match="has no query in row 3"):
        pages.query("block", 3, [])
    assert 'href="/queries/block/3"' not in pages.queries(None, "", 0)

    shutil.rmtree(copied / "scores")
    assert "Known contributors, recall@5" in Pages(url=str(copied)).evaluations(None)


def test_what_an_adapter_calls_an_image_and_is_none_is_not_shown() -> None:
    for array in (np.zeros((1, 3, 3), np.float32), np.zeros((3, 3), np.uint8), np.zeros((1, 3, 3), np.int64)):
        example = Example(
            example_id="a", source="", label=None, text="", content_hash="", size=1, inputs={"image": array}
        )
        assert not _is_of_images(to_table([example], 0))
    pixels = np.zeros((1, 3, 3), np.uint8)
    example = Example(example_id="a", source="", label=None, text="", content_hash="", size=1, inputs={"image": pixels})
    assert _is_of_images(to_table([example], 0))


def test_images_are_shown_with_their_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = attribute(tmp_path, monkeypatch)
    pages = Pages(url=spec.run.store)
    table = FeatureStore.open(spec.run.store).open_set("train").read_inputs(0)
    (example,) = from_table(table.slice(3, 1))

    picture = np.array(Image.open(io.BytesIO(pages.examples.picture("train", 3))))

    pixels = example.inputs["image"][0]
    larger = len(picture) // len(pixels)
    assert larger > 1
    assert np.array_equal(picture, np.kron(pixels, np.ones((larger, larger), np.uint8)))
    assert pages.examples.address("train", 3) == "/images/train/3.png"
    # Nothing was ranked yet.
    with pytest.raises(NotReadyError, match="there are no finished scores"):
        pages.queries(None, "", 0)


def test_the_command_tells_where_it_serves_and_ends_when_it_is_asked_to(store: str) -> None:
    process = subprocess.Popen(command("serve", store, "--port", "0"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert ask(address).code == 200

    port = address.rpartition(":")[2].strip("/")
    taken = gradstore("serve", store, "--port", port)
    assert (taken.returncode, taken.stdout) == (2, "")
    assert f"--host 127.0.0.1 --port {port}: Address already in use. Give another" in taken.stderr

    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stdout.close()


def test_a_store_that_is_not_there_is_told_before_anybody_asks(tmp_path: Path) -> None:
    found: Any = gradstore("serve", str(tmp_path / "none"), "--port", "0")

    assert found.returncode != 0
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert "Traceback" not in found.stderr
    assert HOSTILE not in found.stderr
