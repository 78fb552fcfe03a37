"""A whole run whose store is a bucket: what the viewer shows of it, and that credentials are kept and told nowhere."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gradstore.errors import StorageError
from gradstore.stages.report.formatting import signed
from gradstore.store.artifacts import ScoresArtifact
from gradstore.store.features import FeatureStore
from tests.runs import command, gradstore, make_run
from tests.servers import IDENTITIES, S3Server, running_seaweed
from tests.stores import all_objects
from tests.viewer import Answer, ask

pytestmark = pytest.mark.slow

# Neither is in what is spelled, hashed or encoded otherwise.
KEY_ID, SECRET = "AKIANOBODYMAYSEETHISID", "s3cr3t-that-nobody-may-see"
WRONG = "wr0ng-that-nobody-may-see"
PLACES = (
    "/",
    "/queries",
    "/queries?q=guitar",
    "/queries/block/3?by=unweighted&by=learned",
    "/weights",
    "/evaluations",
    "/jobs",
    "/health",
)
REFUSED = {"/nothing": 404, "/queries/block/12": 404, "/queries/none/0": 400, "/static/..%2Fhandlers.py": 404}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A run that ended as a job: its store, the environment of its commands, the folder they wrote to, and what they said."""

    url: str
    env: Mapping[str, str]
    folder: Path
    said: Mapping[str, str]
    job: str
    recall: Mapping[str, Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that knows an owner whose credentials no other text holds."""
    owner = {
        "name": "secretive",
        "credentials": [{"accessKey": KEY_ID, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    with running_seaweed(tmp_path_factory.mktemp("seaweed"), {"identities": [owner, *IDENTITIES]}) as server:
        yield server


@pytest.fixture(scope="module")
def finished(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A job that ran a tiny model, and commands that looked at it, by both clients; temporary files were in the same folder."""
    folder = tmp_path_factory.mktemp("secretive")
    (folder / "tmp").mkdir()
    url = server.url("secretive")
    path = make_run(
        folder / "run",
        url,
        {
            "evaluate": {"baselines": ["random"]},
            "evaluate.recall": {"by": "label", "k": [5]},
            "cluster": {"workers": 1},
        },
    )
    env = {
        **server.env,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "HF_TOKEN": SECRET,
        "GRADSTORE_CACHE": str(folder / "cache"),
        "TMPDIR": str(folder / "tmp"),
    }
    said: dict[str, str] = {}

    def say(*words: str | Path, also: Mapping[str, str] | None = None, code: int = 0) -> str:
        done = gradstore(*words, env={**env, **(also or {})}, cwd=folder)
        assert done.returncode == code, (words, done.stdout, done.stderr)
        said[" ".join(map(str, words)) + str(also or "")] = done.stdout + done.stderr
        return done.stdout

    job = json.loads(say("submit", path, "--json"))["id"]
    say("jobs", "show", url, job, "--wait", "--json")
    say("jobs", "logs", url, job, "--json")
    recall = say("--log-format", "json", "--metrics", folder / "stages.prom", "evaluate", "recall", path, "--json")
    say("status", url, "--json", also={"GRADSTORE_S3_CLIENT": "s3fs"})
    say("report", url, "--json", "-o", folder / "report.html")
    for client in ("obstore", "s3fs"):
        refused = {"AWS_SECRET_ACCESS_KEY": WRONG, "GRADSTORE_S3_CLIENT": client, "GRADSTORE_S3_RETRY_SECONDS": "1"}
        say("serve", url, "--port", "0", also=refused, code=StorageError.exit_code)
    return Finished(url=url, env=env, folder=folder, said=said, job=job, recall=json.loads(recall))


@pytest.fixture(scope="module")
def answers(finished: Finished) -> Mapping[str, Answer]:
    """What `gradstore serve` answered, by the place that was asked for; it wrote to a file of the folder, and ended well."""
    with (finished.folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            command("serve", finished.url, "--port", "0"),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **finished.env},
        )
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip().rstrip("/")
            found = {place: ask(address + place) for place in (*PLACES, *REFUSED, f"/jobs/{finished.job}")}
            found["elsewhere"] = ask(f"{address}/", Host="evil.example")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            return found
        finally:
            process.kill()
            process.communicate()


@pytest.fixture
def store(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    """The store as this process reads it."""
    for name, value in finished.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GRADSTORE_CACHE")
    return FeatureStore.open(finished.url)


def test_the_viewer_shows_a_store_in_a_bucket(
    finished: Finished, answers: Mapping[str, Answer], store: FeatureStore
) -> None:
    assert {place: answers[place].code for place in PLACES} == dict.fromkeys(PLACES, 200)

    overview = answers["/"].text
    told = (
        ">train<",
        ">learn<",
        ">eval<",
        "weights/learned",
        "scores/block.learned",
        "contributions",
    )
    assert [part for part in (finished.url, *told) if part not in overview] == []

    queries = store.open_set("eval").read_inputs(0).to_pylist()
    assert "12 queries; each with" in answers["/queries"].text
    assert all(f'href="/queries/block/{row["row"]}"' in answers["/queries"].text for row in queries)
    with_word = sum("guitar" in row["text"] for row in queries)
    assert 0 < with_word < 12
    assert f"{with_word} quer" in answers["/queries?q=guitar"].text

    query = answers["/queries/block/3?by=unweighted&by=learned"].text
    train = {row["row"]: row for row in store.open_set("train").read_inputs(0).to_pylist()}
    assert queries[3]["text"] in query
    for ranking in ("block.unweighted", "block.learned"):
        ranked = ScoresArtifact.open(store.storage, ranking).read().to_pylist()
        found = [train[row["example"]] for row in ranked if row["query"] == 3 and row["example"] in train]
        assert found
        assert [row["example_id"] for row in found if row["text"] not in query] == []

    assert "<svg" in answers["/weights"].text
    assert "<h3>learned</h3>" in answers["/weights"].text
    unweighted = 100 * finished.recall["methods"][0]["measures"]["recall@5"]["mean"]
    assert "Known contributors, recall@5" in answers["/evaluations"].text
    assert f"<b>{signed(unweighted)}</b>" in answers["/evaluations"].text
    assert finished.job in answers["/jobs"].text
    assert "featurize train" in answers[f"/jobs/{finished.job}"].text
    assert "None were found" in answers["/health"].text


def test_the_viewer_of_a_bucket_refuses_what_it_would_of_a_directory(answers: Mapping[str, Answer]) -> None:
    assert {place: answers[place].code for place in REFUSED} == REFUSED
    assert answers["elsewhere"].code == 403
    for place in (*REFUSED, "elsewhere"):
        assert "Traceback" not in answers[place].text
        assert "Feature sets" not in answers[place].text
    assert "has no query in row 12" in answers["/queries/block/12"].text


def test_credentials_are_in_no_object_no_file_and_nothing_that_is_said(
    finished: Finished, answers: Mapping[str, Answer], store: FeatureStore
) -> None:
    found = {f"object {path}": spelled(path, content) for path, content in all_objects(store.storage).items()}
    found |= {
        f"file {path.relative_to(finished.folder)}": spelled(path.name, path.read_bytes())
        for path in finished.folder.rglob("*")
        if path.is_file()
    }
    found |= {f"command {words}": said.encode() for words, said in finished.said.items()}
    found |= {f"page {place}": answer.body + repr(answer.headers).encode() for place, answer in answers.items()}

    assert [
        place for place, content in found.items() if any(key.encode() in content for key in (KEY_ID, SECRET, WRONG))
    ] == []
    # What is no secret is found in all of these places, also where tables are compressed.
    for text, kind in (
        ("texts.jsonl", "object features/"),
        ("Ctrl-C ends it", "file serve.log"),
        (finished.url, "file report.html"),
        (finished.url, "command status"),
        (finished.url, "page /"),
    ):
        assert [place for place, content in found.items() if place.startswith(kind) and text.encode() in content], kind


def spelled(path: str, content: bytes) -> bytes:
    """The bytes of a file or an object, of tables as texts: those are compressed."""
    if not path.endswith(".parquet"):
        return content
    table = pq.read_table(io.BytesIO(content))
    return repr((table.schema.metadata, table.to_pylist())).encode()
