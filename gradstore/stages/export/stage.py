"""export: features of some groups and rows of a set, written to one file for other tools."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from gradstore.errors import ResourceError, SpecError
from gradstore.plan.sizes import gigabytes
from gradstore.stages.export.files import KINDS, FileKind
from gradstore.stages.export.selection import Chosen, Selection, choose
from gradstore.stages.output import replacing, require_place
from gradstore.stages.progress import Progress
from gradstore.store.features import FeatureStore


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory and disk space that an export may take."""

    memory_bytes: int
    disk_bytes: int

    @classmethod
    def at(cls, folder: Path) -> Self:
        """Return what is free now."""
        return cls(memory_bytes=psutil.virtual_memory().available, disk_bytes=shutil.disk_usage(folder).free)


def export(
    store_url: str, output: Path, selection: Selection, *, force: bool, progress: Progress, room: Room | None = None
) -> dict[str, Any]:
    """Write features to one file, whose suffix says of what kind; return rows, groups, bytes, path and left_out.

    Rows that are not valid have no features: they are left out, and counted in ``left_out``. The file has its name only
    when it is whole.

    Parameters
    ----------
    store_url
        The store.
    output
        The file: .parquet, .npz or .safetensors.
    selection
        Groups and rows.
    force
        Replace a file that is there.
    progress
        Told how far it is.
    room
        Memory and disk space that it may take; by default what is free.

    Raises
    ------
    SpecError
        If the file cannot be of that name, or as `choose` says.
    DataError, NotReadyError
        As `choose` says.
    ResourceError
        If memory or disk space are too small.
    StorageError
        If the file cannot be written, or the store not read.
    """
    kind = _kind(output)
    store = FeatureStore.open(store_url)
    require_place(output, store.storage, force=force)
    chosen = choose(store, selection)
    _require_room(output, kind, chosen, room or Room.at(output.parent))
    feature_set = chosen.feature_set
    about = {
        "contract": dict(store.contract),
        "set": feature_set.info.name,
        "member": feature_set.member,
        "snapshot": chosen.snapshot(),
    }
    total = chosen.num_rows * len(chosen.arrays)
    with (
        replacing(output) as temporary,
        progress.stage(f"export {feature_set.info.name}", total, "rows x groups") as advance,
    ):
        kind.write(temporary, chosen, about, advance)
    if chosen.invalid:
        progress.note(f"left out {chosen.invalid:,} rows that are not valid, {chosen.erased:,} of them erased")
    return {
        "rows": chosen.num_rows,
        "groups": len(chosen.arrays),
        "bytes": output.stat().st_size,
        "path": str(output),
        "left_out": chosen.invalid,
    }


def _kind(output: Path) -> FileKind:
    if output.suffix not in KINDS:
        raise SpecError(f"{output}: found suffix {output.suffix!r}; accepted: {', '.join(KINDS)}.")
    return KINDS[output.suffix]


def _require_room(output: Path, kind: FileKind, chosen: Chosen, room: Room) -> None:
    asked = f"{output}: {chosen.num_rows:,} rows of {len(chosen.arrays):,} groups"
    memory = kind.memory_bytes(chosen)
    if memory > room.memory_bytes:
        raise ResourceError(
            f"{asked} take {gigabytes(memory)} of memory while they are written; {gigabytes(room.memory_bytes)} are "
            f"available. {kind.advice}"
        )
    size = chosen.num_rows * chosen.row_bytes
    if size > room.disk_bytes:
        raise ResourceError(
            f"{asked} take {gigabytes(size)} on the disk; {gigabytes(room.disk_bytes)} are free in {output.parent}. "
            "Choose another place, or fewer groups or rows."
        )
