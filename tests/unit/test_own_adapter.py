"""An adapter of one's own: what it is given, what gradstore adds, and every failure of a user's code in one line."""

from __future__ import annotations

import textwrap
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.adapters.own.adapter import OwnAdapter, stack
from gradstore.errors import DataError, GradstoreError, SpecError
from gradstore.plan.resolve import make_adapter
from gradstore.spec import DataSection, ModelSection, parse_spec
from gradstore.store.examples import from_table, to_table

MODULE = """
    import itertools

    import numpy as np
    import torch
    from torch import nn

    class Task:
        def __init__(self, fault=None):
            self.fault = fault

        def load(self, source):
            if self.fault == "load":
                raise KeyError("weights")
            if self.fault == "module":
                return {"weight": 1}
            if self.fault == "meta":
                return nn.Linear(3, 2, device="meta")
            if self.fault == "empty model":
                return nn.ReLU()
            torch.manual_seed(0)
            tied = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 3)).double()
            tied[2].weight = tied[0].weight
            return tied

        def examples(self, source):
            if self.fault == "examples":
                raise OSError(f"no {source}")
            for row in range(9):
                inputs = {"x": np.full((2 + row % 8 % 3, 3), row % 8, np.float32), "y": row % 8}
                example = {"inputs": inputs, "label": row % 2}
                if row == 4:
                    broken = {
                        "midway": lambda: 1 / 0,
                        "not a mapping": lambda: (1, 2),
                        "no inputs": lambda: {"id": 3},
                        "unknown key": lambda: {**example, "labels": 3},
                        "empty": lambda: {"inputs": {"x": np.zeros((0, 3))}},
                        "text input": lambda: {"inputs": {"x": "hello"}},
                        "ragged": lambda: {"inputs": {"x": [[1], [1, 2]]}},
                        "dtype": lambda: {"inputs": {**inputs, "y": 0.5}},
                        "width": lambda: {"inputs": {**inputs, "x": np.zeros((2, 4), np.float32)}},
                        "names": lambda: {"inputs": {"x": inputs["x"]}},
                        "mask": lambda: {"inputs": {**inputs, "x_mask": 1}},
                        "size": lambda: {**example, "size": 0},
                        "text": lambda: {**example, "text": 3},
                        "id": lambda: {**example, "id": "source:1"},
                    }
                    if self.fault in broken:
                        yield broken[self.fault]()
                        continue
                yield example

        def output(self, model, batch):
            if self.fault == "output":
                raise ValueError("first line\\nsecond line")
            if self.fault == "mean":
                return model(batch["x"]).mean()
            if self.fault == "integers":
                return batch["y"]
            return (model(batch["x"]) * batch["x_mask"][..., None]).sum((1, 2))

    class Versioned(Task):
        version = "7"

    class Endless(Task):
        def examples(self, source):
            return ({"inputs": {"x": [[float(row)] * 3], "y": row}} for row in itertools.count())

    def fails(depth):
        raise RuntimeError("deep " + "trouble " * 100)

    def nothing():
        return None

    number = 3
"""
SPLITS: dict[str, Any] = {"train": {"rows": 4}, "learn": {"rows": 2}, "eval": {"rows": 2}}


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a module of tasks, written into a folder of Python's path."""
    folder = tmp_path_factory.mktemp("tasks")
    name = f"tasks_{uuid.uuid4().hex}"
    (folder / f"{name}.py").write_text(textwrap.dedent(MODULE), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield name


def own(function: str, *, data: dict[str, Any] | None = None, seed: int = 0, **model: Any) -> OwnAdapter:
    section = {"source": "source", **SPLITS, **(data or {})}
    return OwnAdapter(
        ModelSection(adapter=function, source="weights", **model), DataSection.model_validate(section), seed
    )


def fault(module: str, name: str) -> OwnAdapter:
    """A task with one fault, whose examples come in their own order."""
    return own(f"{module}:Task", data={"shuffle": False}, options={"arguments": {"fault": name}})


def test_a_function_in_run_toml_makes_the_adapter(module: str) -> None:
    spec = parse_spec(
        {
            "run": {"name": "own", "store": "store"},
            "model": {"adapter": f"{module}:Task", "source": "weights"},
            "data": {"source": "source", **SPLITS},
        }
    )

    assert isinstance(make_adapter(spec), OwnAdapter)


def test_every_split_takes_the_next_rows_of_its_source_without_duplicates(module: str) -> None:
    found = own(f"{module}:Task", data={"shuffle": False}).examples()

    ids = {name: [example.example_id for example in rows] for name, rows in found.splits.items()}
    assert ids == {
        "train": ["source:0", "source:1", "source:2", "source:3"],
        "learn": ["source:4", "source:5"],
        "eval": ["source:6", "source:7"],
    }
    first = found.splits["train"][0]
    assert (first.label, first.text, first.size, first.source) == ("0", "", 6, "source")
    assert found.facts.rows == {"train": 4, "learn": 2, "eval": 2}


def test_a_shuffled_order_depends_on_the_seed_and_the_ids_alone(module: str) -> None:
    def order(seed: int) -> list[str]:
        found = own(f"{module}:Task", seed=seed).examples()
        return [example.example_id for rows in found.splits.values() for example in rows]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_an_equal_example_is_dropped_and_without_deduplication_is_an_overlap(module: str) -> None:
    splits = {"train": {"rows": 5}, "learn": {"rows": 2}, "eval": {"rows": 2}, "shuffle": False}
    with pytest.raises(DataError, match=r"data\.eval\.rows: rows \[7, 9\) .* 8: 9 examples read .* 1 duplicates"):
        own(f"{module}:Task", data=splits).examples()
    with pytest.raises(DataError, match=r"source:8 of source has the inputs of source:0 of source in data\.train"):
        own(f"{module}:Task", data={**splits, "deduplicate": False}).examples()


def test_the_same_examples_from_two_sources_overlap(module: str) -> None:
    other = {"eval": {"source": "other", "rows": 2}, "shuffle": False}
    with pytest.raises(DataError, match=r"data\.eval: other:0 of other .*leave them out of one of the sources"):
        own(f"{module}:Task", data=other).examples()


def test_in_its_own_order_a_source_is_read_only_as_far_as_splits_need(module: str) -> None:
    found = own(f"{module}:Endless", data={"shuffle": False}).examples()

    assert found.facts.sources[0].documents == 8


def test_examples_survive_the_store(module: str) -> None:
    rows = own(f"{module}:Task").examples().splits["train"]

    for before, after in zip(rows, from_table(to_table(rows, 0)), strict=True):
        assert after.content_hash == before.content_hash
        for name, array in before.inputs.items():
            np.testing.assert_array_equal(after.inputs[name], array)
            assert after.inputs[name].dtype == array.dtype


def test_a_query_is_a_record_as_the_users_examples_are(module: str) -> None:
    read = own(f"{module}:Task").query_reader()
    records: list[dict[str, Any]] = [
        {"inputs": {"x": [[1.0, 2.0, 3.0]], "y": 1}},
        {"id": "mine", "inputs": {"x": np.zeros((2, 3)), "y": 0}},
    ]

    first, second = read(records, truncate=False)

    assert (first.example_id, second.example_id, second.size) == ("query:0", "mine", 6)
    np.testing.assert_array_equal(first.inputs["x"], [[1.0, 2.0, 3.0]])
    with pytest.raises(DataError, match=r"example 0 .*: found text; accepted: a mapping with inputs"):
        read([{"text": "a text"}], truncate=False)
    with pytest.raises(DataError, match=r"input 'y' of query:1 is float64 \[\], of query:0 int64 \[\]"):
        read([records[0], {"inputs": {"x": [[0.0] * 3], "y": 0.5}}], truncate=False)


def test_a_model_is_in_float32_and_evaluation_mode_without_dropout_and_keeps_its_ties(module: str) -> None:
    for device in ("cpu", "meta"):
        model = own(f"{module}:Task").load(device)
        assert not any(part.training for part in model.modules())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.get_submodule("1").p == 0.0
        assert len([*model.parameters()]) == 3


def test_a_batch_is_stacked_and_padded_with_a_mask_that_tells(module: str) -> None:
    rows = own(f"{module}:Task", data={"shuffle": False}).examples().splits["train"][:3]

    batch = stack(rows, torch.device("cpu"), torch.float64)

    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.items()} == {
        "x": (torch.float64, (3, 4, 3)),
        "x_mask": (torch.bool, (3, 4)),
        "y": (torch.int64, (3,)),
    }
    assert batch["x_mask"].sum(1).tolist() == [2, 3, 4]
    assert batch["x"].sum((1, 2)).tolist() == [0, 9, 24]


def test_an_output_does_not_depend_on_its_batch_mates(module: str) -> None:
    adapter = own(f"{module}:Task")
    rows = adapter.examples().splits["train"]
    model = adapter.load("cpu")

    with torch.no_grad():
        together = adapter.outputs(model, rows)
        alone = [float(adapter.outputs(model, [example])) for example in rows]

    assert alone == pytest.approx(together.tolist(), rel=1e-6)


def test_the_identity_follows_the_arguments_and_the_code(module: str, tmp_path: Path) -> None:
    plain, other = own(f"{module}:Task").identity(), fault(module, "mean").identity()
    assert set(plain) == {"adapter", "arguments", "output", "code"}
    assert plain["arguments"] != other["arguments"]
    assert plain["code"] == other["code"]
    versioned = own(f"{module}:Versioned").identity()
    assert versioned["version"] == "7"
    assert "code" not in versioned


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "load",
            SpecError,
            r":Task\.load\('weights'\) failed: KeyError: 'weights' \(tasks_\w+\.py, line \d+\)\. Mend it",
        ),
        ("module", SpecError, r"\.load\('weights'\) returned dict; it must return a torch\.nn\.Module"),
        ("meta", SpecError, r"returned a module without storage \(on meta\)"),
        ("empty model", SpecError, r"returned a module without parameters"),
        (
            "examples",
            SpecError,
            r"\.examples\('source'\), for data\.train, after 0 examples, failed: OSError: no source",
        ),
        ("midway", SpecError, r"for data\.train, after 4 examples, failed: ZeroDivisionError"),
        ("not a mapping", DataError, r"data\.train: example 4 that .*\.examples yields for source: found tuple"),
        ("no inputs", DataError, r"example 4 .*: found id; accepted: a mapping with inputs"),
        (
            "unknown key",
            DataError,
            r"example 4 .* has the unknown key 'labels'; accepted: id, inputs, label, text, size",
        ),
        ("empty", DataError, r"\(source:4\): input 'x' is empty, of shape \[0, 3\]"),
        ("text input", DataError, r"input 'x' holds <U5; accepted: numbers and booleans"),
        ("ragged", DataError, r"input 'x' makes no array"),
        ("dtype", DataError, r"data\.learn: input 'y' of source:4 is float64 \[\], of source:0 int64 \[\]"),
        ("width", DataError, r"input 'x' of source:4 is float32 \[\*, 4\], of source:0 float32 \[\*, 3\]"),
        ("names", DataError, r"source:4 has the inputs x, source:0 x, y"),
        ("mask", DataError, r"an input is named 'x_mask'; accepted: a string that is no other's mask"),
        ("size", DataError, r"\(source:4\): size is 0; accepted: an integer of at least 1"),
        ("text", DataError, r"\(source:4\): text is int, not a string"),
        ("id", DataError, r"names two examples of source 'source:1'"),
        (
            "output",
            SpecError,
            r"\.output on source:0 of source and 2 more failed: ValueError: first line second line \(",
        ),
        ("mean", SpecError, r"\.output returned torch\.float32 of shape \[\] for 3 examples; .* of shape \[3\]"),
        ("integers", SpecError, r"\.output returned torch\.int64 of shape \[3\]"),
    ],
)
def test_a_fault_of_the_users_code_is_one_line_that_names_it(
    module: str, name: str, error: type[GradstoreError], message: str
) -> None:
    with pytest.raises(error, match=message) as found:
        fault(module, name).examples()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nowhere_at_all:Task", "Python finds no module 'nowhere_at_all'"),
        ("{module}:Tusk", r"has no 'Tusk'\. It has: Task, Versioned"),
        ("{module}:number", "is int, not a function"),
        ("{module}:nothing", "returned NoneType, which has no method load, examples, output"),
        ("{module}:fails", r"fails\(\) failed: TypeError: .* missing 1 required positional argument"),
    ],
)
def test_a_function_that_makes_no_adapter_is_refused(module: str, function: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        own(function.format(module=module)).examples()


def test_the_text_of_an_error_is_cut(module: str) -> None:
    with pytest.raises(SpecError, match=r"fails\(depth = 1\) failed: RuntimeError: deep trouble .*\.\.\. \(") as found:
        own(f"{module}:fails", options={"arguments": {"depth": 1}}).identity()
    assert len(str(found.value)) < 600


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output": "margin"}, "model.output: found 'margin'; an adapter of one's own has no such key"),
        ({"revision": "main"}, "model.revision"),
        ({"options": {"width": 3}}, r"model\.options\.width: unknown key; accepted for .*: arguments"),
        ({"data": {"format": "jsonl"}}, r"data\.train\.format: found 'jsonl'; .* accepted are source, start, rows"),
        ({"data": {"label": "topic"}}, r"data\.train\.label"),
    ],
)
def test_keys_that_would_not_be_heard_are_refused(module: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        own(f"{module}:Task", **given)
