"""Who may do what on S3 and how it is reached: keys, profiles, the public, readers, host names; through both clients."""

from __future__ import annotations

import json
import os
import sys
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import pytest

from gradstore.errors import StorageError
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureStore
from tests import stores
from tests.servers import BUCKET, DOMAIN, OWNER, READER, S3Server

pytestmark = pytest.mark.slow

_NAMES = count()


@pytest.fixture(autouse=True)
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADSTORE_S3_CLIENT", request.param)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("client", ["obstore", "s3fs"], indirect=True)


@pytest.fixture
def server(seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The server, in an environment that says nothing of AWS, with an empty home."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return seaweed


@pytest.fixture
def url(server: S3Server) -> str:
    return server.url(f"access-{next(_NAMES)}")


def set_environment(monkeypatch: pytest.MonkeyPatch, server: S3Server, keys: dict[str, str]) -> None:
    for name, value in {**keys, "AWS_ENDPOINT_URL": server.endpoint, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)


def written_store(monkeypatch: pytest.MonkeyPatch, server: S3Server, url: str) -> None:
    """A store of one block, written by its owner, who leaves nothing in the environment."""
    with monkeypatch.context() as owner:
        set_environment(owner, server, OWNER)
        stores.write(stores.create(url, stores.set_info()), 0)


def test_a_profile_gives_the_keys_the_region_and_the_endpoint(
    server: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = eu-central-1\nendpoint_url = {server.endpoint}\n[default]\nregion = us-east-1\n"
    )
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {OWNER['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {OWNER['AWS_SECRET_ACCESS_KEY']}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    storage = open_storage(url)
    assert storage.publish("a", [b"1"])
    assert storage.read("a") == b"1"
    assert storage.sweep("") == []


def test_a_profile_may_name_the_endpoint_of_s3_alone(
    server: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(
        f"[default]\nservices = lab\n[services lab]\ns3 =\n  endpoint_url = {server.endpoint}\n"
        "dynamodb =\n  endpoint_url = http://127.0.0.1:9\n"
    )
    for name, value in OWNER.items():
        monkeypatch.setenv(name, value)
    assert open_storage(url).publish("a", [b"1"])


def test_a_profile_that_does_not_exist_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StorageError, match=r"AWS_PROFILE: .*nobody.* Correct it, or the files in ~/\.aws"):
        open_storage(url).read("a")


def test_an_endpoint_of_a_profile_that_is_no_url_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[default]\nendpoint_url = nonsense\n")
    with pytest.raises(StorageError, match="profile's endpoint_url: found 'nonsense'; accepted: http://HOST"):
        open_storage(url).read("a")


def test_credentials_that_expire_are_asked_for_again(
    server: S3Server, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    answer = {
        "Version": 1,
        "AccessKeyId": OWNER["AWS_ACCESS_KEY_ID"],
        "SecretAccessKey": OWNER["AWS_SECRET_ACCESS_KEY"],
        # botocore renews what lasts less than ten minutes before each use.
        "Expiration": (datetime.now(UTC) + timedelta(minutes=5)).isoformat(),
    }
    program = tmp_path / "credentials.py"
    program.write_text(f"open({str(calls)!r}, 'a').write('.')\nprint({json.dumps(answer)!r})\n")
    (tmp_path / "config").write_text(
        f"[default]\nregion = us-east-1\nendpoint_url = {server.endpoint}\n"
        f"credential_process = {sys.executable} {program}\n"
    )
    assert open_storage(url).publish("a", [b"1"])
    before = len(calls.read_text())
    assert open_storage(url).read("a") == b"1"
    assert len(calls.read_text()) > before


def test_without_credentials_it_says_what_to_set(server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    with pytest.raises(StorageError, match=r"NoCredentials: .*Set AWS_ACCESS_KEY_ID .* AWS_PROFILE"):
        open_storage(url).read("a")


def test_the_public_reads_a_public_store_and_is_told_that_it_may_not_write(
    server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_store(monkeypatch, server, url)
    set_environment(monkeypatch, server, {"AWS_SKIP_SIGNATURE": "true"})
    opened = FeatureStore.open(url).open_set("train")
    assert set(opened.read_block(0)) == set(stores.GROUPS)
    with pytest.raises(
        StorageError,
        match=rf"{url}/features/new: AccessDenied: .*unsigned, because AWS_SKIP_SIGNATURE is set, and the public may not "
        "write there: that needs s3:PutObject",
    ):
        opened.storage.publish("features/new", [b"1"])


def test_a_reader_reads_and_is_told_which_permission_a_change_needs(
    server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_store(monkeypatch, server, url)
    set_environment(monkeypatch, server, READER)
    opened = FeatureStore.open(url).open_set("train")
    assert set(opened.read_block(0)) == set(stores.GROUPS)
    for refused, permission in (
        (lambda: opened.storage.publish("features/new", [b"1"]), "write there: that needs s3:PutObject"),
        (lambda: opened.storage.replace("features/new", [b"1"]), "write there: that needs s3:PutObject"),
        (lambda: opened.storage.delete("features/new"), "delete there: that needs s3:DeleteObject"),
    ):
        with pytest.raises(StorageError, match=f"features/new: AccessDenied: .*credentials may not {permission}"):
            refused()
    assert "features/new" not in {info.path for info in opened.storage.list_objects("")}


def test_a_switch_that_is_neither_true_nor_false_is_refused(
    server: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_environment(monkeypatch, server, {**OWNER, "AWS_SKIP_SIGNATURE": "perhaps"})
    with pytest.raises(StorageError, match="AWS_SKIP_SIGNATURE: found 'perhaps'; accepted: true, false"):
        open_storage(url).read("a")


@pytest.mark.parametrize("host", [DOMAIN, f"{BUCKET}.{DOMAIN}"])
def test_the_bucket_may_be_a_part_of_the_host_name(
    server: S3Server, url: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.endpoint.rpartition(":")[2]
    set_environment(monkeypatch, server, {**OWNER, "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true"})
    # No name server knows the host: the server itself stands in as a proxy, to which the whole URL is sent.
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_PROXY_URL", "http_proxy"):
        monkeypatch.setenv(name, server.endpoint)
    storage = open_storage(url)
    assert storage.publish("a/1", [b"1"])
    assert [info.path for info in storage.list_objects("a")] == ["a/1"]
    for name in ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "AWS_PROXY_URL", "http_proxy"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    assert open_storage(url).read("a/1") == b"1"
