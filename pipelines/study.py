"""Runs a study - train, attribute, evaluate - and writes its tables: ``python pipelines/study.py pipelines/classification``.

A folder's study.toml lists tables, and of each the rows: a label and a run.toml. What is done already is kept, so that a study
that was stopped goes on where it was. Beside study.toml are written results.md, and results.json with all that the commands
told; values of every query are in values.parquet. docs/results.md has the results of all studies.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from gradstore.spec import read_spec
from gradstore.store.artifacts import EvaluationArtifact, list_artifacts
from gradstore.store.features import FeatureStore

Told = Mapping[str, Any]
_HUNDRED = 100
INTRODUCTION = """The tables of arXiv 2506.05647 in small, on models that are trained in seconds: `make tables` makes them again, in some hours on two
cores. Numbers compare methods with each other, not with the paper's, whose models and data are larger. *w/o w* is without weights, *w* with
learned ones; where there was a choice, kernel, k and weight decay are those of the highest LDS of the learn queries, for either
column. The difference is paired. Values of every query lie beside each study in pipelines/."""


def main(folder: Path) -> None:
    """Run what is missing of a study, and write its tables."""
    study = tomllib.loads((folder / "study.toml").read_text(encoding="utf-8"))
    if "prepare" in study:
        subprocess.run([sys.executable, folder / study["prepare"]], check=True)
    found: dict[str, dict[str, Told]] = {}
    for table in study["tables"]:
        for row in table["rows"]:
            measures = found.setdefault(row["run"], {})
            if not measures:
                if row.get("train", True):
                    gradstore(folder, "train", row["run"])
                gradstore(folder, "run", row["run"])
            if table["measure"] not in measures:
                told = json.loads(gradstore(folder, "evaluate", table["measure"], row["run"], "--json"))
                measures[table["measure"]] = {key: value for key, value in told.items() if key != "store"}
    made = {
        "date": datetime.now(tz=UTC).date().isoformat(),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "machine": f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }
    (folder / "results.json").write_text(json.dumps({**made, "runs": found}, indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text("\n".join(page(study, found, made)) + "\n", encoding="utf-8")
    write_pages(folder.parent)
    parquet.write_table(values(folder, found), folder / "values.parquet", compression="zstd")


def write_pages(pipelines: Path) -> None:
    """Write docs/results.md of all studies that have results."""
    lines = ["# Results", "", INTRODUCTION]
    for study in sorted(pipelines.glob("*/study.toml")):
        results = study.with_name("results.md")
        if results.exists():
            title = tomllib.loads(study.read_text(encoding="utf-8"))["title"]
            lines += ["", f"## {title}", "", results.read_text(encoding="utf-8").strip()]
    (pipelines.parent / "docs" / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def gradstore(folder: Path, *arguments: str) -> str:
    """Run a command of gradstore on a run of the study, whose modules are in its folder; its progress goes to the terminal."""
    words = [str(folder / word) if word.endswith(".toml") else word for word in arguments]
    print("$ gradstore", *words, flush=True)
    program = Path(sys.executable).with_name("gradstore")
    modules = os.pathsep.join([str(folder.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [program, *words], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": modules}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def page(study: Told, found: Mapping[str, Mapping[str, Told]], made: Mapping[str, str]) -> Iterator[str]:
    """Lines of markdown: the tables, with what they were made by."""
    yield f"{made['date']}, commit {made['commit']}, {made['machine']}, seed {study['seed']}. 95 % intervals; LDS and AUC times 100."
    for table in study["tables"]:
        yield from ("", f"### {table['name']}", "", "| | w/o w | w | difference |", "|---|---|---|---|")
        for row in table["rows"]:
            told = found[row["run"]][table["measure"]]
            yield from rows_of(row["label"], told, table.get("of"))
        yield from baselines_of(found[table["rows"][0]["run"]][table["measure"]], table.get("of"))
    if findings := study.get("findings"):
        yield from ("", findings.strip())


def rows_of(label: str, told: Told, of: str | None) -> Iterator[str]:
    """Without and with weights: those that were chosen by other queries where there was a choice."""
    chosen = told.get("chosen")
    if chosen is not None:
        without, weighted = chosen["methods"]
        yield line(label, without, weighted, weighted["difference"], factor_of(told))
        return
    for kernel in dict.fromkeys(row["kernel"] for row in told["methods"] if row["kernel"]):
        methods = [row for row in told["methods"] if row["kernel"] == kernel]
        measure = of or next(iter(methods[0]["measures"]))
        without = methods[0]["measures"][measure]
        for row in methods[1:]:
            weighted = row["measures"][measure]
            yield line(label, without, weighted, weighted["difference"], factor_of(told))


def baselines_of(told: Told, of: str | None) -> Iterator[str]:
    """What stands beside."""
    for row in told["methods"]:
        measure = of or next(iter(row["measures"]))
        if row["kernel"] is None and measure in row["measures"]:
            yield f"| {row['method']} | {interval(row['measures'][measure], factor_of(told))} | | |"


def line(label: str, without: Told, weighted: Told, difference: Told, factor: float) -> str:
    """A row of a table."""
    cells = (interval(without, factor), interval(weighted, factor), interval(difference, factor, "+"))
    return f"| {label} | {' | '.join(cells)} |"


def interval(of: Told, factor: float, sign: str = "") -> str:
    """A mean with its interval."""
    mean, low, high = (factor * of[key] for key in ("mean", "low", "high"))
    return f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def factor_of(told: Told) -> float:
    """Correlations, areas and shares are told in hundredths; tail-patch is in percent."""
    return 1 if told["measure"] == "tail_patch" else _HUNDRED


def values(folder: Path, found: Mapping[str, Mapping[str, Told]]) -> pa.Table:
    """Values of every query by all methods of all runs: what means and intervals are computed of."""
    tables = []
    stores = {read_spec(folder / run).run.store for run in found}
    for url in sorted(stores):
        store = FeatureStore.open(url)
        for artifact in list_artifacts(store.storage):
            if artifact.kind != "evaluation":
                continue
            table = EvaluationArtifact.open(store.storage, *artifact.name.split("/")).read()
            names = [name for name in table.column_names if name not in ("query", "example", "group", "predicted")]
            for name in names:
                rows = {
                    "store": pa.array([Path(url).name] * len(table)),
                    "evaluation": pa.array([artifact.name] * len(table)),
                    "row": table.column("query" if "query" in table.column_names else "example").cast(pa.int64()),
                    "group": table.column("group")
                    if "group" in table.column_names
                    else pa.nulls(len(table), pa.string()),
                    "measure": pa.array([name] * len(table)),
                    "value": table.column(name).cast(pa.float64()).cast(pa.float32()),
                }
                tables.append(pa.table(rows))
    return pa.concat_tables(tables)


def output(*command: str) -> str:
    """What a command says, in one line."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    """Name of the processor."""
    for told in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if told.startswith("model name"):
            return told.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
