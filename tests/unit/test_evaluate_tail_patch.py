"""evaluate tail-patch: values against a copy of the model that is stepped, what is kept after a kill, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gradstore.cluster import Task
from gradstore.errors import SpecError
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec, read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.evaluate import evaluate_tail_patch
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.learn import learn
from gradstore.stages.progress import Progress
from gradstore.stages.reading import examples_at
from gradstore.stages.score import score
from gradstore.store.artifacts import EvaluationArtifact, ScoresArtifact
from gradstore.store.features import FeatureStore
from tests.runs import InThisProcess, make_run

QUIET = Progress(quiet=True)
ENGINE: Any = InThisProcess()
K, RATE = 3, 1e-3


def save_optimizer(folder: Path) -> None:
    """Train the run's model a little, and save model and optimizer."""
    spec = read_spec(make_run(folder, str(folder / "store")))
    adapter = make_adapter(spec)
    model: Any = adapter.load("cpu").train()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapter.outputs(model, adapter.examples().splits["train"][:8]).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.save_pretrained(folder / "model")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("patched")
    save_optimizer(made)
    spec = spec_of(made)
    for stage in (featurize, build_kernel, contribute, learn, score):
        stage(spec, ENGINE, QUIET)
    return made


def spec_of(folder: Path, **step: Any) -> RunSpec:
    tables: dict[str, dict[str, Any]] = {
        "model": {"optimizer": str(folder / "optimizer.pt"), "precision": "float32"},
        "score.tail_patch": {"queries": 0},
        "evaluate.tail_patch": {"k": K, "optimizer": "saved", "learning_rate": RATE, "queries": 4, **step},
    }
    return read_spec(make_run(folder, str(folder / "store"), tables))


class DiesAfter:
    """An engine in this process that dies after some tasks."""

    def __init__(self, tasks: int) -> None:
        self._tasks = tasks

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        for number, task in enumerate(tasks):
            if number == self._tasks:
                raise KeyboardInterrupt
            yield task, task.function(*task.arguments)


def expected(spec: RunSpec, query: int, rows: Sequence[int], folder: Path | None) -> float:
    """On a copy of the model, stepped by torch's own optimizer with all its parameters at once."""
    store, adapter = FeatureStore.open(spec.run.store), make_adapter(spec)
    model: Any = copy.deepcopy(adapter.load("cpu"))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if folder is None:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    else:
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt"))
        optimizer.param_groups[0]["lr"] = RATE
    examples = examples_at(store.open_set("eval"), [query])
    before = -adapter.outputs(model, examples).item()
    adapter.outputs(model, examples_at(store.open_set("train"), rows)).mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return 100 * (-adapter.outputs(model, examples).item() - before) / abs(before)


@pytest.mark.parametrize("optimizer", ["saved", "sgd"])
def test_values_are_those_of_a_copy_of_the_model_and_survive_a_kill(folder: Path, optimizer: str) -> None:
    spec = spec_of(folder, optimizer=optimizer)
    store = FeatureStore.open(spec.run.store)
    if optimizer == "sgd":
        for info in store.storage.list_objects("evaluations"):
            store.storage.delete(info.path)
    ending: Any = DiesAfter(3)
    with pytest.raises(KeyboardInterrupt):
        evaluate_tail_patch(spec, ending, QUIET)

    class Counts(InThisProcess):
        ran: list[str]

        def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
            self.ran = [task.name for task in tasks]
            return super().run(tasks)

    engine: Any = Counts()
    told = evaluate_tail_patch(spec, engine, QUIET)

    assert engine.ran == ["tail-patch-000003"]
    assert [row["method"] for row in told["methods"]] == [
        "unweighted",
        "learned",
        "bm25",
        "embedding",
        "cosine",
        "random",
    ]
    for method in ("block.unweighted", "block.learned", "baseline.bm25"):
        values = EvaluationArtifact.open(store.storage, "tail_patch", method).read().to_pydict()
        ranked = ScoresArtifact.open(store.storage, method).read().to_pylist()
        assert values["query"] == [0, 1, 2, 3]
        for query, percent in zip(values["query"], values["percent"], strict=True):
            rows = [row["example"] for row in ranked if (row["query"], row["side"]) == (query, "proponent")][:K]
            wanted = expected(spec, query, rows, folder if optimizer == "saved" else None)
            assert percent == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    unweighted, learned, *_ = told["methods"]
    difference = learned["measures"]["percent"]["difference"]["mean"]
    means = [row["measures"]["percent"]["mean"] for row in (learned, unweighted)]
    assert difference == pytest.approx(means[0] - means[1])
    assert evaluate_tail_patch(spec, ending, QUIET) == told


def test_what_cannot_be_measured_is_refused(folder: Path, tmp_path: Path) -> None:
    spec = spec_of(folder)
    bare = spec.model_copy(update={"evaluate": spec.evaluate.model_copy(update={"tail_patch": None})})
    with pytest.raises(
        SpecError, match=r"evaluate\.tail_patch: is missing; accepted: a table \[evaluate\.tail_patch\]"
    ):
        evaluate_tail_patch(bare, ENGINE, QUIET)
    with pytest.raises(
        SpecError, match=r'evaluate\.tail_patch\.optimizer: found "saved", and model\.optimizer names no'
    ):
        read_spec(make_run(tmp_path, str(tmp_path / "store"), {"evaluate.tail_patch": {"optimizer": "saved"}}))
