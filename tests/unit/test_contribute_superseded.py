"""What was made anew, by another run or with other settings, is never mixed with what was made before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from gradstore.cluster import Task
from gradstore.errors import SupersededError
from gradstore.spec import RunSpec
from gradstore.stages import self_influence as influences
from gradstore.stages.contribute import artifacts, contribute_span
from gradstore.stages.contribute.queries import precondition
from gradstore.stages.contribute.scales import query_scales
from gradstore.store.artifacts import (
    ContributionArtifact,
    MomentsArtifact,
    ScoreMatrixArtifact,
    WeightsArtifact,
    list_artifacts,
    remove_artifact,
)
from gradstore.store.features import FeatureStore
from tests.contributing import GROUPS, KERNEL, Interrupted, Interrupting, make_spec, make_store, run, stored_c
from tests.runs import InThisProcess


def spans(number: int) -> Callable[[Task], bool]:
    """Tell of the task of contribute that comes after some others of its kind."""
    seen: list[str] = []

    def dies(task: Task) -> bool:
        if task.function is contribute_span:
            seen.append(task.name)
        return len(seen) > number

    return dies


def stop(spec: RunSpec, number: int) -> None:
    """Run until some spans are done."""
    with pytest.raises(Interrupted):
        run(spec, Interrupting(spans(number)))


def assert_sums_are_those_of_c(store: FeatureStore, kernel: str) -> None:
    """Compare A_q of every span, and its candidates, with C as it is stored."""
    c = stored_c(store, "learn", kernel).astype(np.float64)
    found = MomentsArtifact.open(store.storage, (kernel, "learn"))
    info = store.open_set("train").info
    for span in range(found.shape.num_spans):
        blocks = found.shape.blocks_of(span)
        rows = range(info.block_range(blocks[0])[0], info.block_range(blocks[-1])[1])
        expected = np.einsum("qnm,qnk->qmk", c[:, rows], c[:, rows])
        moments = found.read_span(span)
        np.testing.assert_allclose(moments.second_moments, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
        assert set(moments.rows.ravel()) <= {*rows, -1}


class Beside:
    """An engine beside which another run goes on, before spans are built."""

    def __init__(self, other: Callable[[], None]) -> None:
        self._other = other

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Run tasks in this process."""
        if any(task.function is contribute_span for task in tasks):
            self._other()
        yield from InThisProcess().run(tasks)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_runs_of_other_numbers_of_workers_at_once_sum_the_same_spans(dtype: str) -> None:
    store = make_store(rows={"train": 128, "learn": 5, "eval": 4}, block_rows=4)
    few, many = (make_spec(store, contribute={"dtype": dtype}, cluster={"workers": workers}) for workers in (1, 7))

    run(few, Beside(lambda: stop(many, 2)))
    run(many)

    assert MomentsArtifact.open(store.storage, ("block", "learn")).is_complete()
    assert_sums_are_those_of_c(store, "block")


def test_a_sweep_goes_on_with_sums_that_were_begun_in_other_spans_each_in_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = make_store(rows={"train": 64, "learn": 5, "eval": 4}, block_rows=4)
    first, second, both = (
        make_spec(store, kernel={**KERNEL, "damping": dampings}) for dampings in ([0.1], [1.0], [0.1, 1.0])
    )
    for spec, count in ((first, 4), (second, 7)):
        with monkeypatch.context() as patch:
            patch.setattr(artifacts, "num_spans", lambda *_, count=count: count)
            stop(spec, 2)

    run(both)

    for swept, count in zip(both.sweep(), (4, 7), strict=True):
        assert MomentsArtifact.open(store.storage, (swept.kernel.name, "learn")).shape.num_spans == count
        assert_sums_are_those_of_c(store, swept.kernel.name)


class Keeping:
    """An engine that keeps the tasks of spans to itself, as a scheduler may whose run has died."""

    def __init__(self) -> None:
        self.kept: list[Task] = []

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """Run all others in this process."""
        for task in tasks:
            if task.function is contribute_span:
                self.kept.append(task)
            else:
                yield task, task.function(*task.arguments)


def test_a_task_does_not_sum_what_was_made_anew_in_other_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    store, engine = make_store(), Keeping()
    run(make_spec(store), engine)
    remove_artifact(store.storage, "moments/block/learn")
    monkeypatch.setattr(artifacts, "num_spans", lambda *_: 2)
    run(make_spec(store), Keeping())

    with pytest.raises(SupersededError, match=r"moments/block/learn: was made anew with other spans"):
        engine.kept[1].function(*engine.kept[1].arguments)


@pytest.mark.parametrize("mode", ["tensor", "streamed", "scores"])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"contribute": {"normalize": "relatif"}}, "normalize"),
        ({"model": {"members": [{"name": "m0", "eta": 2.0}]}}, "etas"),
    ],
    ids=["normalize", "etas"],
)
def test_a_task_of_a_dead_run_writes_nothing_to_what_was_made_anew(
    mode: str, changed: dict[str, Any], told: str
) -> None:
    store, engine = make_store(), Keeping()
    run(make_spec(store, **{**changed, "contribute": {**changed.get("contribute", {}), "mode": mode}}), engine)
    made = ("contributions", "moments", "score_matrix")
    for found in list_artifacts(store.storage):
        if found.kind in made:
            remove_artifact(store.storage, found.path)
    run(make_spec(store, contribute={"mode": mode}), Keeping())

    with pytest.raises(SupersededError, match=f"was made anew with another {told} than this task's"):
        engine.kept[0].function(*engine.kept[0].arguments)

    assert not any(found.committed for found in list_artifacts(store.storage) if found.kind in made)


def test_queries_under_the_mean_of_members_do_not_pass_for_those_of_each_ones_own_kernel() -> None:
    store = make_store(members=("x", "y"))
    members = {"members": [{"name": "x", "eta": 1.0}, {"name": "y", "eta": 1.0}]}
    old = make_spec(store, model=members, kernel={**KERNEL, "members": "mean"})
    run(old)
    for found in list_artifacts(store.storage):
        if found.kind in ("queries", "contributions", "moments"):
            remove_artifact(store.storage, found.path)
    with pytest.raises(Interrupted):
        run(make_spec(store, model=members), Interrupting(lambda _: True))

    with pytest.raises(SupersededError, match="is of another kernel"):
        precondition(store.storage.url, old.model_dump(), ("eval", "x"))


def test_self_influence_under_the_mean_of_members_does_not_pass_for_that_of_each_ones_own_kernel() -> None:
    store = make_store(members=("x", "y"))
    members = {"members": [{"name": "x", "eta": 1.0}, {"name": "y", "eta": 1.0}]}
    run(make_spec(store, model=members, contribute={"normalize": "relatif"}))
    old = make_spec(store, model=members, kernel={**KERNEL, "members": "mean"})

    with pytest.raises(SupersededError, match="is of another kernel"):
        influences.compute_units(store.storage.url, old.model_dump(), "x", ["block"], [0])


def test_scores_are_under_the_weights_that_were_learned_last() -> None:
    store = make_store()
    run(make_spec(store, kernel={**KERNEL, "name": "c"}))
    c = stored_c(store, "eval", "c")
    spec = make_spec(store, contribute={"mode": "scores", "weights": "w"})

    for weights in ([0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7]):
        for found in list_artifacts(store.storage):
            if found.kind in ("weights", "score_matrix"):
                remove_artifact(store.storage, found.path)
        write_weights(store, weights)
        run(spec)

        matrix = ScoreMatrixArtifact.open(store.storage, "block.w", "eval")
        scores = np.concatenate([matrix.read(block) for block in range(matrix.shape.num_blocks)], axis=1)
        expected = c @ np.array(weights)
        assert np.abs(scores - expected).max() <= 1e-5 * np.abs(expected).max()


def write_weights(store: FeatureStore, weights: Sequence[float]) -> None:
    """Write weights called w."""
    artifact = WeightsArtifact.create(store.storage, "w", settings={"made": "by hand"})
    groups = len(GROUPS)
    table = {"group": [*GROUPS], "depth": [0] * groups, "function": ["mlp"] * groups, "weight": weights}
    artifact.write(pa.table(table), pa.table({"step": [0]}), facts={})


def test_what_float16_cannot_hold_is_counted_where_c_is_not_kept_as_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def far_too_small(*args: Any) -> dict[Any, np.ndarray]:
        return {target: scales * np.float32(2.0**-20) for target, scales in query_scales(*args).items()}

    monkeypatch.setattr("gradstore.stages.contribute.stage.query_scales", far_too_small)
    streamed, kept = make_store(), make_store()
    run(make_spec(streamed, contribute={"mode": "streamed", "dtype": "float16"}))
    run(make_spec(kept, contribute={"dtype": "float16"}))

    of_spans = MomentsArtifact.open(streamed.storage, ("block", "learn")).log.committed()
    of_blocks = ContributionArtifact.open(kept.storage, "block", "learn").log.committed()

    for count in ("saturated", "flushed"):
        assert sum(record.facts[count] for record in of_spans.values()) == sum(
            record.facts[count] for record in of_blocks.values()
        )
    assert sum(record.facts["saturated"] for record in of_spans.values()) > 0


@pytest.mark.parametrize("number", [0, 2])
def test_an_extended_sweep_that_is_stopped_goes_on_with_the_same_bits(number: int) -> None:
    groups = {name: {"a": (9, 13), "b": (11, 7), "c": (5, 5), "d": (16, 9)} for name in ("train", "learn", "eval")}
    found = []
    for stopped in (False, True):
        store = make_store(rows={"train": 200, "learn": 37, "eval": 29}, block_rows=40, groups=groups)
        run(make_spec(store, kernel={**KERNEL, "damping": [0.1]}))
        both = make_spec(store, kernel={**KERNEL, "damping": [0.1, 1.0]})
        if stopped:
            stop(both, number)
        run(both)
        found.append(stored_c(store, "eval", "block_1"))

    assert found[0].tobytes() == found[1].tobytes()
