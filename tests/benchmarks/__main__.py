"""`make bench`: every benchmark in one process after another; writes runs/bench.json and prints what it says."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

from tests.benchmarks import bench_contributions, bench_featurize, bench_kernel, bench_learner, bench_query, bench_store

BENCHMARKS = (bench_featurize, bench_kernel, bench_contributions, bench_learner, bench_store, bench_query)


def main() -> None:
    """Run all benchmarks; a ratio is of one process and one run, so it can be compared between machines."""
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    rows = []
    for benchmark in BENCHMARKS:
        for row in benchmark.rows():
            rows.append({**row, "machine": machine})
            met = row["ratio"] <= row["target"] if row["better"] == "lower" else row["ratio"] >= row["target"]
            seen = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.get("peers", {}).items())
            verdict = "met" if met else "MISSED"
            print(f"{row['name']:<32} {row['ratio']:.3f}  target {row['target']:.2f}  {verdict:<6}  {seen}", flush=True)
    path = Path("runs") / "bench.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
