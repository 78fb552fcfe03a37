"""A synthetic run: its store is what featurize would make of its model, and a folder is made once and gone on with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gradstore.adapters.synthetic import Synthetic
from gradstore.cluster import Task
from gradstore.errors import ContractError, GradstoreError, SpecError, TaskError
from gradstore.plan import make_plan
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec, parse_spec, read_spec
from gradstore.stages.featurize import featurize
from gradstore.stages.featurize.block import featurize_blocks
from gradstore.stages.featurize.planted import find_planted
from gradstore.stages.loading import load_first
from gradstore.stages.progress import Progress
from gradstore.store.features import FeatureStore
from tests import oracle
from tests.runs import InThisProcess
from tests.synthetic import features_of, make, synthesized

QUIET = Progress(quiet=True)


class Recording(InThisProcess):
    """Runs tasks in this process, and keeps their names; dies after some of them, if told so."""

    def __init__(self, *, dies_after: int | None = None) -> None:
        self.names: list[str] = []
        self._dies_after = dies_after

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        for task in tasks:
            if len(self.names) == self._dies_after:
                raise TaskError(f"{task.name}: its worker died")
            self.names.append(task.name)
            yield from super().run([task])


def adapter_of(spec: RunSpec) -> Synthetic:
    adapter = make_adapter(spec)
    assert isinstance(adapter, Synthetic)
    return adapter


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small synthetic run with its features."""
    folder = tmp_path_factory.mktemp("synthetic")
    synthesized(folder)
    return folder


def test_drawn_features_are_the_gradients_of_the_model_to_the_last_bit(made: Path) -> None:
    spec = read_spec(made / "run.toml")
    splits = adapter_of(spec).examples().splits
    model = load_first(spec)
    for name in ("train", "eval"):
        drawn = find_planted(spec, FeatureStore.open(spec.run.store).open_set(name))
        assert drawn is not None
        examples = list(splits[name][:9])

        ours = drawn.compute(examples, covariances=True)
        theirs = model.compute(examples, covariances=True)

        np.testing.assert_array_equal(ours.outputs, theirs.outputs)
        assert ours.features.keys() == theirs.features.keys()
        for group, rows in theirs.features.items():
            np.testing.assert_array_equal(ours.features[group], rows)
        assert ours.covariances.keys() == theirs.covariances.keys()
        for part, (left, right, positions) in theirs.covariances.items():
            np.testing.assert_allclose(ours.covariances[part][0], left, rtol=1e-5)
            np.testing.assert_allclose(ours.covariances[part][1], right, rtol=1e-5)
            assert ours.covariances[part][2] == positions


def test_the_gradient_of_the_model_is_that_of_plain_autograd(made: Path) -> None:
    spec = read_spec(made / "run.toml")
    adapter = adapter_of(spec)
    example = adapter.examples().splits["learn"][3]

    def output(model: nn.Module) -> torch.Tensor:
        return adapter.outputs(model, [example])

    found = oracle.gradient(adapter.load("cpu"), output)

    rows = features_of(FeatureStore.open(spec.run.store), "learn")
    for name in adapter.names:
        np.testing.assert_array_equal(found[f"{name}.weight"].reshape(-1), rows[name][3])


def test_other_projections_take_the_model_and_give_what_they_make_of_the_planted_gradients(tmp_path: Path) -> None:
    spec = make(tmp_path)
    projected = spec.features.model_copy(update={"projection": {"kind": "logra", "rank": 2}, "dtype": "float32"})
    spec = spec.model_copy(update={"features": projected})

    featurize(spec, InThisProcess(), QUIET)  # type: ignore[arg-type]

    store = FeatureStore.open(spec.run.store)
    assert find_planted(spec, store.open_set("train")) is None
    assert {array.features for array in store.open_set("train").info.arrays} == {4}


def test_blocks_workers_and_the_order_of_tasks_change_no_bit_of_the_features(made: Path, tmp_path: Path) -> None:
    class Reversed(InThisProcess):
        def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
            yield from super().run(tasks[::-1])

    other = synthesized(tmp_path, engine=Reversed(), block_rows=32, workers=3)

    one = FeatureStore.open(read_spec(made / "run.toml").run.store)
    for name in ("train", "learn", "eval"):
        expected = features_of(one, name)
        for group, rows in features_of(other, name).items():
            np.testing.assert_array_equal(rows, expected[group])


def test_a_run_that_died_goes_on_and_ends_with_the_same_bytes(made: Path, tmp_path: Path) -> None:
    # One looks at the model, two write blocks.
    dying = Recording(dies_after=3)
    with pytest.raises(TaskError):
        synthesized(tmp_path, engine=dying)
    before = bytes_of(tmp_path / "store" / "features" / "train" / "m0")
    assert before.keys() < bytes_of(made / "store" / "features" / "train" / "m0").keys()

    going_on = Recording()
    synthesized(tmp_path, engine=going_on)

    assert not {*dying.names} & {name for name in going_on.names if name.startswith("featurize")}
    for part in ("features/train/m0", "features/learn/m0", "features/eval/m0", "features/train/statistics"):
        assert bytes_of(tmp_path / "store" / part) == bytes_of(made / "store" / part)


def test_featurize_finds_everything_there(made: Path) -> None:
    engine = Recording()

    featurize(read_spec(made / "run.toml"), engine, QUIET)  # type: ignore[arg-type]

    assert engine.names == ["prepare-m0"]


def test_statistics_are_those_of_the_stored_features(made: Path) -> None:
    store = FeatureStore.open(read_spec(made / "run.toml").run.store)
    train = store.open_set("train")
    rows = features_of(store, "train")
    found = train.read_statistics().to_pylist()

    assert len(found) == train.info.num_blocks * len(train.info.arrays)
    for array in train.info.arrays:
        parts = [row for row in found if row["group"] == array.name]
        assert sum(row["rows"] for row in parts) == 80
        assert sum(row["sum_squares"] for row in parts) == pytest.approx(np.square(rows[array.name]).sum(), rel=1e-3)
        right = np.sum([row["right"] for row in parts], axis=0).reshape(4, 4)
        inputs = oracle.planted_colouring(4)
        # Of every row four positions, of which none has a gradient of zero in all three outputs but by rare chance.
        np.testing.assert_allclose(right, 80 * inputs @ inputs.T, rtol=0.05)
        assert sum(row["positions"] for row in parts) == pytest.approx(80 * 4, rel=0.02)
    norms = train.read_examples(["gradient_norm", "label"])
    expected = np.sqrt(sum(np.square(values.astype(np.float64)).sum(1) for values in rows.values()))
    np.testing.assert_allclose(norms["gradient_norm"].to_numpy(), expected, rtol=1e-3)
    assert set(norms["label"].to_pylist()) <= {f"topic-{topic}" for topic in range(4)}


def test_planted_json_tells_the_groups_and_the_contributors(made: Path) -> None:
    told = json.loads((made / "planted.json").read_text(encoding="utf-8"))

    planted = adapter_of(read_spec(made / "run.toml")).planted
    assert sorted(told["good"] + told["noisy"]) == sorted(adapter_of(read_spec(made / "run.toml")).names)
    assert len(told["good"]) == len(told["noisy"]) == 4
    assert told["contributors"] == {name: rows.tolist() for name, rows in planted.contributors.items()}
    assert [len(rows) for rows in told["contributors"].values()] == [5, 6]


def test_a_run_toml_that_was_edited_beside_its_features_stays_and_is_gone_on_with(made: Path, tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "run.toml"
    edited = path.read_text(encoding="utf-8").replace('kind = "identity"', 'kind = "block"\ndamping = 0.3')
    path.write_text(edited, encoding="utf-8")

    synthesized(tmp_path, workers=2)

    assert path.read_text(encoding="utf-8") == edited
    assert read_spec(path).kernel.kind == "block"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 4}, "run.seed: store has 0, the run asks for 4"),
        ({"rows": 90}, "data.train.rows: store has 80, the run asks for 90"),
        ({"noisy": 0.25}, "model.options.noisy: store has 0.5, the run asks for 0.25"),
        ({"dtype": "float32"}, "features.dtype: store has 'float16', the run asks for 'float32'"),
    ],
)
@pytest.mark.parametrize("lost", [False, True], ids=["its run.toml", "its store alone"])
def test_a_folder_of_other_settings_is_refused_side_by_side_and_left_as_it_is(
    made: Path, tmp_path: Path, changes: dict[str, Any], told: str, lost: bool
) -> None:
    folder = tmp_path if lost else made
    before = bytes_of(folder)

    with pytest.raises(ContractError) as refused:
        make(folder, **({"store": str(made / "store")} if lost else {}), **changes)

    assert told in str(refused.value)
    assert "choose another FOLDER or --store" in str(refused.value)
    assert bytes_of(folder) == before


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"features": 13}, SpecError, "model.options.features: found 13; accepted: a product of two numbers above 1"),
        ({"features": 3}, SpecError, "model.options.features: found 3"),
        ({"groups": 0}, SpecError, "model.options.groups: found 0"),
        ({"contributors": 8}, SpecError, "11 queries with as many of their own need 88 rows of data.train"),
        ({"topics": 81}, SpecError, "model.options.topics: found 81; accepted: 1 to 80"),
        ({"noisy": 1.0}, SpecError, "model.options.noisy: found 1.0"),
        ({"kernel": "inverse"}, SpecError, "kernel.kind: found 'inverse'"),
        ({"dtype": "float64"}, SpecError, "features.dtype: found 'float64'"),
        ({"memory_per_worker": "100MB"}, GradstoreError, "each of 1 workers may use 100 MB"),
        ({"store": "ftp://host/store"}, GradstoreError, "ftp://host/store"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], error: type[GradstoreError], told: str
) -> None:
    folder = tmp_path / "folder"

    with pytest.raises(error) as refused:
        make(folder, **changes)

    assert told in str(refused.value)
    assert not folder.exists()


def test_a_folder_elsewhere_or_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")

    with pytest.raises(SpecError, match="accepted: a folder on this machine"):
        make(Path("s3://bucket/folder"))
    with pytest.raises(SpecError, match=r"cannot be written: .*Choose another FOLDER"):
        make(tmp_path / "file", store=str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("table", "key", "value", "told"),
    [
        ("model", "output", "margin", "model.output: found 'margin'; a synthetic model has no such key"),
        ("data.eval", "label", "topic", "data.eval.label: found 'topic'; a synthetic split has source and rows alone"),
        ("data.eval", "rows", None, "data.eval.rows: is missing"),
        ("model.options", "group", 3, "model.options.group: unknown key"),
    ],
)
def test_what_a_run_toml_says_and_would_not_be_heard_is_refused(
    made: Path, table: str, key: str, value: Any, told: str
) -> None:
    run = read_spec(made / "run.toml").model_dump(exclude_none=True)
    run["kernel"] = {"kind": "identity"}
    place = run
    for name in table.split("."):
        place = place[name]
    place |= {key: value}
    if value is None:
        del place[key]

    with pytest.raises(SpecError) as refused:
        make_adapter(parse_spec(run))

    assert told in str(refused.value)


def test_a_batch_of_examples_of_several_sets_has_the_gradients_of_each(made: Path) -> None:
    adapter = adapter_of(read_spec(made / "run.toml"))
    splits = adapter.examples().splits
    mixed = [splits["eval"][1], splits["train"][7], splits["eval"][0]]
    model = load_first(read_spec(made / "run.toml"))

    found = model.compute(mixed).features[adapter.names[0]]

    alone = [model.compute([example]).features[adapter.names[0]][0] for example in mixed]
    np.testing.assert_array_equal(found, np.stack(alone))


def test_the_task_is_that_of_featurize(made: Path, tmp_path: Path) -> None:
    names: list[Any] = []

    class Seen(InThisProcess):
        def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
            names.extend(task.function for task in tasks)
            yield from super().run(tasks)

    synthesized(tmp_path, engine=Seen(), rows=20, block_rows=32, contributors=0)

    assert names.count(featurize_blocks) == 3


def test_the_plan_of_the_file_alone_is_that_of_its_examples(made: Path) -> None:
    run = read_spec(made / "run.toml")

    assert make_plan(run).to_json() == make_plan(run, adapter_of(run).examples().splits).to_json()
