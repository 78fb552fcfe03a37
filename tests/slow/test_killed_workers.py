"""Workers that are killed at random while kernels and C are built: every number is there, bit for bit."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest
from threadpoolctl import threadpool_limits

from gradstore.cluster import Engine
from gradstore.spec import read_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.featurize import featurize
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureStore
from tests import stores
from tests.clusters import SeparateCluster, restless
from tests.faults.proxy import FaultyProxy
from tests.runs import InSmallerTasks, InThisProcess, gradstore, make_run, write_run
from tests.servers import S3Server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
GROUPS = {f"layers.{index}.mlp": 32 for index in range(6)}
ROWS = {"train": 240, "learn": 12, "eval": 12}
BLOCK_ROWS = 30
KERNELS: dict[str, dict[str, Any]] = {
    "block": {"kind": "block"},
    "primal": {"kind": "full", "route": "primal"},
    "dual": {"kind": "full", "route": "dual"},
    "low_rank": {"kind": "full", "route": "low_rank", "rank": 24, "oversample": 8},
}
STAGES = {"kernel": build_kernel, "contribute": contribute}
Steps = Sequence[tuple[str, str, int]]
# Kernel, command, and how many workers die while it runs: ten in all.
ON_A_DIRECTORY: Steps = (
    ("block", "kernel", 1),
    ("block", "contribute", 2),
    ("primal", "kernel", 1),
    ("low_rank", "kernel", 3),
    ("low_rank", "contribute", 3),
)
ON_S3: Steps = (("dual", "kernel", 2), ("dual", "contribute", 8))
BUILT = ("kernels", "full-kernels", "queries", "contributions", "moments")
SUMMED = "partials"


def make_store(folder: Path, url: str) -> dict[str, Path]:
    """Write the features of three sets to a store; return a run.toml of each kernel, whose model and data nobody needs."""
    folder.mkdir(exist_ok=True)
    runs = {kernel: write_run(folder / f"{kernel}.toml", tables(url, kernel)) for kernel in KERNELS}
    contract = {"model": {"hash": "abc", "output": "loss"}, "projection": {"kind": "logra", "rank": 4}}
    store = FeatureStore.create(url, contract=contract, run=read_spec(runs["block"]).model_dump())
    for name, rows in ROWS.items():
        info = stores.set_info(name, rows=rows, block_rows=BLOCK_ROWS, groups=GROUPS)
        feature_set = store.create_set(info, stores.inputs(info))
        for block in range(info.num_blocks):
            features = stores.features(info, block)
            facts = {"nan_rows": 0, "saturated": 0}
            feature_set.write_block(
                block,
                features,
                examples=examples(info.block_range(block)),
                statistics=stores.statistics(info, block),
                facts=facts,
            )
    return runs


def tables(url: str, kernel: str) -> dict[str, dict[str, Any]]:
    return {
        "run": {"name": "killed", "store": url},
        "model": {"source": "none"},
        "data": {"source": "none"},
        **{f"data.{name}": {"rows": rows} for name, rows in ROWS.items()},
        "kernel": {"name": kernel, "damping": 0.1, **KERNELS[kernel]},
        "learn": {"k": 3},
        # Partial sums for more workers than there are: more that can be lost.
        "cluster": {"workers": 3, "memory_per_worker": "2GiB"},
    }


def examples(rows: tuple[int, int]) -> pa.Table:
    numbers = list(range(*rows))
    return pa.table(
        {
            "row": numbers,
            "example_id": [f"example {row}" for row in numbers],
            "label": pa.array([None] * len(numbers), pa.string()),
            "valid": [True] * len(numbers),
        }
    )


def built(url: str) -> dict[str, bytes]:
    """Every object that kernel and contribute wrote but for records, which name the attempts that wrote them."""
    storage = open_storage(url)
    paths = [found.path for kind in (*BUILT, SUMMED) for found in storage.list_objects(kind)]
    return {path: storage.read(path) for path in paths if not path.endswith(".json")}


def assert_holds_all(objects: Mapping[str, bytes], steps: Steps) -> None:
    """What every step makes is there, and no partial sums are left."""
    parents = [path.split("/")[:2] for path in objects]
    for kernel, command, _ in steps:
        made = {"kernel": ("kernels", "full-kernels"), "contribute": ("contributions",)}[command]
        assert any(folder in made and name.startswith(kernel) for folder, name in parents)
    assert not any(folder == SUMMED for folder, _ in parents)


def records(url: str) -> int:
    """How many units of kernel and contribute are committed."""
    storage = open_storage(url)
    return sum("/commits/" in found.path for kind in (*BUILT, SUMMED) for found in storage.list_objects(kind))


def build_here(runs: Mapping[str, Path], steps: Steps) -> None:
    engine = cast(Engine, InThisProcess())
    # As on workers: more threads may decompose a matrix with other last bits.
    with threadpool_limits(1):
        for kernel, command, _ in steps:
            STAGES[command](read_spec(runs[kernel]), engine, Progress(quiet=True))


def build_among_kills(runs: Mapping[str, Path], cluster: SeparateCluster, url: str, steps: Steps) -> None:
    """Take the same steps by commands on a cluster whose workers die."""
    for kernel, command, kills in steps:
        choice = random.Random(f"kills of {command} {kernel}")
        with restless(cluster, choice, kills, lambda: records(url)) as killed:
            done = gradstore(command, runs[kernel], "--scheduler", cluster.address)
            assert done.returncode == 0, done.stderr
            assert killed() == kills, f"{command} of {kernel}"


def on_workers(folder: Path, env: Mapping[str, str] | None = None, options: Sequence[str] = ()) -> SeparateCluster:
    return SeparateCluster(folder, 2, {"PYTHONPATH": str(ROOT), "GRADSTORE_FSYNC": "on", **(env or {})}, options)


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process writes need not last; what workers write is to."""
    monkeypatch.setenv("GRADSTORE_FSYNC", "off")


def test_ten_kills_change_no_bit_on_a_directory(tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    build_here(make_store(alone, str(alone / "store")), ON_A_DIRECTORY)
    runs = make_store(killed, str(killed / "store"))
    with on_workers(tmp_path / "cluster", options=("--preload", "tests.slow_disk")) as cluster:
        build_among_kills(runs, cluster, str(killed / "store"), ON_A_DIRECTORY)
    expected = built(str(alone / "store"))
    assert_holds_all(expected, ON_A_DIRECTORY)
    assert built(str(killed / "store")) == expected


def test_ten_kills_change_no_bit_on_s3(tmp_path: Path, seaweed: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in seaweed.env.items():
        monkeypatch.setenv(name, value)
    alone, url = tmp_path / "alone", seaweed.url("killed")
    build_here(make_store(alone, str(alone / "store")), ON_S3)
    runs = make_store(tmp_path / "killed", url)
    # Every third answer comes late, as from far away.
    with FaultyProxy(seaweed.endpoint, {"late": 0.3}) as proxy:
        far = {"AWS_ENDPOINT_URL": proxy.url}
        with on_workers(tmp_path / "cluster", far) as cluster:
            build_among_kills(runs, cluster, url, ON_S3)
    expected = built(str(alone / "store"))
    assert_holds_all(expected, ON_S3)
    assert built(url) == expected


def test_blocks_that_are_featurized_one_by_one_have_the_same_bits(tiny_run: Path, tmp_path: Path) -> None:
    found = []
    for engine in (InThisProcess(), InSmallerTasks()):
        folder = tmp_path / type(engine).__name__
        folder.mkdir()
        (folder / "model").symlink_to(tiny_run / "model")
        run = make_run(folder, str(folder / "store"), {"features": {"block_rows": 4}, "cluster": {"workers": 1}})
        featurize(read_spec(run), cast(Engine, engine), Progress(quiet=True))
        storage = open_storage(str(folder / "store"))
        chunks = [item.path for item in storage.list_objects("features") if "/c." in item.path]
        found.append({path: storage.read(path) for path in chunks})
    assert found[0] == found[1]
    assert found[0]
