"""What a run asks of Kubernetes: a stand-in for its API keeps what is made, since no cluster installs here."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import kr8s
import pytest

from gradstore.cluster.kinds.kubernetes import _create

CLUSTERS = "/apis/kubernetes.dask.org/v1/namespaces/gradstore/daskclusters"


class Api(ThreadingHTTPServer):
    """Keeps the last resource that was made, and every request that changes something."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.kept: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    server: Api

    def _answer(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        found: Any = {"kind": "Status", "status": "Success", "metadata": {}}
        if self.path.startswith("/version"):
            found = {"major": "1", "minor": "34", "gitVersion": "v1.34.0"}
        else:
            self.server.asked.append((self.command, self.path))
        if self.command == "POST":
            found = self.server.kept = body
        elif self.command == "PATCH":
            self.server.kept["spec"]["worker"] |= body["spec"]["worker"]
            found = self.server.kept
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    # One that failed to find credentials may be kept until it is collected.
    kr8s.Api._instances.clear()
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        names = {"cluster": "c", "user": "u"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": names}],
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "u", "user": {"token": "none"}}],
        }
        (tmp_path / "config").write_text(json.dumps(config))
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
        yield server
        server.shutdown()
        thread.join()


def test_a_dask_cluster_is_made_scaled_and_deleted_with_the_run(api: Api) -> None:
    resource = {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": "small"},
        "spec": {"worker": {"replicas": 1}},
    }
    with ExitStack() as stack:
        made = _create(resource, "gradstore", stack)
        made.patch({"spec": {"worker": {"replicas": 3}}})
        assert api.kept["spec"]["worker"]["replicas"] == 3
    assert api.asked == [
        ("POST", CLUSTERS),
        ("PATCH", f"{CLUSTERS}/small"),
        ("DELETE", f"{CLUSTERS}/small"),
    ]
