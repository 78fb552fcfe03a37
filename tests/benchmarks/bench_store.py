"""What the store costs beside the files or the client below it, at the reference shape: 224 groups of 4,096 float16.

Both sides of a row do the same work in one process, in turn, with equal numbers of threads, folders and files; a ratio is that of
the medians over the rounds, since now and then a pass takes five times as long on a virtual machine.

write-local         bytes a second of `FeatureSet.write_block`, which is given float32, to those of plain files of the
                    sizes that it writes, in as many folders. Neither side syncs (GRADSTORE_FSYNC=off); beside it is the
                    ratio where both sync every file and its folder, which is up to the disk.
read-local          bytes a second, as they are stored, of a `BlockReader`, which verifies every checksum and gives float32,
                    to those of plain reads of the same files into buffers that are used again. Before every pass the files
                    are evicted from the page cache.
s3-obstore-vs-s3fs  seconds in which `s3fs.cat` gets the bytes of row blocks (48 groups of 1,024, blocks of 512 rows) from
                    SeaweedFS, to those in which the store reads them through obstore, checks and converts them. Beside it is
                    the ratio of the store through its own s3fs client.
"""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import s3fs
import torch

from gradstore.store.backend import Storage, open_storage
from gradstore.store.blocks import in_parallel
from gradstore.store.features import BlockReader, FeatureArray, FeatureSet, FeatureStore, SetInfo
from gradstore.store.layout import chunk_path
from tests import stores
from tests.servers import S3Server, running_seaweed

WRITE_TARGET, WRITE_CPU_TARGET, READ_TARGET, S3_TARGET = 0.65, 0.7, 0.9, 2.5
# float32 bytes of a piece of the reader: as much as a task of contribute takes at a time.
PIECE_BYTES = 64 * 2**20
THREADS = 4
SEED = 7

Features = Mapping[str, npt.NDArray[np.float32]]
Pass = Callable[[], "Cost"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a pass took: by the clock, and of this process on all its threads."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What one pass writes or reads."""

    groups: int
    width: int
    block_rows: int
    blocks: int

    @property
    def gigabytes(self) -> float:
        """What it takes in the store."""
        return 2 * self.groups * self.width * self.block_rows * self.blocks / 1e9

    def info(self) -> SetInfo:
        """Describe a feature set of this shape, whose scale is about that of `features`."""
        arrays = tuple(
            FeatureArray(name=f"layers.{index}", features=self.width, scale=2.0**-6, depth=index, function="mlp")
            for index in range(self.groups)
        )
        rows = self.block_rows * self.blocks
        return SetInfo(
            name="train", rows=rows, block_rows=self.block_rows, dtype="float16", arrays=arrays, data_hash="bench"
        )

    def features(self) -> Features:
        """Make one block with heavy tails: Student's t with 5 degrees of freedom, and log-normal norms of rows."""
        rng = np.random.default_rng(SEED)
        size = self.block_rows, self.width
        entries = rng.standard_normal(size, dtype=np.float32)
        entries /= np.sqrt(rng.chisquare(5, size).astype(np.float32) / 5)
        entries *= np.exp(rng.normal(-4, 1, (self.block_rows, 1))).astype(np.float32)
        return {array.name: np.roll(entries, index, 0) for index, array in enumerate(self.info().arrays)}


LOCAL = Shape(groups=224, width=4096, block_rows=256, blocks=2)
# Enough that what a stream takes once, threads and buffers that are touched first, is little beside it.
STREAMED = replace(LOCAL, blocks=4)
REMOTE = Shape(groups=48, width=1024, block_rows=512, blocks=4)
TIMES = 4


def rows(*, rounds: int = 5) -> list[dict[str, Any]]:
    """Measure every row and return {name, ratio, target, better}, with other figures beside."""
    # Below the working tree: a folder for temporary files may be in memory.
    Path("runs").mkdir(exist_ok=True)
    with _one_thread(), tempfile.TemporaryDirectory(prefix="bench-", dir=Path("runs").absolute()) as folder:
        local = [_write_row(Path(folder), rounds), _read_row(Path(folder), rounds)]
        with running_seaweed(Path(folder)) as server, _environment(server.env):
            return [*local, _s3_row(server, rounds)]


def _write_row(folder: Path, rounds: int) -> dict[str, Any]:
    features = LOCAL.features()
    written = _objects_of_a_block(folder / "sizes", features)
    files = {f"{index}/{block}": data for block in range(LOCAL.blocks) for index, data in enumerate(written)}
    passes: dict[str, Pass] = {}
    for sync in (True, False):
        passes[f"store {sync}"] = partial(_write_local_store, folder / "store", features, sync=sync)
        passes[f"files {sync}"] = partial(_write_files, folder / "files", files, sync=sync)
    costs = _alternate(passes, rounds)
    store, plain = costs["store False"], costs["files False"]
    return {
        "name": "write-local",
        "ratio": _ratio(plain, store),
        "target": WRITE_TARGET,
        "better": "higher",
        "peers": {
            "synced": _ratio(costs["files True"], costs["store True"]),
            "GB/s": LOCAL.gigabytes / _seconds(store),
            "files GB/s": LOCAL.gigabytes / _seconds(plain),
            f"CPU s/GB (target {WRITE_CPU_TARGET})": _cpu_seconds(store) / LOCAL.gigabytes,
            "files CPU s/GB": _cpu_seconds(plain) / LOCAL.gigabytes,
        },
    }


def _read_row(folder: Path, rounds: int) -> dict[str, Any]:
    url = str(folder / "read")
    info = STREAMED.info()
    _write(stores.create(url, info), STREAMED.features())
    files = [Path(url, path) for path in _chunk_paths(info)]
    os.sync()
    passes: dict[str, Pass] = {
        "store": partial(_evict_first, files, partial(_read, url)),
        "files": partial(_evict_first, files, partial(_timed, partial(_read_files, files))),
    }
    costs = _alternate(passes, rounds)
    shutil.rmtree(url)
    return {
        "name": "read-local",
        "ratio": _ratio(costs["files"], costs["store"]),
        "target": READ_TARGET,
        "better": "higher",
        "peers": {
            "GB/s": STREAMED.gigabytes / _seconds(costs["store"]),
            "files GB/s": STREAMED.gigabytes / _seconds(costs["files"]),
            "CPU s/GB": _cpu_seconds(costs["store"]) / STREAMED.gigabytes,
            "files CPU s/GB": _cpu_seconds(costs["files"]) / STREAMED.gigabytes,
        },
    }


def _s3_row(server: S3Server, rounds: int) -> dict[str, Any]:
    features, numbers = REMOTE.features(), count()
    info = REMOTE.info()
    _write(stores.create(server.url("store"), info), features)
    chunks = [f"{server.bucket}/store/{path}" for path in _chunk_paths(info)]

    def write(storage: Storage) -> Cost:
        made = stores.create(storage, replace(info, name=f"written-{next(numbers)}"))
        return _timed(partial(_write, made, features))

    passes: dict[str, Pass] = {}
    for client in ("obstore", "s3fs"):
        with _environment({"GRADSTORE_S3_CLIENT": client}):
            storage = open_storage(server.url("store"))
        passes[f"read {client}"] = partial(_read, storage, times=TIMES)
        passes[f"write {client}"] = partial(write, storage)
    files = s3fs.S3FileSystem(endpoint_url=server.endpoint, config_kwargs={"s3": {"addressing_style": "path"}})
    passes["cat"] = partial(_timed, lambda: [files.cat(chunks) for _ in range(TIMES)])
    costs = _alternate(passes, rounds)
    ours, theirs = costs["read obstore"], costs["read s3fs"]
    return {
        "name": "s3-obstore-vs-s3fs",
        "ratio": _ratio(costs["cat"], ours),
        "target": S3_TARGET,
        "better": "higher",
        "peers": {
            "the store through s3fs": _ratio(theirs, ours),
            "CPU of the client": _cpu_seconds(theirs) / _cpu_seconds(ours),
            "writing": _ratio(costs["write s3fs"], costs["write obstore"]),
            "GB/s": TIMES * REMOTE.gigabytes / _seconds(ours),
            "s3fs.cat GB/s": TIMES * REMOTE.gigabytes / _seconds(costs["cat"]),
        },
    }


def _write(feature_set: FeatureSet, features: Features) -> None:
    """Write and commit all blocks of a set, each with the same features."""
    info = feature_set.info
    for block in range(info.num_blocks):
        tables = {"examples": stores.examples(info, block), "statistics": stores.statistics(info, block)}
        feature_set.write_block(block, features, **tables, facts={})


def _read(place: str | Storage, *, times: int = 1) -> Cost:
    """Stream all blocks, some times over, of a set that was opened anew before the clock starts: no record is known yet."""
    opened = FeatureStore.open(place).open_set("train")
    names = [array.name for array in opened.info.arrays]
    a_piece = PIECE_BYTES // (4 * opened.info.block_rows * opened.info.arrays[0].features)
    bundles = [names[first : first + a_piece] for first in range(0, len(names), a_piece)]
    reader = BlockReader([opened], bundles)
    return _timed(lambda: deque(reader.read([*range(opened.info.num_blocks)] * times), maxlen=0))


def _write_local_store(url: Path, features: Features, *, sync: bool) -> Cost:
    with _environment({"GRADSTORE_FSYNC": "on" if sync else "off"}):
        made = stores.create(str(url), LOCAL.info())
        cost = _timed(partial(_write, made, features))
    shutil.rmtree(url)
    return cost


def _write_files(folder: Path, files: Mapping[str, bytes], *, sync: bool) -> Cost:
    for parent in {(folder / name).parent for name in files}:
        parent.mkdir(parents=True)

    def write(name: str) -> None:
        with (folder / name).open("wb", buffering=0) as file:
            file.write(files[name])
            if sync:
                os.fsync(file.fileno())
        if sync:
            _sync_folder((folder / name).parent)

    cost = _timed(lambda: in_parallel(write, files, threads=THREADS))
    shutil.rmtree(folder)
    return cost


def _chunk_paths(info: SetInfo) -> list[str]:
    """Paths in a store of all chunks of a lone member's features, block by block."""
    arrays = [info.array_path("m0", array.name) for array in info.arrays]
    return [f"{info.folder}/{chunk_path(array, block, 0)}" for block in range(info.num_blocks) for array in arrays]


def _read_files(files: Sequence[Path]) -> None:
    """Read files into as many buffers as two pieces of the reader have chunks."""
    size = files[0].stat().st_size
    buffers = [np.empty(size, np.uint8) for _ in range(2 * PIECE_BYTES // (2 * size))]

    def read(index: int) -> None:
        with files[index].open("rb", buffering=0) as file:
            assert file.readinto(buffers[index % len(buffers)].data) == size

    in_parallel(read, range(len(files)), threads=THREADS)


def _objects_of_a_block(url: Path, features: Features) -> list[bytes]:
    """Every object that writing one block makes, in no order."""
    made = stores.create(str(url), LOCAL.info())
    before = {info.path for info in made.storage.list_objects("")}
    tables = {"examples": stores.examples(made.info, 0), "statistics": stores.statistics(made.info, 0)}
    made.write_block(0, features, **tables, facts={})
    objects = [made.storage.read(info.path) for info in made.storage.list_objects("") if info.path not in before]
    shutil.rmtree(url)
    return objects


def _evict_first(files: Sequence[Path], run: Pass) -> Cost:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return run()


def _timed(run: Callable[[], object]) -> Cost:
    gc.collect()
    cpu, clock = time.process_time(), time.perf_counter()
    run()
    return Cost(seconds=time.perf_counter() - clock, cpu_seconds=time.process_time() - cpu)


def _alternate(passes: Mapping[str, Pass], rounds: int) -> dict[str, list[Cost]]:
    """Cost of every pass in every round, after one round that is not counted."""
    costs: dict[str, list[Cost]] = {name: [] for name in passes}
    for number in range(rounds + 1):
        for name, run in passes.items():
            cost = run()
            if number:
                costs[name].append(cost)
    return costs


def _ratio(above: Sequence[Cost], below: Sequence[Cost]) -> float:
    return round(_seconds(above) / _seconds(below), 3)


def _seconds(costs: Sequence[Cost]) -> float:
    return statistics.median(cost.seconds for cost in costs)


def _cpu_seconds(costs: Sequence[Cost]) -> float:
    return statistics.median(cost.cpu_seconds for cost in costs)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@contextmanager
def _one_thread() -> Iterator[None]:
    """As workers have it: each conversion in the thread of the chunk that it is of."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
