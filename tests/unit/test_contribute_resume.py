"""contribute that was stopped goes on with the same bits, reads every block once, and refuses what does not fit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine, Task
from gradstore.errors import ContractError, NotReadyError, ResourceError
from gradstore.stages.contribute import artifacts, contribute, contribute_span
from gradstore.stages.contributions import StoredContributions
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import KernelArtifact, MomentsArtifact, remove_artifact
from gradstore.store.backend.memory import MemoryStorage
from gradstore.store.features import FeatureStore
from tests.contributing import GROUPS, Interrupted, Interrupting, fill, make_spec, make_store, run, stored_c
from tests.runs import InThisProcess

QUIET = Progress(quiet=True)


def numbers(store: FeatureStore) -> dict[str, bytes]:
    """All chunks of contributions and moments."""
    found = [info.path for folder in ("contributions", "moments") for info in store.storage.list_objects(folder)]
    return {path: store.storage.read(path) for path in found if "/c." in path}


def spans(number: int) -> Callable[[Task], bool]:
    """Tell of the task of contribute that comes after some others of its kind."""
    seen: list[str] = []

    def dies(task: Task) -> bool:
        if task.function is contribute_span:
            seen.append(task.name)
        return len(seen) > number

    return dies


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_run_that_is_stopped_goes_on_with_the_same_bits(dtype: str) -> None:
    whole, stopped = make_store(invalid=[9]), make_store(invalid=[9])
    changes: dict[str, Any] = {"contribute": {"dtype": dtype}, "cluster": {"workers": 3}}
    run(make_spec(whole, **changes))

    for number in (0, 1, 1):
        with pytest.raises(Interrupted):
            run(make_spec(stopped, **changes), Interrupting(spans(number)))
    run(make_spec(stopped, **changes))

    assert numbers(stopped) == numbers(whole)


def test_what_was_summed_is_made_again_from_c_as_it_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(invalid=[9])
    spec = make_spec(store)
    run(spec)
    before = numbers(store)
    remove_artifact(store.storage, "moments/block/learn")
    reads = count_reads(monkeypatch)

    run(spec)

    assert numbers(store) == before
    assert not any(path.startswith("features/train/m0/") for path in reads)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often every object is read from now on."""
    reads: Counter[str] = Counter()
    read_into = MemoryStorage.read_into

    def counted(self: MemoryStorage, path: str, buffer: memoryview) -> int:
        reads[path] += 1
        return read_into(self, path, buffer)

    monkeypatch.setattr(MemoryStorage, "read_into", counted)
    return reads


def test_a_sweep_reads_every_block_once_and_gives_what_each_damping_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store()
    spec = make_spec(store, kernel={"kind": "block", "damping": [0.1, 2.5], "mode": "relative"})
    build_kernel(spec, cast(Engine, InThisProcess()), QUIET)
    reads = count_reads(monkeypatch)

    contribute(spec, cast(Engine, InThisProcess()), QUIET)

    chunks = {path: count for path, count in reads.items() if path.startswith("features/train/m0/") and "/c." in path}
    assert len(chunks) == 3 * len(GROUPS)
    assert set(chunks.values()) == {1}
    for damping, name in ((0.1, "block_0p1"), (2.5, "block_2p5")):
        alone = make_store()
        run(make_spec(alone, kernel={"kind": "block", "damping": damping, "mode": "relative"}))
        expected = stored_c(alone, "eval")
        assert np.abs(stored_c(store, "eval", name) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("mode", ["tensor", "streamed", "scores"])
def test_the_smaller_tasks_of_a_span_do_what_the_span_does(mode: str) -> None:
    whole, halved = make_store(block_rows=23), make_store(block_rows=23)
    changes: dict[str, Any] = {"contribute": {"mode": mode}}
    run(make_spec(whole, **changes))

    run(make_spec(halved, **changes), Smaller())

    assert numbers(halved) == numbers(whole)


class Smaller:
    """An engine whose workers die of every task that has smaller ones."""

    def run(self, tasks: Any) -> Any:
        """Run smaller tasks in this process."""
        for task in tasks:
            for piece in [task] if task.smaller is None else task.smaller():
                yield piece, piece.function(*piece.arguments)


def test_streamed_contributions_are_not_there_to_be_read_and_the_way_out_is_told() -> None:
    store = make_store()
    run(make_spec(store, contribute={"mode": "streamed"}))

    with pytest.raises(NotReadyError, match=r"contribute.mode = streamed keeps no C; set contribute.mode = tensor"):
        StoredContributions.open(store, "block", "learn")


def test_queries_of_other_groups_are_refused_by_name() -> None:
    store = make_store(groups={"eval": {**GROUPS, "b": (2, 2)}})

    with pytest.raises(
        ContractError, match=r"features/eval: its groups are not those of features/train: b .*eval has 4"
    ):
        run(make_spec(store))


def test_a_kernel_that_is_not_whole_is_refused_by_name() -> None:
    store = make_store()
    spec = make_spec(store)

    with pytest.raises(
        NotReadyError, match=r"kernels/block/m0: there is no such artifact. Run `gradstore kernel` first"
    ):
        contribute(spec, cast(Engine, InThisProcess()), QUIET)


def test_a_stale_kernel_is_refused_by_name() -> None:
    store = make_store()
    spec = make_spec(store)
    build_kernel(spec, cast(Engine, InThisProcess()), QUIET)
    train = store.open_set("train")
    train.log.take_back(1, "a test")
    fill(store.open_set("train"))

    with pytest.raises(ContractError, match=r"kernels/block/m0: is stale: blocks 1 of train/m0 .*prune .* --stale"):
        contribute(spec, cast(Engine, InThisProcess()), QUIET)


def test_sums_that_a_worker_has_no_memory_for_are_refused_with_the_way_out() -> None:
    store = make_store()
    build_kernel(make_spec(store), cast(Engine, InThisProcess()), QUIET)
    small = make_spec(store, cluster={"memory_per_worker": "2000B"})

    with pytest.raises(
        ResourceError, match=r"A_q of 5 learn queries and 4 groups .* Set contribute.second_moments = false"
    ):
        contribute(small, cast(Engine, InThisProcess()), QUIET)


def test_sums_go_with_the_spans_that_they_were_begun_with(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(block_rows=4)
    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "num_spans", lambda *_: 3)
        with pytest.raises(Interrupted):
            run(make_spec(store), Interrupting(spans(1)))

    run(make_spec(store))

    moments = MomentsArtifact.open(store.storage, ("block", "learn"))
    assert moments.is_complete()
    assert moments.shape.num_spans == 3
    assert KernelArtifact.open(store.storage, "block", "m0").is_complete()
