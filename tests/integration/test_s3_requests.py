"""Requests to S3, through both clients: large objects, long listings, uploads never completed, and a server that fails."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

import botocore.session
import numpy as np
import pytest

from gradstore.errors import IntegrityError, ObjectMissingError, StorageError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.blocks import in_parallel
from tests.faults.proxy import FaultyProxy
from tests.servers import OWNER, READER, S3Server

pytestmark = pytest.mark.slow

_NAMES = count()
MIB = 2**20


@pytest.fixture(params=["obstore", "s3fs"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("GRADSTORE_S3_CLIENT", request.param)
    return str(request.param)


@pytest.fixture
def server(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    return seaweed


@pytest.fixture
def url(server: S3Server, client: str) -> str:
    return server.url(f"requests-{client}-{next(_NAMES)}")


@pytest.fixture
def storage(url: str) -> Storage:
    return open_storage(url)


def random_bytes(num_bytes: int) -> bytes:
    return np.random.default_rng(num_bytes).bytes(num_bytes)


@pytest.mark.parametrize("size", [16 * MIB - 1, 16 * MIB, 16 * MIB + 1, 41 * MIB + 7])
def test_a_large_object_is_read_into_place_by_ranges(storage: Storage, size: int) -> None:
    data = random_bytes(size)
    storage.publish("large", [data])
    buffer = bytearray(size + 5)
    assert storage.read_into("large", memoryview(buffer)) == size
    assert buffer == data + bytes(5)


def test_an_empty_and_a_small_object_are_read_into_a_large_buffer(storage: Storage) -> None:
    storage.publish("empty", [])
    storage.publish("small", [b"1"])
    buffer = memoryview(bytearray(17 * MIB))
    assert storage.read_into("empty", buffer) == 0
    assert storage.read_into("small", buffer) == 1
    with pytest.raises(ObjectMissingError, match="none: no such object"):
        storage.read_into("none", buffer)


def test_a_large_object_that_exceeds_a_large_buffer_is_refused(storage: Storage) -> None:
    storage.publish("large", [bytes(18 * MIB)])
    with pytest.raises(IntegrityError, match=f"large: has {18 * MIB} bytes; at most {17 * MIB} belong there"):
        storage.read_into("large", memoryview(bytearray(17 * MIB)))


def test_an_object_that_is_replaced_while_it_is_read_is_never_a_mixture(storage: Storage) -> None:
    size = 33 * MIB
    versions = [bytes([digit]) * size for digit in (1, 2)]
    storage.publish("large", [versions[0]])
    stop = threading.Event()

    def replace() -> None:
        other = open_storage(storage.url)
        while not stop.is_set():
            for version in versions:
                other.replace("large", [version])

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        buffer = bytearray(size)
        refused = []
        for _ in range(8):
            try:
                storage.read_into("large", memoryview(buffer))
            except IntegrityError as error:
                refused.append(str(error))
            else:
                assert buffer in versions
        assert set(refused) <= {f"{storage.url}/large: was replaced while it was read."}
    finally:
        stop.set()
        thread.join()


def test_a_listing_of_several_pages_is_complete_whatever_the_names(storage: Storage) -> None:
    names = [f"a/{number % 7}{mark}{number:04d}" for number in range(1030) for mark in "/-.~"[number % 4]]
    in_parallel(lambda name: storage.publish(name, []), names, threads=16)
    found = [info.path for info in storage.list_objects("a")]
    assert len(found) == len(names)
    assert set(found) == set(names)


@pytest.fixture
def botocore_client(server: S3Server) -> Iterator[Any]:
    client = botocore.session.Session().create_client("s3")
    yield client
    client.close()


def begin_upload(client: Any, server: S3Server, url: str, path: str) -> str:
    key = f"{url.removeprefix(server.url(''))}/{path}"
    begun = client.create_multipart_upload(Bucket=server.bucket, Key=key)
    upload: str = begun["UploadId"]
    client.upload_part(Bucket=server.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"12345")
    return upload


def test_sweeping_aborts_uploads_of_the_folder_that_were_never_completed(
    storage: Storage, server: S3Server, botocore_client: Any
) -> None:
    storage.publish("a/object", [b"1"])
    kept = begin_upload(botocore_client, server, storage.url, "ab/other")
    begin_upload(botocore_client, server, storage.url, "a/dead")
    assert storage.sweep("a") == []
    # The server tells whole seconds.
    time.sleep(1.1)
    (found,) = storage.sweep("a", grace_seconds=0, dry_run=True)
    assert (found.path, found.bytes) == ("a/dead", 5)
    assert found.modified == pytest.approx(time.time(), abs=10)
    assert [info.path for info in storage.sweep("a", grace_seconds=0)] == ["a/dead"]
    assert storage.sweep("a", grace_seconds=0) == []
    assert [info.path for info in storage.sweep("", grace_seconds=0)] == ["ab/other"]
    assert kept
    assert storage.read("a/object") == b"1"


def test_who_may_not_list_uploads_is_warned_and_goes_on(
    storage: Storage, server: S3Server, botocore_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_upload(botocore_client, server, storage.url, "a/dead")
    time.sleep(1.1)
    for name, value in READER.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=r"never completed stay: .*AccessDenied.*s3:AbortMultipartUpload"):
        assert open_storage(storage.url).sweep("a", grace_seconds=0) == []
    for name, value in OWNER.items():
        monkeypatch.setenv(name, value)
    assert [info.path for info in open_storage(storage.url).sweep("a", grace_seconds=0)] == ["a/dead"]


@pytest.mark.parametrize(
    "fault", ["internal error", "slow down", "reset before", "reset within download", "truncated", "lost reply"]
)
def test_requests_that_fail_are_sent_again_until_they_succeed(
    url: str, server: S3Server, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(server.endpoint, {fault: 0.4}, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage(url)
        published = [storage.publish(f"a/{number}", [b"%d" % number]) for number in range(8)]
        # Without a lost reply the one writer there is knows that it won.
        assert fault == "lost reply" or all(published)
        assert [storage.read(f"a/{number}") for number in range(8)] == [b"%d" % number for number in range(8)]
        assert {info.path for info in storage.list_objects("")} == {f"a/{number}" for number in range(8)}
        assert storage.list_folders("") == ["a"]
        storage.replace("a/0", [b"new"])
        for number in range(1, 8):
            storage.delete(f"a/{number}")
        assert [(info.path, info.bytes) for info in storage.list_objects("a")] == [("a/0", 3)]
        assert proxy.injected[fault] > 0


def test_a_put_whose_answer_was_lost_finds_its_own_object(
    url: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyProxy(server.endpoint, {"lost reply": 0.5}, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage(url)
        published = [storage.publish(f"{number}", [b"%d" % number]) for number in range(10)]
        assert not all(published)
        assert [storage.read(f"{number}") for number in range(10)] == [b"%d" % number for number in range(10)]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("internal error", "InternalError: injected"),
        ("slow down", r"SlowDown: injected\. The server asks for fewer requests"),
        ("reset before", r"Unreachable: .*Check that AWS_ENDPOINT_URL"),
        ("truncated", "Unreachable: "),
    ],
)
def test_a_server_that_goes_on_failing_ends_in_an_error_that_names_the_object(
    storage: Storage, server: S3Server, fault: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.publish("some/object", [bytes(1000)])
    monkeypatch.setenv("GRADSTORE_S3_RETRY_SECONDS", "1")
    with FaultyProxy(server.endpoint, {fault: 1.0}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        begun = time.monotonic()
        with pytest.raises(StorageError, match=rf"{storage.url}/some/object: {said}.* Tried \d+ times in \d seconds"):
            open_storage(storage.url).read("some/object")
        assert time.monotonic() - begun < 10
        assert proxy.injected[fault] >= 1


def test_a_server_that_never_answers_is_given_up(
    storage: Storage, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADSTORE_S3_RETRY_SECONDS", "0")
    monkeypatch.setenv("GRADSTORE_S3_TIMEOUT_SECONDS", "1")
    with FaultyProxy(server.endpoint, {"silence": 1.0}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StorageError, match=r"some/object: Unreachable: .* Tried 1 times in \d+ seconds"):
            open_storage(storage.url).publish("some/object", [b"1"])


@contextmanager
def answering(*answers: tuple[int, str]) -> Iterator[str]:
    """URL of a server that answers puts with these statuses and codes, one after another, the last one for good."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, code = left.pop(0) if len(left) > 1 else left[0]
            body = f"<Error><Code>{code}</Code><Message>as scripted</Message></Error>".encode() if code else b""
            self.send_response(status)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.usefixtures("server", "client")
def test_a_server_that_overwrites_where_it_must_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering((200, "")) as old:
        monkeypatch.setenv("AWS_ENDPOINT_URL", old)
        with pytest.raises(StorageError, match=r"s3://bench/a/record: the server overwrites an object"):
            open_storage("s3://bench/a").publish("record", [b"1"])


@pytest.mark.usefixtures("server", "client")
def test_a_conflict_says_nothing_of_whether_there_is_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    conflict, exists = (409, "ConditionalRequestConflict"), (412, "PreconditionFailed")
    for answers, published in (([conflict, (200, ""), exists], True), ([conflict, conflict, exists], False)):
        with answering(*answers) as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL", server)
            assert open_storage("s3://bench/a").publish("record", [b"1"]) == published
