"""The command: pictures of what a store holds of weights and evaluations."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.errors import NotReadyError, SpecError
from gradstore.stages.output import replacing
from gradstore.stages.plots.figures import Bar, draw_curve, draw_groups, draw_weights
from gradstore.stages.weights import UNWEIGHTED, open_weights, read_weights
from gradstore.store.artifacts import EvaluationArtifact, list_artifacts
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    import pyarrow as pa

_LDS = "lds."
_GROUPS = ".groups"
# Weights of a few runs can be told apart in one picture.
_MOST_LINES = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture: the name of its file, what it shows in a sentence, and the PNG."""

    name: str
    text: str
    png: bytes


def plots(store_url: str, folder: Path) -> list[Path]:
    """Write pictures of what a store holds into a folder: LDS by group, weights, LDS against k and noise; return their files.

    Raises
    ------
    NotReadyError
        If it holds neither weights nor LDS.
    SpecError
        If the folder cannot be, or matplotlib is not installed.
    StorageError
        If a file cannot be written.
    """
    store = FeatureStore.open(store_url)
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"--output: {folder} is no folder. Name another.")
    pictures = [*pictures_of(store)]
    if not pictures:
        raise NotReadyError(
            f"{store_url}: holds neither weights nor LDS to draw. Run `gradstore learn` or `gradstore evaluate lds` first."
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for picture in pictures:
        file = folder / f"{picture.name}.png"
        with replacing(file) as temporary:
            temporary.write_bytes(picture.png)
        files.append(file)
    return files


def pictures_of(store: FeatureStore) -> Iterator[Picture]:
    """Yield the pictures of a store."""
    done = [item for item in list_artifacts(store.storage) if item.committed == item.total]
    weights = sorted(item.name for item in done if item.kind == "weights")
    lds = {item.name for item in done if item.kind == "evaluation" and item.name.startswith(_LDS)}
    yield from _weights(store, weights)
    for name in sorted(lds):
        if name.endswith(_GROUPS) and f"{name.removesuffix(_GROUPS)}.{UNWEIGHTED}" in lds:
            yield _groups(store, name)
    yield from _by_k(store, weights, lds)
    yield from _by_noise(store, weights, lds)


def _weights(store: FeatureStore, names: Sequence[str]) -> Iterator[Picture]:
    groups = [array.name for array in store.open_set("train").info.arrays]
    for first in range(0, len(names), _MOST_LINES):
        some = names[first : first + _MOST_LINES]
        values = {name: read_weights(store, name).tolist() for name in some}
        yield Picture(
            name="weights" if len(names) <= _MOST_LINES else f"weights-{first // _MOST_LINES + 1}",
            text=f"Learned weights of the {len(groups):,} groups in the order of the model: {', '.join(some)}.",
            png=draw_weights(values, groups, title="Learned weights"),
        )


def _groups(store: FeatureStore, name: str) -> Picture:
    """LDS of each group alone; intervals are of the queries, as the page needs no retrained outputs."""
    from gradstore.numerics.metrics import mean_interval

    table, seed = _read(store, name), int(store.run["run"]["seed"])
    functions = {array.name: array.function for array in store.open_set("train").info.arrays}
    by_group: dict[str, list[float]] = {}
    for group, value in zip(table["group"].to_pylist(), table["correlation"].to_pylist(), strict=True):
        by_group.setdefault(group, []).append(value)
    bars = [
        Bar(group=group, function=functions[group], interval=mean_interval(np.nan_to_num(values).tolist(), seed=seed))
        for group, values in by_group.items()
    ]
    whole = _mean(store, f"{name.removesuffix(_GROUPS)}.{UNWEIGHTED}")
    kernel = name.partition("/")[2].removesuffix(_GROUPS)
    return Picture(
        name=f"lds-by-group-{_slug(name.removesuffix(_GROUPS))}",
        text=f"LDS of each parameter group alone under the kernel {kernel}, with intervals of the queries.",
        png=draw_groups(bars, title=f"LDS of each group alone, {kernel}", whole=whole),
    )


def _by_k(store: FeatureStore, names: Sequence[str], lds: set[str]) -> Iterator[Picture]:
    """LDS of the candidates of weights against k, of the queries by which they were judged."""
    for name in names:
        table = open_weights(store, name).read_candidates()
        if table is None or len({*table["k"].to_pylist()}) < 2:
            continue
        kernel = str(open_weights(store, name).settings["kernel"])
        for measure in sorted({item.partition("/")[0] for item in lds}):
            measured = {place: f"{measure}/{kernel}.{name}.{place}" for place in range(len(table))}
            if not {*measured.values(), f"{measure}/{kernel}.{UNWEIGHTED}"} <= lds:
                continue
            series: dict[str, list[tuple[float, float]]] = {}
            for place, row in enumerate(table.to_pylist()):
                label = f"weight decay {row['weight_decay']:g}"
                series.setdefault(label, []).append((row["k"], _mean(store, measured[place])))
            yield Picture(
                name=f"lds-by-k-{_slug(f'{measure}-{name}')}",
                text=f"LDS of the candidates of {name} against k, of the queries {measure.rpartition('.')[2]}.",
                png=draw_curve(
                    series,
                    title=f"LDS against k, {name}",
                    along="k",
                    without=_mean(store, f"{measure}/{kernel}.{UNWEIGHTED}"),
                    logarithmic=True,
                ),
            )


def _by_noise(store: FeatureStore, names: Sequence[str], lds: set[str]) -> Iterator[Picture]:
    """LDS of weights that were learned from noisy contributions, against the noise."""
    learned = {name: open_weights(store, name).settings for name in names}
    for measure in sorted({item.partition("/")[0] for item in lds}):
        for kernel in sorted({str(settings["kernel"]) for settings in learned.values()}):
            points = [
                (float(settings.get("learner", {}).get("noise", 0.0)), _mean(store, f"{measure}/{kernel}.{name}"))
                for name, settings in learned.items()
                if settings["kernel"] == kernel and f"{measure}/{kernel}.{name}" in lds
            ]
            if len({noise for noise, _ in points}) < 2 or f"{measure}/{kernel}.{UNWEIGHTED}" not in lds:
                continue
            yield Picture(
                name=f"lds-by-noise-{_slug(f'{measure}-{kernel}')}",
                text=f"LDS of weights under the kernel {kernel} against the noise that was added to contributions.",
                png=draw_curve(
                    {"learned": points},
                    title=f"LDS against noise, {kernel}",
                    along="noise, in deviations of each group's contributions",
                    without=_mean(store, f"{measure}/{kernel}.{UNWEIGHTED}"),
                    logarithmic=False,
                ),
            )


def _mean(store: FeatureStore, name: str) -> float:
    """Mean LDS of a method; queries of which it says nothing count as 0."""
    values: Any = _read(store, name)["correlation"].to_numpy()
    return float(np.nan_to_num(values).mean())


def _read(store: FeatureStore, name: str) -> pa.Table:
    return EvaluationArtifact.open(store.storage, *name.split("/")).read()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", name)
