"""stat: what a store holds, in bytes, objects, rows and blocks, and whether that is whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gradstore.stages.progress import Progress
from gradstore.stages.verify import count_blocks, total
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureSet
from gradstore.store.health import Health, Unit, check_store
from gradstore.store.jobs import is_job_object
from gradstore.store.layout import METADATA_FILE

if TYPE_CHECKING:
    from rich.console import RenderableType

# What the folders of a feature set that have one folder for each member hold.
_PARTS: Final = {"scales": "scales", "examples": "examples", "statistics": "statistics", "blocks": "records"}

Sizes = dict[tuple[str, str, str], dict[str, int]]
"""Objects and bytes of what belongs together: of a folder, of a member in it or of none, and of a kind."""


def stat(store_url: str) -> dict[str, Any]:
    """Plain values: of every feature set and artifact its objects, bytes, rows and blocks, and its health.

    The health is ``damaged`` where `verify`, without --full, finds a problem; ``incomplete`` where blocks are missing; else
    ``complete``.

    Raises
    ------
    NotReadyError
        If there is no store at the URL.
    """
    health = check_store(open_storage(store_url, copies=False), full=False, watch=Progress(quiet=True).stage)
    survey = health.survey
    sizes = _sizes(health)
    units: dict[str, list[Unit]] = defaultdict(list)
    for unit in health.units:
        units[unit.ledger.name].append(unit)
    sets = [_feature_set(health, item, units, sizes) for _, item in sorted(survey.sets.items())]
    artifacts = [
        {
            "path": folder,
            "kind": artifact.kind,
            **_sum_of(size for (top, _, _), size in sizes.items() if top == folder),
            "blocks": _blocks(units[folder]),
            "saturated": _facts(units[folder], "saturated"),
            "health": _condition(health, f"{folder}/", units[folder]),
        }
        for folder, artifact in sorted(survey.artifacts.items())
    ]
    return {
        "store": survey.storage.url,
        **total([*survey.listing.values()]),
        "feature_sets": sets,
        "artifacts": artifacts,
        "jobs": total([info for path, info in survey.listing.items() if is_job_object(path)]),
        "blocks": count_blocks(health),
        "orphans": total(health.loose),
        "unknown": total(health.unknown),
        "problems": len(health.problems),
        "health": _condition(health, "", health.units),
    }


def _sizes(health: Health) -> Sizes:
    artifacts = health.survey.artifacts
    sizes: Sizes = defaultdict(lambda: {"objects": 0, "bytes": 0})
    for path, info in health.survey.listing.items():
        names = path.split("/")
        if names[0] == "features" and len(names) > 2:
            key = ("/".join(names[:2]), *_place_in_set(names[2:]))
        else:
            folders = ("/".join(names[:depth]) for depth in range(2, len(names)))
            key = (next((folder for folder in folders if folder in artifacts), ""), "", "")
        sizes[key]["objects"] += 1
        sizes[key]["bytes"] += info.bytes
    return sizes


def _place_in_set(names: Sequence[str]) -> tuple[str, str]:
    """Member, or none, and kind of an object of a feature set, by its path there."""
    first, *others = names
    if not others:
        return "", "metadata" if first == METADATA_FILE else "documents"
    if first == "inputs":
        return "", "inputs"
    member, kind = (others[0], _PARTS[first]) if first in _PARTS else (first, "features")
    return (member if member != METADATA_FILE else ""), "metadata" if names[-1] == METADATA_FILE else kind


def _feature_set(
    health: Health, feature_set: FeatureSet, units: Mapping[str, Sequence[Unit]], sizes: Sizes
) -> dict[str, Any]:
    info = feature_set.info
    kinds = {(member, kind): size for (folder, member, kind), size in sizes.items() if folder == info.folder}
    members = {member: units[f"{info.folder}/{member}"] for member in info.members}
    return {
        "name": info.name,
        "version": feature_set.version.number,
        **_sum_of(kinds.values()),
        "rows": {"examples": info.num_examples, "erased": len(info.erased)},
        "groups": len(info.arrays),
        "features": sum(array.features for array in info.arrays),
        "dtype": info.dtype,
        "compression": info.compression,
        "block_rows": info.block_rows,
        "kinds": {kind: size for (member, kind), size in sorted(kinds.items()) if not member},
        "members": [
            {
                "name": member,
                "rows": _rows(found),
                "blocks": _blocks(found),
                "saturated": _facts(found, "saturated"),
                "kinds": {kind: size for (owner, kind), size in sorted(kinds.items()) if owner == member},
            }
            for member, found in members.items()
        ],
        "health": _condition(health, f"{info.folder}/", [unit for found in members.values() for unit in found]),
    }


def _rows(units: Sequence[Unit]) -> dict[str, int]:
    """Rows of the committed blocks of a member: those that are valid, those that the model failed on, those erased."""
    committed = [unit for unit in units if unit.is_committed and not unit.is_broken]
    rows, nan_rows = _facts(committed, "rows"), _facts(committed, "nan_rows")
    erased = sum(len(unit.ledger.erased_of(unit.number)) for unit in committed)
    return {"computed": rows, "valid": rows - nan_rows, "invalid": max(0, nan_rows - erased), "erased": erased}


def _blocks(units: Sequence[Unit]) -> dict[str, int]:
    committed = sum(unit.is_committed for unit in units)
    taken_back = sum(unit.generation is not None and not unit.is_committed for unit in units)
    return {
        "total": len(units),
        "committed": committed,
        "missing": len(units) - committed,
        "taken_back": taken_back,
    }


def _facts(units: Iterable[Unit], key: str) -> int:
    return sum(unit.facts.get(key, 0) for unit in units)


def _sum_of(sizes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found = list(sizes)
    return {key: sum(size[key] for size in found) for key in ("objects", "bytes")}


def _condition(health: Health, folder: str, units: Sequence[Unit]) -> str:
    """Health of what is below a folder."""
    if any(problem.path.startswith(folder) for problem in health.problems):
        return "damaged"
    return "complete" if all(unit.is_committed for unit in units) else "incomplete"


def render_stat(found: Mapping[str, Any]) -> RenderableType:
    """Draw what was found as a table for a terminal."""
    from rich.table import Column, Table

    title = f"{found['store']}: {found['health']}, {found['objects']:,} objects, {found['bytes']:,} bytes"
    table = Table(Column("part", no_wrap=True), title=title, title_justify="left")
    for column in ("bytes", "blocks", "valid rows"):
        table.add_column(column, justify="right")
    for column in ("health", "what"):
        table.add_column(column)
    for row in found["feature_sets"]:
        for member in row["members"]:
            size, rows = _sum_of(member["kinds"].values()), member["rows"]
            what = [row["dtype"], *(f"{rows[key]:,} {key}" for key in ("invalid", "erased") if rows[key])]
            what += [f"{member['saturated']:,} saturated"] if member["saturated"] else []
            place = f"features/{row['name']}/{member['name']}"
            cells = _cells(size, member["blocks"])
            table.add_row(place, *cells, f"{rows['valid']:,}", row["health"], ", ".join(what))
    for row in found["artifacts"]:
        table.add_row(row["path"], *_cells(row, row["blocks"]), "", row["health"], "")
    return table


def _cells(size: Mapping[str, int], blocks: Mapping[str, int]) -> tuple[str, str]:
    return f"{size['bytes']:,}", f"{blocks['committed']:,} of {blocks['total']:,}"
