"""gradstore.open, gradstore.open_contributions and gradstore.open_scores: a store's arrays as lazy xarray datasets.

Whatever is heavy (xarray, pyarrow, Zarr) is imported inside the functions, so that `import gradstore` stays cheap.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from gradstore.errors import SpecError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import xarray

    from gradstore.opening.arrays import Snapshot
    from gradstore.store.features import FeatureArray, FeatureSet, FeatureStore

EXAMPLE: Final = "example"

# Columns of the example table that become coordinates, and what stands where no example is committed.
_COORDINATES: Final[Mapping[str, tuple[str, Any]]] = {
    "example_id": ("object", None),
    "source": ("object", None),
    "label": ("object", None),
    "valid": ("bool", False),
    "loss": ("float64", float("nan")),
    "tokens": ("float64", float("nan")),
}


def open_features(url: str, feature_set: str = "train", member: str | None = None) -> xarray.Dataset:
    """Open one member's features in a feature set, lazily: values are read when they are asked for.

    A slice of rows or groups reads only the blocks that hold it, with their checksums verified. The dataset can be
    pickled, so that Dask reads it in other processes: ``open(url).chunk({"example": rows})`` with ``rows`` the attribute
    ``block_rows``.

    Parameters
    ----------
    url
        The store: a directory or s3://bucket/prefix.
    feature_set
        Name of the set: train, learn, eval.
    member
        Which member's features; the first by default.

    Returns
    -------
    xarray.Dataset
        One variable per parameter group, under the group's name: float32 [example, feature:<group>] in true scale,
        whatever the stored type; NaN in rows that are not valid, erased, or not committed when the set was opened.
        Coordinates of ``example`` are ``row`` and, from the example table, example_id, source and label (missing where
        null or unknown), valid, loss, and tokens (float64, NaN where unknown). Attributes: ``contract``, ``set``, ``member``, ``block_rows``, and
        ``snapshot``, the (block, generation) pairs that are read. A group of the name of a dimension or coordinate is
        ``group:<name>``.

    Raises
    ------
    SpecError
        If xarray is not installed.
    NotReadyError
        If there is no store at the URL, no such set in it, or no such member.
    """
    _require_xarray("gradstore.open")
    import xarray

    from gradstore.store.features import FeatureStore

    store = FeatureStore.open(url)
    opened = store.open_set(feature_set, member)
    info = opened.info
    committed = _committed(opened)
    snapshot = _snapshot(store.storage.url, (info.name, opened.member), committed)
    coordinates = _coordinates(opened, committed)
    names = variable_names([array.name for array in info.arrays], {EXAMPLE, "row", *_COORDINATES})
    return xarray.Dataset(
        {names[array.name]: _group_variable(opened, array, snapshot) for array in info.arrays},
        coords={name: (EXAMPLE, values) for name, values in coordinates.items()},
        attrs={
            "contract": dict(store.contract),
            "set": info.name,
            "member": opened.member,
            "block_rows": info.block_rows,
            "snapshot": [list(pair) for pair in snapshot.generations],
        },
    )


def open_contributions(url: str, kernel: str, feature_set: str = "eval") -> xarray.Dataset:
    """Open the contributions C[q, n, j] of a set of queries, lazily as `open_features` does.

    Parameters
    ----------
    url
        The store.
    kernel
        Name of the kernel: that of its run's ``kernel.name``.
    feature_set
        The queries: learn or eval.

    Returns
    -------
    xarray.Dataset
        The variable ``contributions``, float32 [query, example, group] in true scale, NaN in examples that are not valid
        or not committed, zero in queries that are not valid. ``group`` has the groups' names; ``example`` the
        coordinates of the train set, and ``query`` the same of the queries, as query_row, query_example_id and so on.
        Attributes: ``contract``, ``kernel``, ``set``, ``block_rows``, ``query_tile``, ``settings`` (what C was made from)
        and ``snapshot``.

    Raises
    ------
    SpecError
        If xarray is not installed.
    NotReadyError
        If there is no store at the URL, or no such contributions in it.
    """
    _require_xarray("gradstore.open_contributions")
    import xarray

    from gradstore.opening.arrays import ContributionChunks, LazyArray
    from gradstore.store.artifacts import ContributionArtifact
    from gradstore.store.features import FeatureStore

    store = FeatureStore.open(url)
    artifact = ContributionArtifact.open(store.storage, kernel, feature_set)
    shape = artifact.shape
    snapshot = _snapshot(store.storage.url, (kernel, feature_set), artifact.log.pin())
    lazy = LazyArray(
        ContributionChunks(snapshot=snapshot),
        (shape.queries, shape.rows, len(shape.groups)),
        (shape.query_tile, shape.block_rows, len(shape.groups)),
    )
    return xarray.Dataset(
        {"contributions": _variable(("query", EXAMPLE, "group"), lazy, {})},
        coords={**_of_both(store, feature_set, (shape.queries, shape.rows)), "group": list(shape.groups)},
        attrs={
            "contract": dict(store.contract),
            "kernel": kernel,
            "set": feature_set,
            "block_rows": shape.block_rows,
            "query_tile": shape.query_tile,
            "settings": {name: value for name, value in artifact.settings.items() if name != "shape"},
            "snapshot": [list(pair) for pair in snapshot.generations],
        },
    )


def open_scores(url: str, name: str, feature_set: str = "eval") -> xarray.Dataset:
    """Open the scores S[q, n] of a set of queries under one weighting, lazily as `open_features` does.

    Parameters
    ----------
    url
        The store.
    name
        Names of the kernel and the weights with a dot between: ``block.learned``, or ``block.unweighted``.
    feature_set
        The queries.

    Returns
    -------
    xarray.Dataset
        The variable ``scores``, float32 [query, example], with NaN, coordinates and attributes as in `open_contributions`.
        Where the attribute ``settings`` has the transform ``square`` (DAS), scores are the squares of what is stored.

    Raises
    ------
    SpecError
        If xarray is not installed.
    NotReadyError
        If there is no store at the URL, or no such scores in it: `score.matrices` makes them.
    """
    _require_xarray("gradstore.open_scores")
    import xarray

    from gradstore.opening.arrays import LazyArray, ScoreChunks
    from gradstore.store.artifacts import ScoreMatrixArtifact
    from gradstore.store.features import FeatureStore

    store = FeatureStore.open(url)
    artifact = ScoreMatrixArtifact.open(store.storage, name, feature_set)
    shape = artifact.shape
    snapshot = _snapshot(store.storage.url, (name, feature_set), artifact.log.pin())
    lazy = LazyArray(ScoreChunks(snapshot=snapshot), (shape.queries, shape.rows), (shape.queries, shape.block_rows))
    return xarray.Dataset(
        {"scores": _variable(("query", EXAMPLE), lazy, {})},
        coords=_of_both(store, feature_set, (shape.queries, shape.rows)),
        attrs={
            "contract": dict(store.contract),
            "name": name,
            "set": feature_set,
            "block_rows": shape.block_rows,
            "settings": {key: value for key, value in artifact.settings.items() if key != "shape"},
            "snapshot": [list(pair) for pair in snapshot.generations],
        },
    )


def variable_names(groups: Sequence[str], reserved: Container[str]) -> dict[str, str]:
    """Return a name for every group among others: its own, or ``group:<name>`` where that is reserved."""
    taken = set(groups)
    names = {}
    for group in groups:
        name = group
        while name in reserved or (name != group and name in taken):
            name = f"group:{name}"
        names[group] = name
    return names


def _require_xarray(what: str) -> None:
    if find_spec("xarray") is None:
        raise SpecError(f"{what} needs xarray, which is not installed: pip install 'gradstore[xarray]'.")


def _snapshot(url: str, names: tuple[str, str], generations: Mapping[int, int]) -> Snapshot:
    from gradstore.opening.arrays import Snapshot

    return Snapshot(url=url, names=names, generations=tuple(generations.items()), opening=uuid4().hex)


def _group_variable(opened: FeatureSet, array: FeatureArray, snapshot: Snapshot) -> xarray.Variable:
    from gradstore.opening.arrays import GroupChunks, LazyArray

    info = opened.info
    lazy = LazyArray(
        GroupChunks(snapshot=snapshot, group=array.name, features=array.features),
        (info.rows, array.features),
        (info.block_rows, array.features),
    )
    attributes: dict[str, Any] = {"group": array.name, "depth": array.depth, "function": array.function}
    if array.parts:
        attributes["parts"] = [asdict(part) for part in array.parts]
    return _variable((EXAMPLE, f"feature:{array.name}"), lazy, attributes)


def _variable(dims: Sequence[str], lazy: Any, attributes: Mapping[str, Any]) -> xarray.Variable:
    import xarray
    from xarray.core import indexing

    return xarray.Variable(dims, indexing.LazilyIndexedArray(lazy), dict(attributes))


def _committed(opened: FeatureSet) -> dict[int, int]:
    """Generation of every committed block, without those of an append that began since the set was opened."""
    return {block: now for block, now in opened.log.pin().items() if block < opened.info.num_blocks}


def _of_both(store: FeatureStore, feature_set: str, size: tuple[int, int]) -> dict[str, tuple[str, np.ndarray]]:
    """Coordinates of so many queries of a set and rows of the train set: of one that grew since, what was made has the first."""
    train, queries = store.open_set("train"), store.open_set(feature_set)
    asked, rows = _coordinates(queries, _committed(queries)), _coordinates(train, _committed(train))
    return {
        **{name: (EXAMPLE, values[: size[1]]) for name, values in rows.items()},
        **{f"query_{name}": ("query", values[: size[0]]) for name, values in asked.items()},
    }


def _coordinates(opened: FeatureSet, blocks: Iterable[int]) -> dict[str, np.ndarray]:
    """Return the coordinates of the rows of a set; where a block is not given, what `_COORDINATES` says."""
    import numpy as np

    from gradstore.store.blocks import in_parallel

    rows = opened.info.rows
    columns = {name: np.full(rows, empty, kind) for name, (kind, empty) in _COORDINATES.items()}

    def read(block: int) -> pa.Table:
        return opened.read_examples(["row", *columns], block=block)

    for table in in_parallel(read, blocks, threads=opened.storage.concurrency):
        places = table["row"].to_numpy()
        for name, values in columns.items():
            # Of texts, to_numpy would give NaN for null.
            values[places] = table[name].to_pylist() if values.dtype == object else table[name].to_numpy()
    return {"row": np.arange(rows), **columns}
