"""`make bench-large`: the whole path at 100,000 rows through the command line, and the memory of all its processes together.

A synthetic store of 100,000 rows x 224 groups x 128 features in float16 (5.7 GB) with 100 learn and 100 eval queries; then the
block and the ekfac kernel, C of the latter in float16, weights, scores. Every stage is the installed command in a process of
its own, with two workers. Prints for each its seconds, what it wrote, and the peak of its processes; writes
runs/bench-large.json; ends with 1 if the peak is above the limit.

Memory is the sum of the proportional set sizes (PSS) of the command and of all processes below it, sampled every 0.2 s: a page
that several of them share counts once in all. The page cache of the store's files is not in it. Beside it stands the sum of
resident set sizes (RSS), in which shared pages count in each.

Smaller: ``python -m tests.benchmarks.large --rows 4000 --folder /tmp/large``.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gradstore.store.artifacts import ScoresArtifact
from gradstore.store.features import FeatureStore
from tests.runs import command, write_run

LIMIT_BYTES = 8_000_000_000
SAMPLE_SECONDS = 0.2
KERNELS = ("block", "ekfac")


@dataclass(kw_only=True)
class Peak:
    """The most that a command and the processes below it held at once."""

    pss_bytes: int = 0
    rss_bytes: int = 0
    processes: int = 0

    def sample(self, root: psutil.Process) -> None:
        """Look once."""
        pss = rss = count = 0
        try:
            running = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in running:
            try:
                memory = process.memory_full_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                # It ended meanwhile.
                continue
            pss, rss, count = pss + memory.pss, rss + memory.rss, count + 1
        self.pss_bytes, self.rss_bytes = max(self.pss_bytes, pss), max(self.rss_bytes, rss)
        self.processes = max(self.processes, count)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one command took."""

    name: str
    seconds: float
    written_bytes: int
    peak: Peak = field(default_factory=Peak)

    def line(self) -> str:
        """What is printed of it."""
        return (
            f"{self.name:<18} {self.seconds:8.1f} s  {self.written_bytes / 1e9:7.2f} GB written  "
            f"peak {self.peak.pss_bytes / 1e9:5.2f} GB PSS ({self.peak.rss_bytes / 1e9:.2f} RSS) "
            f"in {self.peak.processes} processes"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages; return 0 if all of them stayed within the limit."""
    asked = _asked(arguments)
    folder: Path = asked.folder
    shutil.rmtree(folder, ignore_errors=True)
    stages = []
    for name, words in _commands(asked):
        stages.append(_run(name, words, folder / "store"))
        print(stages[-1].line(), flush=True)
        if name == "synth":
            _write_runs(folder)
    rankings, seconds = _rankings(folder), sum(stage.seconds for stage in stages)
    peak = max(stage.peak.pss_bytes for stage in stages)
    found = {
        "machine": {"processor": platform.processor() or platform.machine(), "cores": psutil.cpu_count()},
        "settings": {key: str(value) for key, value in vars(asked).items()},
        "stages": [asdict(stage) for stage in stages],
        "seconds": seconds,
        "peak_pss_bytes": peak,
        "limit_bytes": LIMIT_BYTES,
        "rankings": rankings,
    }
    path = Path("runs") / "bench-large.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for name, figures in rankings.items():
        print(
            f"{name:<24} recall of contributors {figures['recall']:.3f}, precision@10 {figures['precision_at_10']:.3f}"
        )
    within = peak <= LIMIT_BYTES
    print(
        f"{seconds:.0f} s in all; peak {peak / 1e9:.2f} GB of {LIMIT_BYTES / 1e9:.0f} GB: "
        f"{'met' if within else 'MISSED'}; wrote {path}"
    )
    if not asked.keep:
        shutil.rmtree(folder)
    return 0 if within else 1


def _asked(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.large")
    for name, default in (("rows", 100_000), ("groups", 224), ("features", 128), ("queries", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--block-rows", type=int, default=2048)
    parser.add_argument("--memory-per-worker", default="3GB", help="what the plan may give to each worker")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-large"), help="made anew, and removed after")
    parser.add_argument("--keep", action="store_true", help="leave the store where it is")
    return parser.parse_args(arguments)


def _commands(asked: argparse.Namespace) -> list[tuple[str, list[str]]]:
    """(name, words of the command) of every stage."""
    names = ("rows", "groups", "features", "queries", "workers", "block_rows", "memory_per_worker")
    sizes = [f"--{name.replace('_', '-')}={getattr(asked, name)}" for name in names]
    files = {kind: str(asked.folder / f"{kind}.toml") for kind in KERNELS}
    last = files[KERNELS[-1]]
    return [
        ("synth", ["synth", str(asked.folder), *sizes]),
        *((f"kernel {kind}", ["kernel", file]) for kind, file in files.items()),
        *((verb, [verb, last]) for verb in ("contribute", "learn", "score")),
    ]


def _write_runs(folder: Path) -> None:
    """Write a run.toml for every kernel, with C in float16."""
    run = tomllib.loads((folder / "run.toml").read_text(encoding="utf-8"))
    for kind in KERNELS:
        own = {"kernel": {"kind": kind}, "contribute": {"dtype": "float16"}}
        write_run(folder / f"{kind}.toml", _tables({**run, **own}))


def _tables(run: dict[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """The tables of a run.toml by their dotted names; a table in a table that holds no other is left inline."""
    found: dict[str, dict[str, Any]] = {}
    for name, values in run.items():
        own = {key: value for key, value in values.items() if key == "projection" or not isinstance(value, dict)}
        found[prefix + name] = own
        found |= _tables({key: value for key, value in values.items() if key not in own}, f"{prefix}{name}.")
    return found


def _run(name: str, words: Sequence[str], store: Path) -> Stage:
    """Run one command to its end, and watch it."""
    before, started, peak = _size(store), time.perf_counter(), Peak()
    process = subprocess.Popen([*command(*words), "--quiet"], stdout=subprocess.DEVNULL, stderr=sys.stderr)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(psutil.Process(process.pid), peak, ended))
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    if code:
        raise SystemExit(f"gradstore {' '.join(words)} ended with {code}")
    return Stage(name=name, seconds=seconds, written_bytes=_size(store) - before, peak=peak)


def _watch(root: psutil.Process, peak: Peak, ended: threading.Event) -> None:
    while not ended.wait(SAMPLE_SECONDS):
        peak.sample(root)


def _size(store: Path) -> int:
    return sum(path.stat().st_size for path in store.rglob("*") if path.is_file())


def _rankings(folder: Path) -> dict[str, dict[str, float]]:
    """Of every ranking the share of planted contributors among as many first rows, and label precision@10."""
    store = FeatureStore.open(str(folder / "store"))
    contributors = json.loads((folder / "planted.json").read_text(encoding="utf-8"))["contributors"]["eval"]
    found = {}
    for method in ("unweighted", "learned"):
        name = f"{KERNELS[-1]}.{method}"
        artifact = ScoresArtifact.open(store.storage, name)
        rows = [row for row in artifact.read().to_pylist() if row["side"] == "proponent"]
        first = [row for row in rows if row["rank"] <= len(contributors[row["query"]])]
        hits = sum(row["example"] in contributors[row["query"]] for row in first)
        precision = artifact.read_summary()["precision_at_10"]
        found[name] = {"recall": hits / len(first), "precision_at_10": precision}
    return found


if __name__ == "__main__":
    raise SystemExit(main())
