"""verify, repair, gc and stat as a user runs them, on a directory and on S3."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from gradstore.cli import main
from gradstore.cluster import Engine
from gradstore.spec import read_spec
from gradstore.stages.featurize import featurize
from gradstore.stages.progress import Progress
from gradstore.store.backend import open_storage
from gradstore.store.backend.directory import TEMPORARY
from gradstore.store.features import FeatureStore
from tests import stores
from tests.health import FIXTURE, contents, flip, write_missing
from tests.runs import InThisProcess, gradstore, make_run
from tests.servers import S3Server
from tests.storages import Killed, KillingStorage

pytestmark = pytest.mark.slow

Run = Callable[..., tuple[int, Any, str]]
CHUNK = "features/train/m0/model.layers.0.mlp.up_proj/c.1.0"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process: code, standard output (of --json the value), standard error."""

    def command(*arguments: str | Path) -> tuple[int, Any, str]:
        monkeypatch.setattr(sys, "argv", ["gradstore", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        out = json.loads(shown.out) if "--json" in arguments and shown.out else shown.out
        return int(ended.value.code or 0), out, shown.err

    return command


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A copy of the committed store of version 1."""
    shutil.copytree(FIXTURE, tmp_path / "store")
    return tmp_path / "store"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sound_store_is_clean_in_all_modes_and_nothing_of_it_changes(run: Run, store: Path) -> None:
    before = files(store)
    for arguments in (("verify",), ("verify", "--full"), ("repair",), ("repair", "--full"), ("gc",), ("stat",)):
        code, out, _ = run(*arguments, store)
        assert code == 0, arguments
        assert out
    assert files(store) == before


def test_verify_as_json_tells_all_that_it_looked_at(run: Run, store: Path) -> None:
    code, found, told = run("verify", store, "--full", "--json")
    everything = files(store)
    assert code == 0
    assert found["store"] == str(store)
    assert found["full"] is True
    assert found["objects"] == len(everything)
    assert found["bytes"] == sum(map(len, everything.values()))
    assert found["blocks"] == {"committed": 14, "missing": 1, "broken": 0}
    assert found["problems"] == []
    assert found["orphans"]["objects"] == 4
    assert found["seconds"] > 0
    # Those of committed blocks, and tables of inputs.
    assert "verify: 47/47 objects" in told
    assert run("verify", store, "--quiet")[2] == ""


def test_damage_is_named_with_its_remedy_and_ends_with_code_10(run: Run, store: Path) -> None:
    flip(open_storage(str(store)), CHUNK)
    assert run("verify", store)[0] == 0
    code, out, told = run("verify", store, "--full", "--quiet")
    assert code == 10
    assert out.splitlines()[0] == (
        f"{CHUNK}: wrong bytes: its bytes are not those that were committed: their crc32c is another. Run `gradstore "
        f"repair {store}`, then `gradstore featurize`: it makes this part anew."
    )
    assert told == f"error: {store}: problems: 1. What to do is said with each.\n"
    code, found, _ = run("verify", store, "--full", "--json")
    assert code == 10
    assert [(problem["kind"], problem["path"]) for problem in found["problems"]] == [("wrong bytes", CHUNK)]
    assert found["blocks"] == {"committed": 13, "missing": 1, "broken": 1}


def test_repair_takes_back_what_is_broken_and_says_what_computes_it_anew(run: Run, store: Path) -> None:
    storage = open_storage(str(store))
    flip(storage, CHUNK)
    storage.delete("contributions/block/eval/values/c/zarr.json")
    before = files(store)
    code, found, _ = run("repair", store, "--full", "--dry-run", "--json")
    assert (code, files(store)) == (10, before)
    assert found["commands"] == ["gradstore featurize"]

    code, out, _ = run("repair", store, "--full", "--quiet")

    assert code == 0
    assert out.splitlines() == [
        f"features/train/m0: block 1 taken back ({CHUNK}: wrong bytes)",
        "contributions/block/eval/values/c/zarr.json: written again",
        "blocks to be computed anew: 1, by `gradstore featurize`",
    ]
    assert run("verify", store, "--full")[0] == 0
    assert run("repair", store, "--full")[1] == "nothing to repair\n"
    assert FeatureStore.open(storage).open_set("train").missing_blocks() == [1]


def test_the_run_after_a_repair_computes_the_broken_block_alone_and_the_same_bytes(
    run: Run, tiny_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    path = make_run(tmp_path, str(tmp_path / "made"), {"features": {"block_rows": 16}})
    spec, storage = read_spec(path), open_storage(str(tmp_path / "made"))
    engine = cast(Engine, InThisProcess())
    featurize(spec, engine, Progress(quiet=True))
    before, records = contents(storage), FeatureStore.open(storage).open_set("train").log.committed()
    assert run("verify", storage.url, "--full", "--quiet")[0] == 0
    chunk = next(
        object_path for object_path in before if object_path.endswith("/c.1.0") and "/train/m0/" in object_path
    )
    flip(storage, chunk)
    assert run("repair", storage.url, "--full", "--quiet")[0] == 0

    featurize(spec, engine, Progress(quiet=True))

    assert contents(storage) == before
    again = FeatureStore.open(storage).open_set("train").log.committed()
    assert [block for block in records if again[block] != records[block]] == [1]
    assert len(records) == 3
    assert run("verify", storage.url, "--full", "--quiet")[0] == 0


def test_repair_leaves_documents_and_inputs_to_others_and_says_so(run: Run, store: Path) -> None:
    (store / "features/train/inputs/000001.1.parquet").unlink()
    code, out, _ = run("repair", store, "--quiet")
    assert code == 10
    assert out == (
        "features/train/inputs/000001.1.parquet: missing inputs: is missing. Run `gradstore featurize` again: it "
        "restores it.\n"
    )


def test_gc_removes_what_is_older_than_the_grace_time(run: Run, store: Path) -> None:
    temporary = store / "features" / "train" / f"{TEMPORARY}0123"
    temporary.write_bytes(b"half of a chunk")
    (store / "report.html").write_text("a page")
    before = files(store)
    orphans = {
        path for path in before if re.match(r"features/learn/(m0/.*/c.1.0|(examples|statistics)/m0/000001)", path)
    }
    assert len(orphans) == 4
    # A checkout gives every file the time of now.
    code, out, _ = run("gc", store)
    assert code == 0
    assert files(store) == before
    assert "4 (6,594 bytes) younger than 86,400 s: kept" in out
    two_days_ago = time.time() - 2 * 86_400
    for path in before:
        os.utime(store / path, (two_days_ago, two_days_ago))
    assert run("gc", store, "--grace", "3d", "--json")[1]["orphans"] == {"objects": 0, "bytes": 0}
    code, tried, _ = run("gc", store, "--dry-run", "--json")
    assert files(store) == before
    code, found, _ = run("gc", store, "--json")
    assert code == 0
    assert found["orphans"] == tried["orphans"] == {"objects": 4, "bytes": 6594}
    assert found["temporary"] == tried["temporary"] == {"objects": 1, "bytes": 15}
    assert found["unknown"]["objects"] == 1
    assert found["fenced"] == [{"name": "features/learn/m0", "block": 1}]
    after = files(store)
    assert before.keys() - after.keys() == orphans | {str(temporary.relative_to(store))}
    assert {path: after[path] for path in before.keys() & after.keys()} == {
        path: before[path] for path in before.keys() & after.keys()
    }
    assert run("gc", store, "--grace", "0")[1] == "1 (6 bytes) not gradstore's: kept\n"
    assert run("verify", store, "--full")[0] == 0


def test_a_grace_time_that_is_none_is_refused(run: Run, store: Path) -> None:
    code, _, told = run("gc", store, "--grace", "soon")
    assert code == 2
    assert "--grace: found 'soon'; accepted: seconds, or a time such as 30m, 24h or 7d." in told


def test_stat_counts_every_object_once(run: Run, store: Path) -> None:
    code, found, _ = run("stat", store, "--json")
    assert code == 0
    everything = files(store)
    assert (found["objects"], found["bytes"]) == (len(everything), sum(map(len, everything.values())))
    parts = [*found["feature_sets"], *found["artifacts"]]
    outside = [path for path in everything if path.count("/") < 2 or path == "kernels/block/zarr.json"]
    outside += ["contributions/block/zarr.json", "self-influence/block/zarr.json"]
    assert sum(part["objects"] for part in parts) == len(everything) - len(set(outside))
    train = next(item for item in found["feature_sets"] if item["name"] == "train")
    inside = {path: data for path, data in everything.items() if path.startswith("features/train/")}
    assert (train["objects"], train["bytes"]) == (len(inside), sum(map(len, inside.values())))
    assert train["rows"] == {"examples": 6, "erased": 1}
    assert (train["groups"], train["dtype"], train["health"]) == (5, "float16", "complete")
    (member,) = train["members"]
    assert member["rows"] == {"computed": 6, "valid": 4, "invalid": 1, "erased": 1}
    assert member["blocks"] == {"total": 2, "committed": 2, "missing": 0, "taken_back": 0}
    assert member["kinds"]["features"]["objects"] == 10
    assert member["kinds"]["examples"]["objects"] == 2
    assert found["health"] == "incomplete"
    learn = next(item for item in found["feature_sets"] if item["name"] == "learn")
    assert (learn["health"], learn["members"][0]["blocks"]["taken_back"]) == ("incomplete", 1)


def test_stat_says_which_part_is_damaged(run: Run, store: Path) -> None:
    (store / "kernels/block/m0/eigenvalues/head%2F%CE%BC/c.0").unlink()
    code, found, _ = run("stat", store, "--json")
    assert code == 0
    assert {item["path"]: item["health"] for item in found["artifacts"]} == {
        "contributions/block/eval": "complete",
        "kernels/block/m0": "damaged",
        "self-influence/block/m0": "complete",
    }
    assert found["health"] == "damaged"
    _, table, _ = run("stat", store)
    assert "kernels/block/m0" in table
    assert "damaged" in table


@pytest.mark.parametrize("command", ["verify", "repair", "gc", "stat"])
def test_where_there_is_no_store_the_installed_command_says_so(tmp_path: Path, command: str) -> None:
    done = gradstore(command, tmp_path)
    assert done.returncode == 6
    assert done.stderr.startswith(f"error: {tmp_path}: no store is there")
    assert done.stdout == ""


def test_a_store_on_s3_is_verified_repaired_and_tidied(
    run: Run, seaweed: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    # Copies that were read before tell nothing about the objects.
    monkeypatch.setenv("GRADSTORE_CACHE", str(tmp_path / "cache"))
    url = seaweed.url("health/deep")
    made = stores.create(url, stores.set_info(dtype="float16"))
    write_missing(made)
    before = made.read_block(1)
    assert run("verify", url, "--full", "--quiet")[0] == 0
    path = "features/train/m0/layers.0.mlp/c.1.0"
    data = bytearray(made.storage.read(path))
    data[3] ^= 8
    open_storage(url, copies=False).replace(path, (bytes(data),))
    code, found, _ = run("verify", url, "--full", "--json")
    assert code == 10
    assert [(problem["kind"], problem["path"]) for problem in found["problems"]] == [("wrong bytes", path)]
    assert run("repair", url, "--full", "--quiet")[0] == 0
    with pytest.raises(Killed):
        stores.write(FeatureStore.open(KillingStorage(made.storage, changes=2)).open_set("train"), 1)
    code, found, _ = run("gc", url, "--grace", "0", "--json")
    assert code == 0
    assert found["orphans"]["objects"] == 5
    again = FeatureStore.open(url).open_set("train")
    assert write_missing(again) == {"m0": [1]}
    assert run("verify", url, "--full", "--quiet")[0] == 0
    assert {name: values.tobytes() for name, values in again.read_block(1).items()} == {
        name: values.tobytes() for name, values in before.items()
    }
    assert run("stat", url, "--json")[1]["health"] == "complete"
