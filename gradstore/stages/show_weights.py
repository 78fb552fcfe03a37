"""weights: what weights a store holds, those of single groups or summed along the depth or by function, and how alike they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from gradstore.errors import NotReadyError
from gradstore.stages.weights import open_weights, read_weights
from gradstore.store.artifacts import list_artifacts
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    from rich.table import Table

    from gradstore.store.features import FeatureArray

By = Literal["group", "depth", "function"]

# Characters of the longest bar.
_BAR: Final = 30


def show_weights(store_url: str, names: Sequence[str], by: By) -> dict[str, Any]:
    r"""Plain values: weights by group, or summed over the groups of a depth or a function; and their similarity.

    ``ratio`` is the sum of weights to that of as many groups without weights, 1 / M each. ``similarity`` are the cosines between
    the vectors, in their order:

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


def _made(store: FeatureStore, name: str) -> dict[str, Any]:
    artifact = open_weights(store, name)
    facts = artifact.log.require(0, f"{artifact.folder}: not learned to the end.").facts
    settings = artifact.settings
    return {
        "kernel": settings["kernel"],
        "learner": settings["learner"],
        "transferred_from": settings.get("transferred_from"),
        "facts": dict(facts),
    }


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


def render_weights(found: Mapping[str, Any]) -> list[Table]:
    """Draw weights for a terminal, a table for each, and one of similarities where there are several."""
    from rich.table import Table
    from rich.text import Text

    by, tables = found["by"], []
    for item in found["weights"]:
        table = Table(by, title=Text(f"weights {item['name']} ({item['kernel']})"), title_justify="left")
        for column in ("depth", "function") if by == "group" else ("groups",):
            table.add_column(column, justify="right" if column != "function" else "left")
        table.add_column("weight", justify="right")
        table.add_column("x 1/M", justify="right")
        table.add_column("")
        most = max(row["ratio"] for row in item["rows"])
        for row in item["rows"]:
            between = [str(row["depth"]), row["function"]] if by == "group" else [str(row["groups"])]
            bar = "#" * round(_BAR * row["ratio"] / most)
            table.add_row(Text(str(row[by])), *map(Text, between), f"{row['weight']:.4f}", f"{row['ratio']:.2f}", bar)
        tables.append(table)
    if len(found["weights"]) > 1:
        names = [item["name"] for item in found["weights"]]
        alike = Table("cosine", *names, title="similarity", title_justify="left")
        for name, row in zip(names, found["similarity"], strict=True):
            alike.add_row(name, *(f"{value:.3f}" for value in row))
        tables.append(alike)
    return tables
