"""Runs a study - train, attribute, evaluate - and writes its tables: ``python pipelines/study.py pipelines/classification``.

A folder's study.toml lists tables, and of each the rows: a label and a run.toml; and which weights one run's store is given of
another's; commands ``before`` come first. What is done already is kept, so that a study that was stopped goes on where it was. With a second argument only such runs
are made whose names begin with it, and with ``--pages`` none: pages are written again. Beside study.toml are written results.md,
and results.json with all that the commands told; values of every query are in values.parquet. docs/results.md has the results of
all studies.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet
from scipy.stats import rankdata

from gradstore.spec import read_spec
from gradstore.stages.weights import read_weights
from gradstore.store.artifacts import EvaluationArtifact, RetrainedArtifact, list_artifacts
from gradstore.store.features import FeatureStore

Told = Mapping[str, Any]
_HUNDRED = 100
COST = "cost"
PACKED = {"compression": "zstd", "compression_level": 19}
INTRODUCTION = """The tables of arXiv 2506.05647 in small, on models that are trained in seconds: `make tables` makes them again, in some hours on two
cores. Numbers compare methods with each other, not with the paper's, whose models and data are larger. *w/o w* is without weights, *w* with
learned ones; where there was a choice, kernel, k and weight decay are those of the highest LDS of the learn queries, for either
column. The difference is paired. Values of every query lie beside each study in pipelines/."""


def main(folder: Path, *, anew: bool = True, only: str = "") -> None:
    """Run what is missing of a study, and write its tables; or write them again from results.json alone.

    ``only`` is what the names of runs begin with that are run; what was measured by others is left as it is.
    """
    study = tomllib.loads((folder / "study.toml").read_text(encoding="utf-8"))
    results = folder / "results.json"
    if anew:
        found = json.loads(results.read_text(encoding="utf-8"))["runs"] if results.exists() else {}
        for run_name, measure, told in run(folder, study, only):
            found.setdefault(run_name, {})[measure] = {**told, "made": made()}
            # Whoever stops it has what was measured so far.
            results.write_text(json.dumps({"runs": found}, indent=1) + "\n", encoding="utf-8")
        write_values(folder, study, only)
    told = json.loads(results.read_text(encoding="utf-8"))
    (folder / "results.md").write_text("\n".join(page(folder, study, told["runs"])) + "\n", encoding="utf-8")
    write_pages(folder.parent)


def made() -> dict[str, str]:
    """When, by which code and on what something is measured."""
    return {
        "date": datetime.now(tz=UTC).date().isoformat(),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "machine": f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def run(folder: Path, study: Told, only: str) -> Iterator[tuple[str, str, Told]]:
    """Yield of every run, and of all that it measures, what the command told."""
    if "prepare" in study:
        subprocess.run([sys.executable, folder / study["prepare"]], check=True)
    for command in [] if only else study.get("before", []):
        gradstore(folder, *command)
    finished: set[str] = set()
    transfers = [] if only else study.get("transfers", [])
    for transfer in transfers:
        make(folder, transfer, finished)
        make(folder, {"run": transfer["into"], "train": False}, finished)
    for transfer in transfers:
        source, into = (read_spec(folder / transfer[key]).run.store for key in ("run", "into"))
        gradstore(
            folder, "transfer", source, transfer["weights"], into, "--as", transfer.get("as", transfer["weights"])
        )
    measured: set[tuple[str, str]] = set()
    for table in study["tables"]:
        for row in table["rows"]:
            asked = row["run"], table["measure"]
            if asked in measured or not row["run"].startswith(only):
                continue
            make(folder, row, finished)
            measured.add(asked)
            if table["measure"] == COST:
                yield (*asked, cost_of(read_spec(folder / row["run"]).run.store))
                continue
            told = json.loads(gradstore(folder, "evaluate", table["measure"], row["run"], "--json"))
            weights = learned_weights(told.pop("store"), told["methods"])
            yield (*asked, {**told, "weights": weights})


def make(folder: Path, row: Told, finished: set[str]) -> None:
    """Train a run's model, unless it is another's, and attribute; once."""
    if row["run"] in finished:
        return
    if row.get("train", True):
        gradstore(folder, "train", row["run"])
    gradstore(folder, "run", row["run"])
    finished.add(row["run"])


def learned_weights(url: str, methods: Iterable[Told]) -> dict[str, list[float]]:
    """Weights of the groups, in the order of the model, by the names that methods have for them."""
    store = FeatureStore.open(url)
    names = {method["weights"] for method in methods if method["weights"] is not None}
    return {name: read_weights(store, name).tolist() for name in sorted(names)}


def cost_of(url: str) -> dict[str, float]:
    """What features cost: bytes of a train example, and milliseconds of computing it, and a query, on one core."""
    store = FeatureStore.open(url)
    found = {"bytes": float(store.open_set("train").info.row_bytes)}
    for name in ("train", "eval"):
        feature_set = store.open_set(name)
        seconds = sum(float(facts["seconds"]) for facts in feature_set.log.facts().values())
        found[f"{name}_milliseconds"] = 1000 * seconds / feature_set.info.num_examples
    return found


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
    study = tomllib.loads((folder / "study.toml").read_text(encoding="utf-8"))
    found = (folder / study.get("modules", ".")).resolve()
    modules = os.pathsep.join([str(found), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [program, *words], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": modules}, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def page(folder: Path, study: Told, found: Mapping[str, Mapping[str, Told]]) -> Iterator[str]:
    """Lines of markdown: the tables, with what they were made by."""
    yield f"Seed {study['seed']}. 95 % intervals; LDS, AUC and precision times 100. Measured: {'; '.join(when(found))}."
    for table in study["tables"]:
        yield from ("", f"### {table['name']}", "")
        if table.get("shows") == "similarity":
            yield from similarities(table, found)
            continue
        if table["measure"] == COST:
            yield from costs(table, found)
            continue
        yield from ("| | w/o w | w | difference |", "|---|---|---|---|")
        firsts: dict[str, Told] = {}
        for row in table["rows"]:
            if (told := found.get(row["run"], {}).get(table["measure"])) is None:
                yield f"| {row['label']} | not measured | | |"
                continue
            firsts.setdefault(read_spec(folder / row["run"]).run.store, {**row, "told": told})
            yield from rows_of(row, told, table.get("of"))
        for row in firsts.values():
            of = f"{row['label'].partition(',')[0]}, " if len(firsts) > 1 else ""
            yield from baselines_of(of, row["told"], table.get("of"))
    if findings := study.get("findings"):
        yield from ("", findings.strip())


def when(found: Mapping[str, Mapping[str, Told]]) -> Iterator[str]:
    """When and by what runs were measured; of several times also which."""
    runs: dict[str, list[str]] = {}
    for name, measures in found.items():
        for told in measures.values():
            made_by = told["made"]
            line = f"{made_by['date']}, commit {made_by['commit']}, {made_by['machine']}"
            runs.setdefault(line, []).append(name.removesuffix(".toml"))
    for line, names in runs.items():
        yield line if len(runs) == 1 else f"{line} ({', '.join(dict.fromkeys(names))})"


def rows_of(row: Told, told: Told, of: str | None) -> Iterator[str]:
    """Without and with weights: those that the row names, or that were chosen by other queries where there was a choice."""
    chosen = told.get("chosen")
    if chosen is not None and "weights" not in row:
        without, weighted = chosen["methods"]
        if of is not None:
            # What was chosen is told by LDS alone.
            measures = {(method["kernel"], method["method"]): method["measures"][of] for method in told["methods"]}
            without, weighted = (measures[method["kernel"], method["method"]] for method in chosen["methods"])
        yield line(row["label"], without, weighted, weighted["difference"], factor_of(told))
        return
    for kernel in dict.fromkeys(method["kernel"] for method in told["methods"] if method["kernel"]):
        methods = [method for method in told["methods"] if method["kernel"] == kernel]
        measure = of or next(iter(methods[0]["measures"]))
        without = methods[0]["measures"][measure]
        for method in methods[1:]:
            if row.get("weights", method["weights"]) == method["weights"]:
                weighted = method["measures"][measure]
                yield line(row["label"], without, weighted, weighted["difference"], factor_of(told))


def baselines_of(label: str, told: Told, of: str | None) -> Iterator[str]:
    """What stands beside."""
    for row in told["methods"]:
        measure = of or next(iter(row["measures"]))
        if row["kernel"] is None and measure in row["measures"]:
            yield f"| {label}{row['method']} | {interval(row['measures'][measure], factor_of(told))} | | |"


def costs(table: Told, found: Mapping[str, Mapping[str, Told]]) -> Iterator[str]:
    """What features cost."""
    yield from ("| | bytes an example | ms an example | ms a query |", "|---|---|---|---|")
    for row in table["rows"]:
        told = found.get(row["run"], {}).get(COST)
        cells = ["not measured", "", ""]
        if told is not None:
            cells = [f"{told['bytes']:,.0f}", *(f"{told[f'{name}_milliseconds']:.1f}" for name in ("train", "eval"))]
        yield f"| {row['label']} | {' | '.join(cells)} |"


def similarities(table: Told, found: Mapping[str, Mapping[str, Told]]) -> Iterator[str]:
    """Cosines of what settings say of the groups of one network: LDS of each group alone, and learned weights."""
    of_settings: dict[str, tuple[list[float], list[float]]] = {}
    for row in table["rows"]:
        told = found.get(row["run"], {}).get(table["measure"])
        if told is None:
            yield f"{row['label']}: not measured."
            return
        weights = next(method["weights"] for method in told["methods"] if method["weights"] is not None)
        of_settings[row["label"]] = ([group["mean"] for group in told["groups"]], told["weights"][weights])
    yield from ("| | LDS of groups | weights |", "|---|---|---|")
    cosines = {
        f"{one} / {other}": [cosine(*both) for both in zip(of_settings[one], of_settings[other], strict=True)]
        for one, other in combinations(of_settings, 2)
    }
    for pair, values in [*cosines.items(), ("mean", np.mean([*cosines.values()], 0))]:
        yield f"| {pair} | {' | '.join(f'{value:.3f}' for value in values)} |"


def cosine(one: list[float], other: list[float]) -> float:
    """Of two vectors."""
    return float(np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))


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


def write_values(folder: Path, study: Told, only: str) -> None:
    """Write what means and intervals are computed of: values of every query by all methods of all runs, and what they come from.

    values.parquet has a row for each store, evaluation, query (or example), group and measure; of LDS also ``ranks``, those that
    the sums of scores give the subsets. outputs.parquet has what retrained models output: name, subset, seed, set, query, output.
    Rows of stores of other runs than those that ``only`` names are left as they are.
    """
    runs = {row["run"] for table in study["tables"] for row in table["rows"] if row["run"].startswith(only)}
    measured: list[pa.Table] = []
    outputs: list[pa.Table] = []
    urls = sorted({read_spec(folder / run).run.store for run in runs})
    for url in urls:
        store = FeatureStore.open(url)
        for artifact in list_artifacts(store.storage):
            names, of = artifact.name.split("/"), {"store": Path(url).name}
            if artifact.kind == "evaluation":
                measured += evaluation_tables(EvaluationArtifact.open(store.storage, *names).read(), names, of)
            elif artifact.kind == "retrained":
                subset, seed = map(int, names[1].split("."))
                table = RetrainedArtifact.open(store.storage, *names).read()
                outputs.append(with_columns(table, {**of, "name": names[0], "subset": subset, "seed": seed}))
    renewed = {Path(url).name for url in urls}
    for file, tables in ((folder / "values.parquet", measured), (folder / "outputs.parquet", outputs)):
        if file.exists():
            before = parquet.read_table(file)
            tables.insert(
                0, before.filter(compute.invert(compute.is_in(before["store"], pa.array([*renewed], pa.string()))))
            )
        if tables:
            parquet.write_table(pa.concat_tables(tables, promote_options="default"), file, **PACKED)


def evaluation_tables(table: pa.Table, names: list[str], of: Mapping[str, str]) -> Iterator[pa.Table]:
    """Values of one evaluation, in single precision; ranks of subsets only of what is reported."""
    row = "query" if "query" in table.column_names else "example"
    is_reported = "group" not in table.column_names and not names[0].endswith(".learn")
    for measure in table.column_names:
        if measure in ("query", "example", "group", "predicted"):
            continue
        found = pa.table(
            {"row": table[row].cast(pa.int64()), "value": table[measure].cast(pa.float64()).cast(pa.float32())}
        )
        if "group" in table.column_names:
            found = found.append_column("group", table["group"])
        if "predicted" in table.column_names and is_reported:
            ranks = rankdata(np.array(table["predicted"].to_pylist()), axis=1)
            found = found.append_column("ranks", pa.array([*ranks.astype(np.float32)], pa.list_(pa.float32())))
        yield with_columns(found, {**of, "evaluation": "/".join(names), "measure": measure})


def with_columns(table: pa.Table, constants: Mapping[str, str | int]) -> pa.Table:
    """A table with columns of one value each before its own."""
    for place, (name, value) in enumerate(constants.items()):
        table = table.add_column(place, name, pa.array([value] * len(table)))
    return table


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
    main(Path(sys.argv[1]), anew="--pages" not in sys.argv, only=next(iter(sys.argv[2:]), "").removeprefix("--pages"))
