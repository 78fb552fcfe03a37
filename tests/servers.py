"""Servers that tests start for themselves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

BUCKET = "bench"
# Serves the bucket as bench.s3.test too, to whom sends that as the host: no name server knows it.
DOMAIN = "s3.test"

OWNER = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "testtest"}
READER = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "readerreader"}
"""Credentials that may read and list the bucket alone; so may the public."""

STARTS_WITHIN_SECONDS = 60.0

IDENTITIES = [
    {
        "name": name,
        "credentials": [{"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}],
        "actions": actions,
    }
    for name, keys, actions in (
        ("owner", OWNER, ["Admin", "Read", "Write", "List", "Tagging"]),
        ("reader", READER, [f"Read:{BUCKET}", f"List:{BUCKET}"]),
    )
] + [{"name": "anonymous", "actions": [f"Read:{BUCKET}", f"List:{BUCKET}"]}]

# SeaweedFS puts the gRPC port of each of its servers this far above the HTTP port.
GRPC_OFFSET = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """A running S3 server: where it is, a bucket that exists, and the environment that clients need."""

    endpoint: str
    bucket: str
    env: dict[str, str]

    def url(self, prefix: str) -> str:
        return f"s3://{self.bucket}/{prefix}"


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A SeaweedFS that all tests share, ended with the session."""
    with running_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@contextmanager
def running_seaweed(folder: Path, access: Mapping[str, Any] | None = None) -> Iterator[S3Server]:
    """Run a real SeaweedFS on free ports of the loopback, with what it stores in ``folder``; ``access`` says who may do what."""
    ports = dict(zip(("s3", "master", "volume", "filer", "admin"), free_ports(5), strict=True))
    identities = folder / "identities.json"
    identities.write_text(json.dumps(access or {"identities": IDENTITIES}))
    server = S3Server(
        endpoint=f"http://127.0.0.1:{ports['s3']}",
        bucket=BUCKET,
        env={**OWNER, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}", "AWS_REGION": "us-east-1"},
    )
    command = [
        str(Path(sys.executable).parent / "weed"),
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-bucket={BUCKET}",
        "-webdav=false",
        "-admin.ui=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.config={identities}",
        f"-s3.domainName={DOMAIN}",
        "-s3.autoCreateBucket=false",
        "-master.telemetry=false",
        *(f"-{name}.port={port}" for name, port in ports.items()),
    ]
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PATH": os.environ["PATH"]},
        )
    try:
        wait_until_it_answers(server, process, log)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_it_answers(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a signed write and list of the bucket, not just for the port: the bucket is made after the server is up."""
    import obstore
    from obstore.store import S3Store

    client = S3Store(
        server.bucket,
        config={
            "endpoint": server.endpoint,
            "access_key_id": server.env["AWS_ACCESS_KEY_ID"],
            "secret_access_key": server.env["AWS_SECRET_ACCESS_KEY"],
            "region": "us-east-1",
        },
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    deadline = time.monotonic() + STARTS_WITHIN_SECONDS
    while True:
        try:
            obstore.put(client, "started", b"yes")
            obstore.list(client, "").collect()
            return
        except Exception:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"weed did not start: {log.read_text(errors='replace')[-3000:]}") from None
            time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that are free now, and whose gRPC ports are."""
    found: list[int] = []
    held: list[socket.socket] = []
    try:
        while len(found) < count:
            # What the kernel gives is free and above 32768: it becomes the gRPC port, the one below it the HTTP port.
            high = hold(0)
            assert high is not None
            held.append(high)
            low = hold(high.getsockname()[1] - GRPC_OFFSET)
            if low is not None:
                held.append(low)
                found.append(low.getsockname()[1])
        return found
    finally:
        for each in held:
            each.close()


def hold(port: int) -> socket.socket | None:
    """Bind a port of the loopback, or None if it is taken."""
    probe = socket.socket()
    try:
        probe.bind(("127.0.0.1", port))
    except OSError:
        probe.close()
        return None
    return probe
