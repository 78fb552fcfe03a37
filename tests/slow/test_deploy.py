"""Services of deploy/compose as plain processes, and the policies of deploy/s3 on a real server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import Client

from tests import servers, synthetic
from tests.clusters import with_certificates
from tests.runs import gradstore
from tests.servers import S3Server, free_ports, running_seaweed, wait_until_it_answers

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "deploy" / "compose"
BIN = Path(sys.executable).parent
STARTS_WITHIN_SECONDS = 60.0


class Services:
    """The services of compose.yaml on this machine: paths of containers are in a folder, names of hosts are the loopback."""

    def __init__(self, folder: Path) -> None:
        self._services = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
        s3, master, volume, filer, scheduler = free_ports(5)
        self._weed = [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
        self._weed += [f"-admin.port={free_ports(1)[0]}"]
        self._ports = {"8333": str(s3), "8786": str(scheduler), "8787": "0"}
        self.folder = folder
        (folder / "data").mkdir()
        self.certificates = folder / "certificates"
        identities = json.loads((COMPOSE / "secrets" / "identities.example.json").read_text())
        (folder / "identities").write_text(json.dumps(identities))
        keys = (COMPOSE / "secrets" / "s3.example.env").read_text().split()
        self.keys = dict(line.split("=", 1) for line in keys)

    def command(self, name: str, given: Sequence[str] | None = None) -> list[str]:
        """Command of a service, or another one in its container."""
        service = self._services[name]
        words = [*service.get("entrypoint", ()), *(given or service["command"])]
        found = [self._here(word) for word in words]
        more = self._weed if name == "storage" else []
        return [str(BIN / found[0]) if (BIN / found[0]).exists() else found[0], *found[1:], *more]

    def env(self, name: str) -> dict[str, str]:
        """Environment of a service, beside what processes of this machine need."""
        declared = {key: self._here(value) for key, value in self._services[name].get("environment", {}).items()}
        path = f"{BIN}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.folder), "PYTHONPATH": str(ROOT), **self.keys, **declared}

    @property
    def storage(self) -> S3Server:
        env = {**self.keys, "AWS_REGION": "us-east-1"}
        return S3Server(endpoint=self._here("http://storage:8333"), bucket="gradstore", env=env)

    def _here(self, word: str) -> str:
        word = re.sub(r"/(certificates|runs|data)\b", lambda found: str(self.folder / found[1]), word)
        word = word.replace("/run/secrets/", f"{self.folder}/").replace("0.0.0.0", "127.0.0.1")
        word = re.sub(r"(?<=://)(storage|scheduler)|(?<==)storage", "127.0.0.1", word)
        return re.sub(r"\b(8333|8786|8787)\b", lambda found: self._ports[found[1]], word)

    @contextmanager
    def running(self, name: str, number: int = 0) -> Iterator[subprocess.Popen[bytes]]:
        log = self.log(name, number)
        folder = self.folder / f"{name}-{number}"
        folder.mkdir()
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(name), env=self.env(name), cwd=folder, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def log(self, name: str, number: int = 0) -> Path:
        return self.folder / f"{name}-{number}.log"

    def run(self, name: str, given: Sequence[str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(name, given),
            env=self.env(name),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )


def shown(marker: str) -> list[str]:
    """Words that the README gives to `docker compose run --rm run`, of the line that has a marker."""
    [line] = [line for line in (COMPOSE / "README.md").read_text().splitlines() if marker in line]
    return line.partition("run --rm run ")[2].split()


def test_services_of_compose_run_a_run(tmp_path: Path) -> None:
    services = Services(tmp_path)
    with ExitStack() as stack:
        storage = stack.enter_context(services.running("storage"))
        made = services.run("certificates")
        assert made.returncode == 0, made.stderr
        assert services.run("certificates").stdout == "", "they are made once"
        stack.enter_context(services.running("scheduler"))
        for number in range(2):
            stack.enter_context(services.running("worker", number))
        wait_until_it_answers(services.storage, storage, services.log("storage"))
        with with_certificates(services.certificates):
            address = services.command("run")[-1]
            assert address.startswith("tls://127.0.0.1:")
            with Client(address, timeout=60) as client:
                client.wait_for_workers(2, timeout=STARTS_WITHIN_SECONDS)
        small = ["200" if word == "2000" else word for word in shown("gradstore synth")]
        synthesized = services.run("run", [*small, "--queries", "4"])
        assert synthesized.returncode == 0, synthesized.stderr
        done = services.run("run")
        assert done.returncode == 0, done.stderr
        assert "2 workers" in done.stderr
        status = services.run("run", [*shown("gradstore status"), "--json"])
        assert status.returncode == 0, status.stderr
        assert "train" in json.dumps(json.loads(status.stdout))
        submitted = services.run("run", shown("gradstore submit"))
        assert submitted.returncode == 0, submitted.stderr
        job = submitted.stdout.split()[0]
        shown_job = services.run("run", ["gradstore", "jobs", "show", "s3://gradstore/demo", job, "--wait"])
        assert shown_job.returncode == 0, shown_job.stderr
        listed = services.run("run", shown("gradstore jobs list"))
        assert job in listed.stdout
        services.keys |= {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "CHANGE-ME-TOO"}
        assert services.run("run", shown("gradstore status")).returncode == 0
        refused = services.run("run", ["gradstore", "prune", "s3://gradstore/demo", "scores/ekfac.learned"])
        assert refused.returncode != 0
        assert "Traceback" not in refused.stderr


def synthetic_run(folder: Path, url: str) -> Path:
    """Write a synthetic run whose store is elsewhere, without asking that; return its run.toml."""
    spec = synthetic.make(folder)
    run = folder / "run.toml"
    text = run.read_text()
    assert spec.run.store in text
    run.write_text(text.replace(spec.run.store, url))
    return run


def policy(name: str, prefix: str) -> str:
    text = (ROOT / "deploy" / "s3" / f"{name}.json").read_text()
    return text.replace("BUCKET", servers.BUCKET).replace("PREFIX", prefix)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server with a writer and a reader who have nothing but the policies, for the prefix runs/one."""
    identities: list[dict[str, Any]] = [servers.IDENTITIES[0]]
    for name in ("writer", "reader"):
        keys = {"accessKey": name, "secretKey": name * 3}
        identities.append({"name": name, "credentials": [keys], "policyNames": [name]})
    policies = [{"name": name, "content": policy(name, "runs/one")} for name in ("writer", "reader")]
    with running_seaweed(tmp_path_factory.mktemp("guarded"), {"identities": identities, "policies": policies}) as found:
        yield found


def as_user(server: S3Server, name: str) -> Mapping[str, str]:
    return {**server.env, "AWS_ACCESS_KEY_ID": name, "AWS_SECRET_ACCESS_KEY": name * 3}


def test_a_writer_runs_a_whole_run_and_a_reader_reads_it_and_changes_nothing(guarded: S3Server, tmp_path: Path) -> None:
    url = guarded.url("runs/one/store")
    run = synthetic_run(tmp_path / "run", url)
    writer, reader = as_user(guarded, "writer"), as_user(guarded, "reader")
    done = gradstore("run", run, "--quiet", env=writer, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for verb in ("gc", "verify"):
        kept = gradstore(verb, url, env=writer)
        assert kept.returncode == 0, kept.stderr
        assert "warning" not in kept.stderr.lower()
    page = tmp_path / "page.html"
    exported = tmp_path / "features.parquet"
    readings: Sequence[Sequence[str | Path]] = (
        ("status", url),
        ("stat", url),
        ("verify", url, "--full", "--quiet"),
        ("export", url, exported, "--quiet"),
        ("report", url, "--output", page),
    )
    for command in readings:
        read = gradstore(*command, env=reader)
        assert read.returncode == 0, f"{command}: {read.stderr}"
    before = gradstore("stat", url, "--json", env=reader).stdout
    changes = (
        ("prune", url, "scores/identity.learned"),
        ("delete", url, "--where", "label=*", "--yes", "--quiet"),
    )
    for change in changes:
        refused = gradstore(*change, env=reader)
        assert refused.returncode == 7, f"{change}: {refused.stdout}{refused.stderr}"
        assert re.search(r"s3:(Put|Delete)Object", refused.stderr)
        assert "Traceback" not in refused.stderr
    assert gradstore("stat", url, "--json", env=reader).stdout == before


@pytest.mark.parametrize("name", ["writer", "reader"])
def test_neither_sees_another_prefix(guarded: S3Server, tmp_path: Path, name: str) -> None:
    run = synthetic_run(tmp_path / "run", guarded.url("runs/two/store"))
    refused = gradstore("featurize", run, "--quiet", env=as_user(guarded, name))
    assert refused.returncode == 7, refused.stderr
    assert "s3:" in refused.stderr
    seen = gradstore("status", guarded.url("runs/two/store"), env=as_user(guarded, name))
    assert seen.returncode == 7, seen.stderr
