"""What docs/security.md promises: no secret is taken or told, nothing is unpickled, no code comes with a model or a store."""

from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gradstore
from gradstore.cluster import Engine
from gradstore.errors import SpecError, StorageError
from gradstore.spec import read_spec
from gradstore.spec.urls import holds_credentials
from gradstore.stages.export import Selection, export
from gradstore.stages.progress import Progress
from gradstore.stages.report import report
from gradstore.stages.run import stages_of
from gradstore.stages.serve.pages import Pages
from gradstore.stages.status import status
from gradstore.stages.verify import verify
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureStore
from tests import runs
from tests.runs import InThisProcess, make_run, write_run
from tests.stores import all_objects
from tests.synthetic import make

PACKAGE = Path(gradstore.__file__).parent
QUIET = Progress(quiet=True)
SECRET = "s3cr3t-that-nobody-may-see"


def trees() -> Iterator[tuple[str, ast.AST]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            yield str(file.relative_to(PACKAGE)), node


@pytest.mark.parametrize(
    ("url", "holds"),
    [
        (f"s3://AKIA:{SECRET}@bucket/prefix", True),
        (f"s3://AKIA:{SECRET[:4]}/{SECRET[4:]}@bucket/prefix", True),
        (f"https://user:{SECRET}@host/data.jsonl", True),
        ("https://user@host:8443/data.jsonl", True),
        (f"https://user:{SECRET[:4]}/{SECRET[4:]}@host/data.jsonl", True),
        (f"simplecache::S3://AKIA:{SECRET}/x@bucket/prefix", True),
        ("abfs://container@account.dfs.core.windows.net/x", False),
        ("github://organisation:repository@main/x", False),
        ("https://host/x?mail=a@b", False),
        ("https://host?mail=a@b", False),
        ("https://host:8443/data@2/x.jsonl", False),
        ("s3://bucket/user@host/x", False),
        ("runs/a@b:c", False),
        ("package:module/data", False),
        ("http://[::1]:8333", False),
        ("http://[::", False),
    ],
)
def test_urls_with_credentials_are_told_from_others(url: str, holds: bool) -> None:
    assert holds_credentials(url) is holds


@pytest.mark.parametrize(
    ("table", "key"),
    [("run", "store"), ("model", "source"), ("data", "source"), ("cluster", "scheduler"), ("cluster", "kind")],
)
def test_a_run_with_a_secret_in_a_url_is_refused_without_telling_it(tmp_path: Path, table: str, key: str) -> None:
    tables = {"run": {"name": "a", "store": "b"}, "model": {"source": "c"}, "data": {"source": "d"}}
    tables.setdefault(table, {})[key] = f"https://user:{SECRET}@host/place"
    path = write_run(tmp_path / "run.toml", tables)

    with pytest.raises(
        SpecError, match=rf"run\.toml: {table}\.{key}: the URL holds a user name or a password"
    ) as refused:
        read_spec(path)
    assert SECRET not in str(refused.value)

    done = runs.gradstore("plan", path)
    assert done.returncode == 2
    assert SECRET not in done.stdout + done.stderr


def test_a_store_or_an_endpoint_with_a_secret_is_refused_without_telling_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="store: the URL holds") as refused:
        open_storage(f"s3://AKIA:{SECRET}@bucket/prefix")
    assert SECRET not in str(refused.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{SECRET}@127.0.0.1:9")
    with pytest.raises(SpecError, match="AWS_ENDPOINT_URL: the URL holds") as refused:
        open_storage("s3://bucket/prefix").read("a")
    assert SECRET not in str(refused.value)
    for endpoint in (f"AKIA:{SECRET}@127.0.0.1:9", f"http://AKIA:{SECRET}/x@127.0.0.1:9"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises((SpecError, StorageError), match="AWS_ENDPOINT_URL") as told:
            open_storage("s3://bucket/prefix").read("a")
        assert SECRET not in str(told.value)


def test_credentials_of_the_environment_are_in_nothing_that_is_kept_or_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "GRADSTORE_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    spec = read_spec(make_run(tmp_path, str(tmp_path / "store"), {"score.tail_patch": {"queries": 0}}))
    engine: Any = InThisProcess()
    for stage in stages_of(spec):
        stage(spec, engine, Progress())
    report(spec.run.store, tmp_path / "report.html")

    kept = all_objects(FeatureStore.open(spec.run.store).storage)
    assert [path for path, content in kept.items() if SECRET.encode() in content] == []
    assert SECRET not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert SECRET not in "".join(capfd.readouterr())
    assert SECRET not in Pages(url=spec.run.store).overview()


def test_a_store_is_read_without_unpickling_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make(tmp_path / "run", rows=48, queries=4)
    engine: Engine = InThisProcess()  # type: ignore[assignment]
    for stage in stages_of(spec):
        stage(spec, engine, QUIET)

    def refused(*_: object, **__: object) -> object:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refused)

    assert status(spec.run.store)["name"]
    assert verify(spec.run.store, full=True, progress=QUIET)["problems"] == []
    export(spec.run.store, tmp_path / "out.npz", Selection(), force=False, progress=QUIET)
    report(spec.run.store, tmp_path / "report.html")
    assert gradstore.open(spec.run.store)["loss"].notnull().all()


def test_no_model_brings_code_and_nothing_of_ours_is_unpickled() -> None:
    for file, node in trees():
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant), file
            assert node.value.value is False, file
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    assert isinstance(value, ast.Constant), file
                    assert value.value is False, file
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & {*names}, file
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            # Without its safe mode it would run what a file says.
            assert {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}["weights_only"] == "True", (
                file
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), file
