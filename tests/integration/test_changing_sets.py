"""A set that grows and forgets, from the run's file to its scores: what is stale is told, and made anew."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.cli import main
from gradstore.cluster import Engine
from gradstore.errors import ContractError, DataError, SpecError
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.delete import Query, delete
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.prune import prune
from gradstore.stages.report import report
from gradstore.stages.run import STAGES
from gradstore.stages.score import score
from gradstore.stages.status import status
from gradstore.store.artifacts import ContributionArtifact, ScoresArtifact
from gradstore.store.features import FeatureSet, FeatureStore, is_finished
from tests import oracle
from tests.runs import InThisProcess, make_run
from tests.storages import Killed

pytestmark = pytest.mark.slow

ROWS, MORE = 30, 7
QUIET = Progress(quiet=True)
ENGINE: Engine = InThisProcess()  # type: ignore[assignment]


def spec_of(tiny_run: Path, folder: Path, *, train: int, others: int = 60, name: str = "store") -> RunSpec:
    """A run of the first rows of the texts, and of queries from a row on."""
    if not (folder / "model").exists():
        (folder / "model").symlink_to(tiny_run / "model")
    changes: dict[str, dict[str, Any]] = {
        "data": {"shuffle": False, "id": "id"},
        "data.train": {"start": 0, "rows": train},
        "data.learn": {"start": others, "rows": 8},
        "data.eval": {"start": others + 8, "rows": 8},
    }
    return read_spec(make_run(folder, str(folder / name), changes))


def run_all(spec: RunSpec, *, append: bool = False) -> None:
    for stage in (partial(featurize, append=append), *STAGES[1:]):
        stage(spec, ENGINE, QUIET)


def opened(spec: RunSpec) -> FeatureSet:
    return FeatureStore.open(spec.run.store).open_set("train")


@pytest.fixture(scope="module")
def first(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the first rows, to its scores."""
    folder = tmp_path_factory.mktemp("first")
    run_all(spec_of(tiny_run, folder, train=ROWS))
    return folder


@pytest.fixture
def finished(first: Path, tiny_run: Path, tmp_path: Path) -> RunSpec:
    """A copy of it."""
    shutil.copytree(first / "store", tmp_path / "store")
    return spec_of(tiny_run, tmp_path, train=ROWS)


def test_a_grown_set_is_appended_when_that_is_asked_for_and_what_is_made_from_it_is_stale(
    finished: RunSpec, tiny_run: Path, tmp_path: Path
) -> None:
    before = opened(finished)
    kept = {block: before.read_block(block) for block in range(before.info.num_blocks)}
    grown = spec_of(tiny_run, tmp_path, train=ROWS + MORE)
    said = f"has {ROWS} examples, data.train has {MORE} more after them. Add --append"
    with pytest.raises(ContractError, match=said):
        featurize(grown, ENGINE, QUIET)

    featurize(grown, ENGINE, QUIET, append=True)
    now = opened(grown)
    assert now.missing_blocks() == []
    assert now.info.num_examples == ROWS + MORE
    new = list(range(before.info.num_blocks, now.info.num_blocks))
    for block, values in kept.items():
        for name, rows in now.read_block(block).items():
            np.testing.assert_array_equal(rows, values[name])
    found = status(grown.run.store)
    assert [
        row["stale"] for kind in ("kernels", "contributions", "moments", "weights", "scores") for row in found[kind]
    ] == [{"train/m0": new}] * 7
    told = f"blocks {', '.join(map(str, new))} of train/m0 were appended.*gradstore prune {grown.run.store} --stale"
    with pytest.raises(ContractError, match=told):
        build_kernel(grown, ENGINE, QUIET)

    removed = prune(grown.run.store, [], stale=True, dry_run=False)["removed"]
    assert len(removed) == 1 + 2 + 2 + 1 + 1 + 4
    run_all(grown)
    check_scores(grown)
    # Asked again for the grown data, with or without --append, nothing is left to do.
    featurize(grown, ENGINE, QUIET)
    featurize(grown, ENGINE, QUIET, append=True)
    assert opened(grown).version.number == 1


def test_a_set_that_grew_is_what_a_set_made_at_once_is(tiny_run: Path, tmp_path: Path) -> None:
    small = spec_of(tiny_run, tmp_path, train=ROWS, name="grown")
    featurize(small, ENGINE, QUIET)
    grown = spec_of(tiny_run, tmp_path, train=ROWS + MORE, name="grown")
    featurize(grown, ENGINE, QUIET, append=True)
    at_once = spec_of(tiny_run, tmp_path, train=ROWS + MORE, name="at-once")
    featurize(at_once, ENGINE, QUIET)
    ours, theirs = opened(grown), opened(at_once)
    assert ours.info.data_hash == theirs.info.data_hash
    valid = np.flatnonzero(ours.valid_rows())
    for array in ours.info.arrays:
        got, want = (
            np.concatenate([each.read_block(block, [array.name])[array.name] for block in range(each.info.num_blocks)])
            for each in (ours, theirs)
        )
        # Other batches, so other sums in the last digits; float16 rounds to 2^-11.
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-3 * float(np.abs(want).max()))
    ids = ours.read_column("example_id")
    assert [ids[row] for row in valid] == theirs.read_column("example_id")


def test_a_deleted_example_takes_no_part_in_anything_made_anew(finished: RunSpec) -> None:
    report(finished.run.store, None, None)
    page = Path(finished.run.store) / "report.html"
    assert page.exists()
    ids = opened(finished).read_column("example_id")
    gone = [ids[3], ids[17]]
    before = opened(finished).read_block(0)

    tried = delete(finished.run.store, Query.parse(gone, []), [], QUIET, dry_run=True)
    assert tried["erased"] == {"eval": [], "learn": [], "train": [3, 17]}
    assert opened(finished).info.erased == ()
    done = delete(finished.run.store, Query.parse(gone, []), [], QUIET, dry_run=False)
    assert done["erased"]["train"] == [3, 17]
    assert not page.exists()
    blocks = sorted({3 // opened(finished).info.block_rows, 17 // opened(finished).info.block_rows})
    assert done["rewritten"]["train"] == blocks
    assert all(places == {"train/m0": blocks} for places in done["stale"].values())
    assert "contributions/block/eval" in done["stale"]
    # Of the learn and eval sets nothing was asked, and baselines rank the train set too.
    assert len(done["stale"]) == 1 + 2 + 2 + 1 + 1 + 4
    after = opened(finished).read_block(0)
    for name, rows in after.items():
        assert np.isnan(rows[3]).all()
        np.testing.assert_array_equal(np.delete(rows, 3, 0), np.delete(before[name], 3, 0))

    for stage in (contribute, learn, score):
        with pytest.raises(ContractError, match=r"is stale: blocks .* of train/m0 were appended, erased or repaired"):
            stage(finished, ENGINE, QUIET)
    prune(finished.run.store, [], stale=True, dry_run=False)
    run_all(finished)
    check_scores(finished)
    table = ScoresArtifact.open(FeatureStore.open(finished.run.store).storage, "block.unweighted").read()
    assert not {3, 17} & set(table["example"].to_pylist())
    statistics = opened(finished).read_statistics()
    valid = np.flatnonzero(opened(finished).valid_rows())
    first = statistics["group"][0].as_py()
    mask = np.array(statistics["group"].to_pylist()) == first
    assert sum(np.array(statistics["rows"].to_pylist())[mask]) == len(valid) == ROWS - 2


def test_the_data_may_lose_the_deleted_example_too(finished: RunSpec, tiny_run: Path, tmp_path: Path) -> None:
    ids = opened(finished).read_column("example_id")
    delete(finished.run.store, Query.parse([ids[3]], []), ["train"], QUIET, dry_run=False)
    file = tmp_path / "texts.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if json.loads(line)["id"] != ids[3]), encoding="utf-8")
    without = spec_of(tiny_run, tmp_path, train=ROWS - 1, others=59)
    featurize(without, ENGINE, QUIET)
    assert opened(without).info.num_examples == ROWS
    assert opened(without).missing_blocks() == []
    # What it grows by is appended after all of them.
    grown = spec_of(tiny_run, tmp_path, train=ROWS - 1 + MORE, others=59)
    featurize(grown, ENGINE, QUIET, append=True)
    assert opened(grown).info.num_examples == ROWS + MORE
    featurize(grown, ENGINE, QUIET)
    assert opened(grown).read_column("example_id")[3] is None


def test_a_block_that_is_computed_anew_leaves_the_deleted_example_out(finished: RunSpec) -> None:
    ids = opened(finished).read_column("example_id")
    delete(finished.run.store, Query.parse([ids[3]], []), [], QUIET, dry_run=False)
    before = opened(finished).read_block(0)
    table = opened(finished).read_examples(block=0)
    opened(finished).log.take_back(0, "repair")
    featurize(finished, ENGINE, QUIET)
    assert opened(finished).missing_blocks() == []
    for name, rows in opened(finished).read_block(0).items():
        assert np.isnan(rows[3]).all()
        np.testing.assert_allclose(rows, before[name], rtol=2e-3, atol=1e-3 * float(np.nanmax(np.abs(rows))))
    again = opened(finished).read_examples(block=0)
    assert again.schema == table.schema
    assert again["example_id"] == table["example_id"]
    assert again["valid"] == table["valid"]


def test_examples_are_found_by_what_their_columns_say(finished: RunSpec) -> None:
    labels = opened(finished).read_column("label")
    query = Query.parse([], ["label=spo*", "example_id=text-?"])
    found = delete(finished.run.store, query, ["train"], QUIET, dry_run=True)
    assert found["erased"] == {"train": [row for row, label in enumerate(labels[:10]) if label == "sport"]}
    with pytest.raises(SpecError, match=r"--where: found 'colour=red'; accepted: COLUMN=PATTERN with example_id"):
        Query.parse([], ["colour=red"])
    with pytest.raises(SpecError, match="found neither ids nor --where"):
        Query.parse([], [])


def test_an_id_that_is_not_there_erases_nothing(finished: RunSpec) -> None:
    ids = opened(finished).read_column("example_id")
    with pytest.raises(DataError, match=r"is called nobody, or it is erased already\. Nothing was erased"):
        delete(finished.run.store, Query.parse([ids[3], "nobody"], []), [], QUIET, dry_run=False)
    assert opened(finished).info.erased == ()


def test_a_deletion_that_died_is_finished_by_the_same_command(
    finished: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = opened(finished).read_column("example_id")[3]
    query = Query.parse([name], [])

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(FeatureSet, "read_block", die)
        with pytest.raises(Killed):
            delete(finished.run.store, query, [], QUIET, dry_run=False)
    assert opened(finished).info.erased == (3,)
    assert not is_finished(opened(finished))
    done = delete(finished.run.store, query, [], QUIET, dry_run=False)
    assert done["not_found"] == [name]
    assert done["rewritten"]["train"] == [0]
    assert is_finished(opened(finished))


def test_the_command_line_deletes_only_with_yes_and_prunes_what_is_named(
    finished: RunSpec, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["gradstore", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    name = opened(finished).read_column("example_id")[3]
    assert "features/train: 1 examples would be erased: add --yes" in command("delete", finished.run.store, name)
    said = command("delete", finished.run.store, name, "--yes")
    assert "features/train: 1 examples erased" in said
    assert f"kernels/block/m0: stale: blocks 0 of train/m0. `gradstore prune {finished.run.store} --stale`" in said
    assert json.loads(command("status", finished.run.store, "--json"))["kernels"][0]["stale"] == {"train/m0": [0]}
    assert "scores/block.learned: would be removed" in command(
        "prune", finished.run.store, "scores/block.learned", "--dry-run"
    )
    removed = json.loads(command("prune", finished.run.store, "scores", "--json"))["removed"]
    assert [row["path"] for row in removed] == [
        "scores/baseline.bm25",
        "scores/baseline.random",
        "scores/block.learned",
        "scores/block.unweighted",
    ]
    assert not (Path(finished.run.store) / "scores" / "block.learned" / "artifact.json").exists()
    assert "nothing to remove" not in command("prune", finished.run.store, "--stale")


def check_scores(spec: RunSpec) -> None:
    """The unweighted scores of a store are those of its valid features, by plain float64 arithmetic."""
    store = FeatureStore.open(spec.run.store)
    train = store.open_set("train")
    valid = np.flatnonzero(train.valid_rows())
    artifact = ContributionArtifact.open(store.storage, "block", "eval")
    found = np.concatenate(list(artifact.read_blocks(0, artifact.shape.queries)), axis=1)
    rows = [row for block in range(train.info.num_blocks) for row in range(*train.info.block_range(block))]
    for place, array in enumerate(train.info.arrays):
        features = {}
        for name in ("train", "eval"):
            each = store.open_set(name)
            blocks = [each.read_block(block, [array.name])[array.name] for block in range(each.info.num_blocks)]
            features[name] = np.concatenate(blocks).astype(np.float64)
        keep = [rows.index(int(row)) for row in valid]
        train_ND = features["train"][keep]
        queries_QD = oracle.precondition(train_ND, features["eval"], kind="block", damping=0.1, mode="relative")
        want_QN = queries_QD @ train_ND.T
        got_QN = found[:, keep, place]
        np.testing.assert_allclose(got_QN, want_QN, rtol=1e-3, atol=1e-4 * float(np.abs(want_QN).max()))
