"""The training signal of an encoder, and an encoder that is trained on it: from a tiny model's run to scores."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.stats import spearmanr

from gradstore.cli import main
from gradstore.cluster import Task
from gradstore.errors import ContractError, DataError, NotReadyError, SpecError
from gradstore.numerics.metrics import subset_mask
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.embeddings import similarities
from gradstore.stages.evaluate import evaluate_lds
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.reading import examples_at
from gradstore.stages.retraining import make_signal, read_signal
from gradstore.stages.train import train_model
from gradstore.store.artifacts import ContributionArtifact, RetrainedArtifact, list_artifacts
from gradstore.store.features import FeatureStore
from tests.encoders import make_tiny_encoder
from tests.models import make_tiny_model
from tests.oracle.pooling import attention_pooled
from tests.runs import InThisProcess, make_run

QUIET = Progress(quiet=True)
ENGINE: Any = InThisProcess()
TRAIN, QUERIES, SUBSETS, SIZE, SEED = 48, 12, 10, 6, 3


def attributed(folder: Path, **signal: Any) -> RunSpec:
    """The run of a tiny model that is fine-tuned on its train examples."""
    tables: dict[str, dict[str, Any]] = {
        "training": {
            "trainer": "fine_tune",
            "base": str(folder / "model"),
            "options": {"epochs": 2, "batch": 4, "learning_rate": 0.01},
        },
        "model": {"source": str(folder / "model")},
        "signal": {"subsets": SUBSETS, "examples": SIZE, **signal},
        "evaluate.lds": {"subsets": 4, "groups": False},
        "score.tail_patch": {"queries": 0},
    }
    return read_spec(make_run(folder, str(folder / "store"), tables))


def represented(folder: Path, tables: Mapping[str, dict[str, Any]] | None = None) -> RunSpec:
    """The run of an encoder on the same examples."""
    made = folder / "represented"
    made.mkdir(exist_ok=True)
    for name in ("model", "texts.jsonl"):
        if not (made / name).exists():
            (made / name).symlink_to(folder / name)
    attributed_as = {"source": str(folder / "model")}
    changes: dict[str, dict[str, Any]] = {
        "model": {"adapter": "text_encoder", "source": str(folder / "trained")},
        "model.options": {"attributed": attributed_as},
        "data": {"source": str(folder / "texts.jsonl")},
        "features": {"projection": {"kind": "identity"}, "dtype": "float32"},
        "training": {
            "trainer": "airrep",
            "base": str(folder / "encoder"),
            "options": {"store": str(folder / "store"), "epochs": 3, "queries": 4, "subsets": 6},
        },
        "evaluate.lds": {"subsets": 4, "groups": False, "store": str(folder / "store"), "pool": "attention"},
        "score.tail_patch": {"queries": 0},
    }
    for table, values in (tables or {}).items():
        changes.setdefault(table, {}).update(values)
    path = make_run(made, str(made / "store"), changes)
    # The kernel of representations has no damping.
    text = path.read_text(encoding="utf-8").replace('kind = "block"\ndamping = 0.1', 'kind = "identity"')
    path.write_text(text, encoding="utf-8")
    return read_spec(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("signal")
    make_tiny_encoder(made / "encoder")
    featurize(attributed(made), ENGINE, QUIET)
    make_signal(attributed(made), ENGINE, QUIET)
    return made


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """The same, which a test may change."""
    shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    return tmp_path / "copy"


class Counts(InThisProcess):
    """An engine that remembers what it ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        self.ran += [task.name for task in tasks]
        return super().run(tasks)


def test_every_model_begins_at_the_same_start_and_is_trained_on_its_subset_alone(folder: Path) -> None:
    from gradstore.adapters.training import resolve_trainer
    from gradstore.numerics.generator import derive_key

    spec, store = attributed(folder), FeatureStore.open(str(folder / "store"))
    signal = read_signal(store, "signal")

    assert signal.subsets.shape == (SUBSETS, SIZE)
    assert signal.outcomes.shape == (SUBSETS, QUERIES)
    adapter = make_adapter(spec)
    seed = derive_key(SEED, "signal", "training 0") % 2**63
    for subset in (0, 7):
        trainer = resolve_trainer("fine_tune", spec.training.options)
        examples = examples_at(store.open_set("train"), signal.subsets[subset].tolist())
        model = trainer(adapter, examples, seed=seed, device="cpu")
        queries = examples_at(store.open_set("learn"), range(QUERIES))
        with torch.no_grad():
            expected = -adapter.outputs(model, queries).double().numpy()
        assert signal.outcomes[subset] == pytest.approx(expected, rel=1e-5)


def test_half_of_the_subsets_are_neighbourhoods_of_learn_queries(folder: Path) -> None:
    spec, store = attributed(folder), FeatureStore.open(str(folder / "store"))
    signal = read_signal(store, "signal")
    similar = similarities(spec, store, ENGINE, QUIET, of="learn")
    nearest = [set(np.argsort(-row)[: 2 * SIZE].tolist()) for row in similar]

    near = [any(set(subset.tolist()) <= of for of in nearest) for subset in signal.subsets]

    assert [place for place, is_near in enumerate(near) if is_near] == [1, 3, 5, 7, 9]


def test_more_subsets_leave_those_that_are_there_and_a_stopped_signal_goes_on(copied: Path) -> None:
    store = FeatureStore.open(str(copied / "store"))
    before = read_signal(store, "signal")
    shutil.rmtree(copied / "store/retrained/signal/000004.0/commits")
    with pytest.raises(NotReadyError, match="9 of 10 models are trained"):
        read_signal(FeatureStore.open(str(copied / "store")), "signal")
    engine: Any = Counts()

    told = make_signal(attributed(copied, subsets=SUBSETS + 2), engine, QUIET)

    assert len([name for name in engine.ran if name.startswith("retrain")]) == 3
    assert (told["subsets"], told["queries"]) == (SUBSETS + 2, QUERIES)
    after = read_signal(FeatureStore.open(str(copied / "store")), "signal")
    assert np.array_equal(after.subsets[:SUBSETS], before.subsets)
    assert np.array_equal(after.outcomes[:SUBSETS], before.outcomes)


def test_a_signal_of_other_settings_is_refused(folder: Path) -> None:
    with pytest.raises(ContractError, match="examples: store has 6, the run asks for 5"):
        make_signal(attributed(folder, examples=5), ENGINE, QUIET)


def test_models_that_begin_elsewhere_are_other_models_and_a_base_that_was_moved_is_the_same(
    copied: Path, tmp_path: Path
) -> None:
    spec = attributed(copied)

    def begins(base: Path) -> RunSpec:
        return spec.model_copy(update={"training": spec.training.model_copy(update={"base": str(base)})})

    engine: Any = Counts()
    make_signal(begins(shutil.copytree(copied / "model", tmp_path / "moved")), engine, QUIET)
    assert engine.ran == []
    with pytest.raises(ContractError, match="start: store has"):
        make_signal(begins(make_tiny_model(tmp_path / "other", "llama", seed=1)), ENGINE, QUIET)


@pytest.mark.parametrize(
    ("signal", "message"),
    [
        ({"examples": 12, "neighbours": 12}, r"signal\.examples: found 12, with 12 neighbours to draw them from"),
        ({"examples": TRAIN, "local": 0.0}, rf"signal\.examples: found {TRAIN}, with {TRAIN} train examples"),
    ],
)
def test_subsets_that_cannot_be_drawn_are_refused(folder: Path, signal: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make_signal(attributed(folder, name="other", **signal), ENGINE, QUIET)


def test_a_run_of_representations_has_no_signal_of_its_own(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"signal: a run of representations has no model"):
        make_signal(represented(folder), ENGINE, QUIET)


def test_models_of_another_kind_are_no_signal(copied: Path) -> None:
    store = FeatureStore.open(str(copied / "store"))
    with pytest.raises(NotReadyError, match="there are no such models"):
        read_signal(store, "none")
    RetrainedArtifact.create(store.storage, "half", "000000.0", settings={"subset": 0, "seed": 0})
    with pytest.raises(NotReadyError, match="0 of 1 models are trained"):
        read_signal(store, "half")


def lds_models(folder: Path) -> None:
    """The models that scores are measured by, of the attributed model's run."""
    spec = attributed(folder)
    for stage in (build_kernel, contribute, learn):
        stage(spec, ENGINE, QUIET)
    evaluate_lds(spec, ENGINE, QUIET)


def test_an_encoder_is_trained_once_and_its_pooled_scores_are_measured_by_the_attributed_models(copied: Path) -> None:
    spec = represented(copied)
    (told,) = train_model(spec, QUIET)
    assert (told["kept"], told["queries"], told["subsets"]) == (False, QUERIES, SUBSETS)
    assert told["gain"]["mean"] == pytest.approx(told["accuracy"] - told["accuracy_before"])
    assert told["gain"]["low"] <= told["gain"]["mean"] <= told["gain"]["high"]
    assert {path.name for path in (copied / "trained").iterdir()} >= {"modules.json", "2_Dense", "tokenizer.json"}
    assert [path.name for path in copied.glob("trained.*")] == ["trained.training.json"]
    (again,) = train_model(spec, QUIET)
    assert again == {**told, "kept": True}

    for stage in (featurize, build_kernel, contribute, learn):
        stage(spec, ENGINE, QUIET)
    with pytest.raises(NotReadyError, match=r"is not trained\. Run `gradstore evaluate lds` of the attributed"):
        evaluate_lds(spec, ENGINE, QUIET)
    lds_models(copied)
    found = evaluate_lds(spec, ENGINE, QUIET)

    store, theirs = (FeatureStore.open(str(copied / place)) for place in ("represented/store", "store"))
    artifact = ContributionArtifact.open(store.storage, "identity", "eval")
    scores = np.concatenate([*artifact.read_blocks(0, QUERIES)], 1)[:, :, 0].astype(np.float64)
    masks = np.stack([subset_mask(subset, TRAIN, share=0.5, seed=SEED) for subset in range(4)])
    pooled = attention_pooled(scores, [np.flatnonzero(mask).tolist() for mask in masks])
    tables = [
        RetrainedArtifact.open(theirs.storage, "half", f"{subset:06d}.0").read().to_pylist() for subset in range(4)
    ]
    actual = np.array([[-row["output"] for row in table if row["set"] == "eval"] for table in tables])
    expected = [spearmanr(pooled[query], actual[:, query]).statistic for query in range(QUERIES)]
    (unweighted,) = (row for row in found["methods"] if row["method"] == "unweighted")
    assert unweighted["measures"]["lds"]["mean"] == pytest.approx(np.mean(expected))

    sharper = represented(copied, {"evaluate.lds": {"sharpness": 40.0}})
    (again,) = (row for row in evaluate_lds(sharper, ENGINE, QUIET)["methods"] if row["method"] == "unweighted")
    pooled = attention_pooled(scores, [np.flatnonzero(mask).tolist() for mask in masks], 40.0)
    expected = [spearmanr(pooled[query], actual[:, query]).statistic for query in range(QUERIES)]
    assert again["measures"]["lds"]["mean"] == pytest.approx(np.mean(expected))
    assert {"lds.half.4x1.attention", "lds.half.4x1.attention40"} == {
        artifact.name.partition("/")[0] for artifact in list_artifacts(store.storage) if artifact.kind == "evaluation"
    }


def test_a_training_whose_process_died_goes_on_from_its_checkpoint(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradstore.stages import train_encoder

    spec = represented(copied)
    (whole,) = train_model(spec, QUIET)
    weights = (copied / "trained/2_Dense/model.safetensors").read_bytes()
    shutil.rmtree(copied / "trained")
    (copied / "trained.training.json").unlink()
    write, written = train_encoder._Checkpoint.write, []

    class DiedError(BaseException):
        """As a process does that is killed: nothing is put in order."""

    def dying(self: Any, fitted: Any) -> None:
        write(self, fitted)
        written.append(len(fitted.accuracies))
        if len(written) == 1:
            raise DiedError

    monkeypatch.setattr(train_encoder._Checkpoint, "write", dying)
    with pytest.raises(DiedError):
        train_model(spec, QUIET)
    checkpoint = copied / "trained.checkpoint.safetensors"
    assert checkpoint.exists()
    assert not (copied / "trained").exists()

    (told,) = train_model(spec, QUIET)

    assert written == [2, 3, 4]
    assert {**told, "seconds": 0} == {**whole, "seconds": 0}
    assert (copied / "trained/2_Dense/model.safetensors").read_bytes() == weights
    assert not checkpoint.exists()


def test_a_checkpoint_of_other_settings_is_not_taken_up_and_a_damaged_one_is_refused(copied: Path) -> None:
    checkpoint = copied / "trained.checkpoint.safetensors"
    checkpoint.write_bytes(b"no tensors")
    with pytest.raises(DataError, match=r"trained\.checkpoint\.safetensors: is damaged"):
        train_model(represented(copied), QUIET)
    from safetensors.torch import save_file

    save_file({"change": torch.zeros(1)}, checkpoint, {"made_from": "another"})
    with safe_open(checkpoint, "pt") as opened:
        assert opened.metadata() == {"made_from": "another"}

    (told,) = train_model(represented(copied), QUIET)

    assert told["epochs"] == 3


def test_other_examples_than_those_of_the_signal_are_refused(copied: Path) -> None:
    with pytest.raises(ContractError, match=r"training\.options\.store: .*\n.*learn: .*\n.*train: "):
        train_model(represented(copied, {"data.train": {"rows": 40}}), QUIET)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"training": {"options": {"epochs": 3}}}, r"training\.options\.store: is missing"),
        ({"training": {"options": {"store": "x", "epoch": 3}}}, r"training\.options\.epoch: unknown key"),
        (
            {"model": {"adapter": "causal_lm"}, "model.options": {}},
            r"training\.trainer: found 'airrep' with model\.adapter",
        ),
        ({"model.options": {"layers": "all"}}, r"model\.options: found layers or normalize"),
    ],
)
def test_what_an_encoder_cannot_be_trained_with_is_refused(folder: Path, tables: Any, message: str) -> None:
    spec = represented(folder)
    values = spec.model_dump()
    for table, changes in tables.items():
        target = values
        *parents, last = table.split(".")
        for parent in parents:
            target = target[parent]
        target[last] = {**target[last], **changes} if changes else {}

    with pytest.raises(SpecError, match=message):
        train_model(RunSpec.model_validate(values), QUIET)


def test_commands_tell_what_was_made(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attributed(copied)
    monkeypatch.setattr(sys, "argv", ["gradstore", "signal", str(copied / "run.toml"), "--json", "-q"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["subsets"], told["examples"], told["queries"]) == (SUBSETS, SIZE, QUERIES)

    represented(copied)
    monkeypatch.setattr(sys, "argv", ["gradstore", "train", str(copied / "represented/run.toml"), "-q"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert re.search(
        r"of pairs of subsets that were held out, \d+\.\d% before: [+-]\d+\.\d points, \[.*\] with 95 % confidence",
        capsys.readouterr().out,
    )
