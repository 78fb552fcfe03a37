"""A new text asked of a store: what a stored query of the same text is answered, by the session and by the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine
from gradstore.errors import ContractError, DataError, SpecError, StorageError
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.query import Session
from gradstore.store.backend import open_storage
from gradstore.store.examples import from_table
from gradstore.store.features import FeatureStore
from tests.contributing import stored_c
from tests.models import make_tiny_model
from tests.runs import InThisProcess, gradstore, make_run
from tests.servers import READER, S3Server
from tests.tasks import write_own_run

TEXT = "bank shares profit market"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """A run of a tiny model to its weights."""
    folder = tmp_path_factory.mktemp("query")
    changes: dict[str, dict[str, Any]] = {
        "cluster": {"workers": 1, "device": "cpu"},
        "features": {"block_rows": 16},
        "learn": {"epochs": 1},
    }
    spec = read_spec(make_run(folder, str(folder / "store"), changes))
    for stage in (featurize, build_kernel, contribute, learn):
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    return spec


@pytest.fixture(scope="module")
def session(finished: RunSpec) -> Iterator[Session]:
    with Session(finished.run.store) as opened:
        yield opened


def texts(spec: RunSpec, set_name: str) -> list[str]:
    return [example.text for example in from_table(FeatureStore.open(spec.run.store).open_set(set_name).read_inputs(0))]


def test_a_text_is_answered_as_a_stored_query_of_that_text(session: Session, finished: RunSpec) -> None:
    text = texts(finished, "eval")[3]

    new, stored = session.query(text, k=5), session.query(index="eval:3", k=5)

    assert [*new.rankings] == ["unweighted", "learned"]
    c = stored_c(FeatureStore.open(finished.run.store), "eval")
    for name, ranking in new.rankings.items():
        for ours, theirs in zip(ranking.proponents, stored.rankings[name].proponents, strict=True):
            assert ours.row == theirs.row
            assert ours.score == pytest.approx(theirs.score, rel=1e-3)
        best = stored.rankings["unweighted"].proponents[0]
        assert best.score == pytest.approx(float(c[3, best.row].mean(dtype=np.float64)), rel=1e-5)
    assert new.text == text


def test_many_queries_are_answered_as_each_alone(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"text": TEXT}, {"prompt": "striker goal", "completion": " club season"}, {"text": "song band album"}]
    together = session.query_all(records, k=3)
    # Two of them to a reading.
    monkeypatch.setattr("gradstore.stages.query.session.QUERY_BYTES", 2 * session._query_bytes(None))
    apart = session.query_all(records, k=3)

    alone = [session.query(record=record, k=3) for record in records]
    assert [answer.query for answer in together] == ["query-1", "query-2", "query-3"]
    for several, fewer, one in zip(together, apart, alone, strict=True):
        for name, ranking in one.rankings.items():
            for found in (several, fewer):
                assert [winner.row for winner in found.rankings[name].proponents] == [
                    winner.row for winner in ranking.proponents
                ]
                np.testing.assert_allclose(
                    [winner.score for winner in found.rankings[name].opponents],
                    [winner.score for winner in ranking.opponents],
                    rtol=1e-3,
                )


def test_another_model_is_refused_and_one_that_moved_is_named(finished: RunSpec, tmp_path: Path) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(finished.model.source, moved)
    make_tiny_model(other, "llama", seed=1)

    with Session(finished.run.store, model=str(moved)) as session:
        assert session.query(TEXT).rankings
    with (
        Session(finished.run.store, model=str(other)) as session,
        pytest.raises(ContractError, match=rf"model.source: {other} has weights .*, the store was made with"),
    ):
        session.query(TEXT)
    make_tiny_model(other, "gpt2")
    with (
        Session(finished.run.store, model=str(other)) as session,
        pytest.raises(ContractError, match=r"architecture: store has .*\n.*--model"),
    ):
        session.query(TEXT)
    with (
        Session(finished.run.store, model=str(tmp_path / "nowhere")) as session,
        pytest.raises(SpecError, match="nowhere"),
    ):
        session.query(TEXT)


def test_a_text_that_is_longer_than_the_queries_is_refused_or_cut(session: Session) -> None:
    long = " ".join([TEXT] * 10)
    with pytest.raises(DataError, match=r"query-1: has \d+ tokens; the store's queries have at most 24 .*--truncate"):
        session.query(long)
    assert len(session.query(long, truncate=True).text) < len(long)


def test_queries_that_are_not_finite_are_refused_where_the_stores_own_may_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = read_spec(write_own_run(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = run.model_copy(update={"features": run.features.model_copy(update={"max_invalid": 0.9})})
    for stage in (featurize, build_kernel):
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))

    records = [{"id": name, "inputs": {"x": [x, 1.0, 1.0]}} for name, x in (("first", 1.0), ("second", nan))]
    with Session(spec.run.store) as session:
        with pytest.raises(DataError, match=r"^second: the model's output or gradient is not finite"):
            session.query_all(records)
        assert not [info for info in session._overlay._written.list_objects("") if "/query-" in info.path]


@pytest.mark.slow
def test_a_store_on_s3_is_asked_by_one_who_may_not_write_there(
    session: Session, finished: RunSpec, seaweed: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    below, url = open_storage(finished.run.store), seaweed.url("queried")
    above = open_storage(url)
    for info in below.list_objects(""):
        above.publish(info.path, [below.read(info.path)])
    for name, value in READER.items():
        monkeypatch.setenv(name, value)
    assert open_storage(url).list_folders("features") == ["eval", "learn", "train"]
    with pytest.raises(StorageError):
        open_storage(url).publish("a", [b"1"])

    with Session(url) as other:
        assert other.query(index="eval:2") == session.query(index="eval:2")
        assert other.query(TEXT) == session.query(TEXT)


@pytest.mark.slow
def test_the_command_prints_what_the_session_answers(session: Session, finished: RunSpec, tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "song band album")), encoding="utf-8"
    )
    store = finished.run.store

    done = gradstore("query", store, "--file", tmp_path / "queries.jsonl", "--k", "2", "--json")

    assert done.returncode == 0, done.stderr
    assert "query: 48/48 rows" in done.stderr
    found = json.loads(done.stdout)
    expected = session.query_all([{"text": TEXT}, {"text": "song band album"}], k=2)
    assert found["store"] == store
    for ours, theirs in zip(found["answers"], expected, strict=True):
        assert _rounded(ours) == _rounded(json.loads(json.dumps(theirs.to_json())))

    shown = gradstore("query", store, "--index", "eval:1", "--k", "1", "--by", "depth", "--weights", "learned", "-q")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "With weights “learned”, kernel block" in shown.stdout


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        pytest.param(["--text", ""], 3, "query-1: is empty", marks=pytest.mark.slow),
        (["--index", "eval:99"], 2, "eval has rows 0 to 11"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_an_exit_code(
    finished: RunSpec, options: list[str], code: int, match: str
) -> None:
    done = gradstore("query", finished.run.store, *options)

    assert done.returncode == code
    assert done.stdout == ""
    assert match in done.stderr
    assert "Traceback" not in done.stderr


def _rounded(value: Any) -> Any:
    """Plain values with numbers to four digits."""
    if isinstance(value, float):
        return float(f"{value:.3e}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
