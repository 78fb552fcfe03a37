"""Weights by group, or summed along the depth or by function, and how alike they are: as plain values, or in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from gradstore.errors import NotReadyError, SpecError
from gradstore.stages.output import replacing, require_place
from gradstore.stages.report.data import WeightVector, groups_of
from gradstore.stages.show_weights.picture import Drawing, draw_page, draw_picture
from gradstore.stages.weights import open_weights, read_weights
from gradstore.store.artifacts import WeightsArtifact, list_artifacts
from gradstore.store.features import FeatureArray, FeatureStore

By = Literal["group", "depth", "function"]


def show_weights(store_url: str, names: Sequence[str], by: By) -> dict[str, Any]:
    r"""Plain values: weights by group, or summed over the groups of a depth or a function; and their similarity.

    ``candidates`` are the settings that weights were chosen from by held-out queries, with ``gain``, by what factor each raises
    their top scores beside uniform weights. ``ratio`` is the sum of weights to that of as many groups without weights, 1 / M each. ``similarity`` are the cosines between
    the vectors, in their order (arXiv 2506.05647, figure 6):

    .. math:: \cos(w, w') = \frac{\langle w, w' \rangle}{\lVert w \rVert \lVert w' \rVert}

    Parameters
    ----------
    store_url
        The store.
    names
        Which weights; all that are learned, if there is no name.
    by
        What is one row.

    Raises
    ------
    NotReadyError
        If there are none, or they have not been learned.
    ContractError
        If they are of other groups than the store's.
    """
    store = FeatureStore.open(store_url)
    names = names or [
        artifact.name
        for artifact in list_artifacts(store.storage)
        if artifact.kind == "weights" and artifact.committed == artifact.total
    ]
    if not names:
        raise NotReadyError(f"{store.storage.url}: holds no weights. Run `gradstore learn`, or `gradstore transfer`.")
    arrays = store.open_set("train").info.arrays
    vectors = np.stack([read_weights(store, name) for name in names])
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return {
        "store": store.storage.url,
        "by": by,
        "weights": [
            {"name": name, **_made(store, name), "rows": _rows(arrays, vector, by)}
            for name, vector in zip(names, vectors, strict=True)
        ],
        "similarity": (units @ units.T).tolist(),
    }


def write_weights(store_url: str, names: Sequence[str], by: By, output: Path, *, force: bool = False) -> dict[str, Any]:
    """Write what `show_weights` finds to a file, and return it.

    A .json file holds just that, a .parquet file its rows with the names of weights and kernel beside. An .svg file is a
    picture of all weights along the depth of the model, with their sums and, of several, their similarity (arXiv 2506.05647,
    figures 1b, 3 and 6); an .html file has the rows as a table too.

    Parameters
    ----------
    store_url, names, by
        See `show_weights`. A picture shows groups and both sums at once, whatever is one row.
    output
        The file.
    force
        Whether a file that is there is replaced.

    Raises
    ------
    SpecError
        If the file cannot be of that name, or is there already.
    StorageError
        If the file cannot be written.
    """
    if output.suffix not in _WRITERS:
        raise SpecError(f"{output}: found {output.suffix or 'no ending'}; accepted: {', '.join(_WRITERS)}.")
    store = FeatureStore.open(store_url)
    require_place(output, store.storage, force=force)
    found = show_weights(store_url, names, by)
    with replacing(output) as temporary:
        _WRITERS[output.suffix](temporary, store, found)
    return found


def _made(store: FeatureStore, name: str) -> dict[str, Any]:
    artifact = open_weights(store, name)
    facts = artifact.log.require(0, f"{artifact.folder}: not learned to the end.").facts
    settings = artifact.settings
    return {
        "kernel": settings["kernel"],
        "learner": settings["learner"],
        "transferred_from": settings.get("transferred_from"),
        "facts": dict(facts),
        "candidates": _candidates(artifact),
    }


def _candidates(artifact: WeightsArtifact) -> list[dict[str, Any]]:
    """Settings of the candidates that these weights were chosen from, and how held-out queries judged each."""
    table = artifact.read_candidates()
    return [] if table is None else table.drop_columns(["weights"]).to_pylist()


def _rows(arrays: Sequence[FeatureArray], weights_M: np.ndarray, by: By) -> list[dict[str, Any]]:
    keys = [{"group": array.name, "depth": array.depth, "function": array.function}[by] for array in arrays]
    places: dict[Any, list[int]] = {}
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return [
        {
            by: key,
            **({"depth": arrays[of[0]].depth, "function": arrays[of[0]].function} if by == "group" else {}),
            "groups": len(of),
            "weight": float(weights_M[of].sum()),
            "ratio": float(weights_M[of].mean() * len(arrays)),
        }
        for key, of in sorted(places.items(), key=lambda item: item[1][0])
    ]


def _write_json(path: Path, _: FeatureStore, found: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _write_parquet(path: Path, _: FeatureStore, found: Mapping[str, Any]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {"name": item["name"], "kernel": item["kernel"], **row} for item in found["weights"] for row in item["rows"]
    ]
    parquet.write_table(pa.Table.from_pylist(rows), path)


def _write_svg(path: Path, store: FeatureStore, found: Mapping[str, Any]) -> None:
    path.write_text(draw_picture(_drawing(store, found)), encoding="utf-8")


def _write_html(path: Path, store: FeatureStore, found: Mapping[str, Any]) -> None:
    path.write_text(draw_page(_drawing(store, found), found), encoding="utf-8")


_WRITERS: Final[Mapping[str, Callable[[Path, FeatureStore, Mapping[str, Any]], None]]] = {
    ".parquet": _write_parquet,
    ".json": _write_json,
    ".svg": _write_svg,
    ".html": _write_html,
}


def _drawing(store: FeatureStore, found: Mapping[str, Any]) -> Drawing:
    return Drawing(
        name=store.run["run"]["name"],
        groups=groups_of(store.open_set("train").info.arrays),
        vectors=[
            WeightVector(name=item["name"], weights=read_weights(store, item["name"]).tolist())
            for item in found["weights"]
        ],
        similarity=found["similarity"],
    )
