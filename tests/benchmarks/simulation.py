"""`make simulate`: a run of 10 million examples, 39,063 blocks, through a real scheduler with tasks that compute nothing.

What is real: the set and its document, the graph, the scheduler and its workers, one commit record for each block with as many
objects as there are groups, the listing and reading of records, `status`, `plan`, and going on with a tenth of the blocks missing.
What is not: chunks, tables of examples, and the computation. Prints for each step its seconds, the requests that this process
made, what they listed, and the most memory that it held so far (the scheduler is in it); writes runs/simulation.json.

Smaller: ``python -m tests.benchmarks.simulation --rows 20000``.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa

from gradstore.cluster import Engine, Task
from gradstore.plan import make_plan
from gradstore.plan.sizes import block_tasks
from gradstore.spec import ClusterSection, RunSpec
from gradstore.stages.status import status
from gradstore.stages.synth import SynthSettings, make_folder
from gradstore.store.backend.directory import DirectoryStorage
from gradstore.store.blocks import ObjectEntry
from gradstore.store.features import FeatureArray, FeatureSet, FeatureStore, SetInfo

BLOCK_ROWS = 256
REQUESTS = ("read", "publish", "list_folders", "delete")


class Meter:
    """Takes the measures of one step after another."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def step(self, name: str) -> Iterator[dict[str, Any]]:
        """Measure what is done while entered; more may be noted in what it yields."""
        requests, listed = [0], [0]
        originals = {verb: getattr(DirectoryStorage, verb) for verb in REQUESTS}

        def counted(verb: str) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                requests[0] += 1
                return originals[verb](*arguments)

            return call

        def list_objects(storage: DirectoryStorage, folder: str, listing: Any = DirectoryStorage.list_objects) -> Any:
            for info in listing(storage, folder):
                listed[0] += 1
                yield info

        more: dict[str, Any] = {}
        replaced: dict[str, Any] = {**{verb: counted(verb) for verb in REQUESTS}, "list_objects": list_objects}
        started = time.monotonic()
        with patch.multiple(DirectoryStorage, **replaced):
            yield more
        row = {
            "step": name,
            "seconds": round(time.monotonic() - started, 2),
            "requests": requests[0],
            "listed": listed[0],
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            **more,
        }
        self.rows.append(row)
        told = "".join(f", {key} {value}" for key, value in more.items())
        print(
            f"{name:<28} {row['seconds']:>8.2f} s {row['requests']:>8,} requests {row['listed']:>8,} listed "
            f"{row['peak_mib']:>6,} MiB{told}",
            flush=True,
        )


def commit_blocks(store_url: str, blocks: Sequence[int]) -> int:
    """Task: commit blocks as if their objects were there; return how many this call did."""
    feature_set = FeatureStore.open(store_url).open_set("train")
    info, log = feature_set.info, feature_set.log
    done = 0
    for block in blocks:
        generation = log.begin(block)
        if generation is None:
            continue
        entry = ObjectEntry(bytes=BLOCK_ROWS * 2 * 128, crc32c="00000000")
        objects = {f"m0/{array.name}/c.{block}.0": entry for array in info.arrays}
        facts = {"rows": BLOCK_ROWS, "nan_rows": 0, "saturated": 0, "seconds": 1.0}
        log.commit(block, generation, objects, facts)
        done += 1
    return done


def simulate(folder: Path, rows: int, groups: int, workers: int) -> list[dict[str, Any]]:
    """Go through the run in a folder that is empty; return the measures."""
    meter = Meter()
    spec = _run(folder, rows, groups, workers)
    with meter.step("plan"):
        make_plan(spec)
    store = str(folder / "store")
    spec = spec.model_copy(update={"run": spec.run.model_copy(update={"store": store})})
    with meter.step("create the set"):
        feature_set = _create(spec, rows, groups)
    blocks = feature_set.info.num_blocks
    with Engine(spec.cluster) as engine:
        with meter.step("start the cluster"):
            engine.client  # noqa: B018 - connects
        _commit(meter, engine, feature_set, "commit all blocks")
        log = FeatureStore.open(spec.run.store).open_set("train").log
        with meter.step("list the records"):
            assert len(log.generations()) == blocks
        with meter.step("read the records"):
            assert len(log.facts()) == blocks
        with meter.step("status"):
            found = status(spec.run.store)
        assert found["feature_sets"][0]["blocks"] == {"committed": blocks, "total": blocks}
        storage = feature_set.storage
        for info in sorted(storage.list_objects(log.folder), key=lambda each: each.path)[-(blocks // 10) :]:
            storage.delete(info.path)
        _commit(meter, engine, feature_set, "go on with a tenth missing")
        with meter.step("go on with nothing missing"):
            assert feature_set.missing_blocks() == []
    return meter.rows


def _run(folder: Path, rows: int, groups: int, workers: int) -> RunSpec:
    made = make_folder(
        SynthSettings(
            folder=folder,
            # Whose size nobody measures: plan would refuse a disk that has no room for the features.
            store="memory://simulation",
            rows=rows,
            queries=6,
            learn_queries=5,
            groups=groups,
            features=128,
            topics=4,
            contributors=0,
            noisy=0.5,
            seed=0,
            dtype="float16",
            block_rows=BLOCK_ROWS,
            kernel="identity",
            workers=workers,
            memory_per_worker="2GiB",
        )
    )
    cluster = ClusterSection(workers=workers, memory_per_worker="2GiB", device="cpu")
    return made.model_copy(update={"cluster": cluster})


def _create(spec: RunSpec, rows: int, groups: int) -> FeatureSet:
    arrays = tuple(
        FeatureArray(name=f"layers.{group}", features=128, scale=1.0, depth=group, function="mlp")
        for group in range(groups)
    )
    info = SetInfo(
        name="train", rows=rows, block_rows=BLOCK_ROWS, dtype="float16", arrays=arrays, data_hash=f"of {rows} rows"
    )
    store = FeatureStore.create(spec.run.store, contract={"model": {"source": "none"}}, run=spec.model_dump())
    tables = (pa.table({"row": list(range(*info.block_range(block)))}) for block in range(info.num_blocks))
    return store.create_set(info, tables)


def _commit(meter: Meter, engine: Engine, feature_set: FeatureSet, name: str) -> None:
    """Have workers commit every block that is missing, in the tasks of featurize."""
    url = feature_set.storage.url
    with meter.step(name) as more:
        started = time.monotonic()
        missing = feature_set.missing_blocks()
        tasks = [
            Task(name=f"commit-{blocks[0]:06d}", function=commit_blocks, arguments=(url, list(blocks)))
            for blocks in block_tasks(missing, 2)
        ]
        done = 0
        for _, count in engine.run(tasks):
            if not done:
                more["first"] = f"{time.monotonic() - started:.2f} s"
            done += count
        more["tasks"] = len(tasks)
        more["blocks"] = done
    assert done == len(missing)


def main() -> None:
    """Simulate, print, and write runs/simulation.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--groups", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the store is made; a temporary folder by default"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        found = simulate(Path(folder) / "run", asked.rows, asked.groups, asked.workers)
    path = Path("runs") / "simulation.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"rows": asked.rows, "groups": asked.groups, "steps": found}, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
