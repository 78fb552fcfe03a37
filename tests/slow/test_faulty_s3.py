"""Writers and readers behind a faulty S3: no wrong byte, and an end or an error that names the object."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from functools import cache
from itertools import count

import numpy as np
import pytest

from gradstore.errors import StorageError
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureStore
from tests import stores
from tests.faults.contents import damage, essence, undisturbed
from tests.faults.processes import Writer, resume
from tests.faults.proxy import KINDS, FaultyProxy
from tests.servers import S3Server

pytestmark = pytest.mark.slow

_NAMES = count()
INFO = stores.set_info(rows=6 * 16, block_rows=16, groups={f"layers.{layer}.mlp": 800 for layer in range(8)})
WRITERS = 3
MOST_ROUNDS = 40
MOST_STORES = 6
FAULTS = [kind for kind in KINDS if kind != "silence"]
# Of the requests that get or put an object, 16 % fail one way or another.
MIXED = dict.fromkeys(FAULTS, 0.025) | {"lost reply": 0.035, "reset within upload": 0.025}


@pytest.fixture(params=["obstore", "s3fs"])
def client(request: pytest.FixtureRequest, seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The client of all processes; the environment leads to the server itself."""
    for name, value in {**seaweed.env, "GRADSTORE_S3_CLIENT": request.param}.items():
        monkeypatch.setenv(name, value)
    return str(request.param)


@cache
def expected() -> dict[str, bytes]:
    return undisturbed(INFO)


# Of s3fs, which is slower and no default, faults come together, below.
@pytest.mark.parametrize("client", ["obstore"], indirect=True)
@pytest.mark.parametrize("kind", FAULTS)
def test_one_kind_of_fault_alone_leaves_no_wrong_byte(
    seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], client: str, kind: str
) -> None:
    weather(seaweed, monkeypatch, capsys, client, {kind: 0.15})


def test_all_faults_together_leave_no_wrong_byte(
    seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], client: str
) -> None:
    weather(seaweed, monkeypatch, capsys, client, MIXED)


@pytest.mark.parametrize("kind", ["slow down", "reset before", "silence"])
@pytest.mark.usefixtures("client")
def test_a_server_that_is_down_for_good_ends_the_work_within_the_retry_time(
    seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    url = new_store(seaweed)
    monkeypatch.setenv("GRADSTORE_S3_RETRY_SECONDS", "4")
    # How long a request may go unanswered before it counts as failed.
    monkeypatch.setenv("GRADSTORE_S3_TIMEOUT_SECONDS", "3")
    with FaultyProxy(seaweed.endpoint, {}) as proxy, monkeypatch.context() as through:
        through.setenv("AWS_ENDPOINT_URL", proxy.url)
        feature_set = FeatureStore.open(url).open_set(INFO.name)
        stores.write(feature_set, 2)
        proxy.become({kind: 1.0})
        for use in (lambda: stores.write(feature_set, 4), lambda: feature_set.read_block(2)):
            began = time.monotonic()
            with pytest.raises(StorageError, match=rf"{re.escape(url)}/features/train/\S+: "):
                use()
            assert time.monotonic() - began < 15
    assert FeatureStore.open(url).open_set(INFO.name).missing_blocks() == [0, 1, 3, 4, 5]


def new_store(seaweed: S3Server) -> str:
    url = seaweed.url(f"faulty-{next(_NAMES)}")
    stores.create(url, INFO)
    return url


def weather(
    seaweed: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    client: str,
    rates: Mapping[str, float],
) -> None:
    """Write and read sets through a faulty server until every fault has happened; look at each without the faults."""
    stops, began = 0, time.monotonic()
    with FaultyProxy(seaweed.endpoint, rates, seed=len(client)) as proxy:
        for _ in range(MOST_STORES):
            url = new_store(seaweed)
            with monkeypatch.context() as through:
                through.setenv("AWS_ENDPOINT_URL", proxy.url)
                stops += write(url) + read(url)
            require_undisturbed(url)
            if proxy.injected.keys() >= rates.keys():
                break
    assert proxy.injected.keys() == rates.keys()
    with capsys.disabled():
        faults = ", ".join(f"{number} x {kind}" for kind, number in proxy.injected.items())
        print(f"\n{client}: {faults}; {stops} errors; 0 wrong bytes; {time.monotonic() - began:.0f} s")


def require_undisturbed(url: str) -> None:
    """Nothing is left to resume, and every object is what it is where nothing happened."""
    assert resume(url, {}) == {}
    storage = open_storage(url)
    assert essence(storage) == expected()
    assert damage(storage.url) == []


def write(url: str) -> int:
    """Start writers again until all blocks are committed; return how many were stopped by an error."""
    stops = 0
    for first in range(0, MOST_ROUNDS * WRITERS, WRITERS):
        started = [Writer(url, "--seed", str(seed), env={}) for seed in range(first, first + WRITERS)]
        statuses = [writer.wait() for writer in started]
        for writer, status in zip(started, statuses, strict=True):
            assert (status == 0) == (writer.error is None)
            if writer.error is not None:
                require_named(url, status, writer.error["message"])
        stops += sum(map(bool, statuses))
        if not all(statuses):
            return stops
    raise AssertionError(f"{url}: not all is committed after {MOST_ROUNDS} rounds")


def read(url: str) -> int:
    """Read all blocks, again where an error stops it, and compare them; return how many errors did."""
    stops, block = 0, 0
    while block < INFO.num_blocks:
        try:
            found = FeatureStore.open(url).open_set(INFO.name).read_block(block)
        except StorageError as error:
            require_named(url, error.exit_code, str(error))
            stops += 1
            assert stops < MOST_ROUNDS
            continue
        for group, values in stores.features(INFO, block).items():
            np.testing.assert_array_equal(found[group], values)
        block += 1
    return stops


def require_named(url: str, status: int, message: str) -> None:
    """An error that ends the work is the storage's, and begins with the object or folder that it is about."""
    assert status == StorageError.exit_code, message
    assert re.match(rf"{re.escape(url)}/\S+: ", message), message
