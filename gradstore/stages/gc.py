"""gc: remove what writers that died left behind, after a grace time."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any, Final

from gradstore.errors import SpecError
from gradstore.stages.progress import Progress
from gradstore.stages.verify import total
from gradstore.store.backend import open_storage
from gradstore.store.health import check_store, collect

_SECONDS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_grace(text: str) -> float:
    """Seconds of a time such as ``24h``, ``30m``, ``2d`` or ``3600``.

    Raises
    ------
    SpecError
        If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if found is None:
        raise SpecError(f"--grace: found {text!r}; accepted: seconds, or a time such as 30m, 24h or 7d.")
    return float(found[1]) * _SECONDS[found[2]]


def collect_garbage(store_url: str, *, grace: str, dry_run: bool) -> dict[str, Any]:
    """Plain values: what nothing names and was removed, what is too young for that, and what is not gradstore's.

    Parameters
    ----------
    store_url
        The store.
    grace
        How long something stays, as `parse_grace` reads it.
    dry_run
        Whether nothing is removed.

    Raises
    ------
    SpecError
        If ``grace`` is no time.
    NotReadyError
        If there is no store at the URL.
    """
    started, grace_seconds = time.monotonic(), parse_grace(grace)
    health = check_store(open_storage(store_url, copies=False), full=False, watch=Progress(quiet=True).stage)
    found = collect(health, grace_seconds=grace_seconds, dry_run=dry_run)
    return {
        "store": health.survey.storage.url,
        "dry_run": dry_run,
        "grace_seconds": grace_seconds,
        "temporary": total(found.temporary),
        "orphans": total([info for each in found.orphans for info in each.objects]),
        "old_inputs": total(found.old_inputs),
        "fenced": [{"name": each.unit.ledger.name, "block": each.unit.number} for each in found.orphans],
        "young": total(found.young),
        "unknown": total(health.unknown),
        "seconds": time.monotonic() - started,
    }


def render_garbage(found: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal."""
    removed = "would be removed" if found["dry_run"] else "removed"
    rows = (
        ("temporary", f"files and uploads that were never finished: {removed}"),
        ("orphans", f"objects of {len(found['fenced']):,} blocks that are not committed: {removed}"),
        ("old_inputs", f"inputs of earlier versions: {removed}"),
        ("young", f"younger than {found['grace_seconds']:,.0f} s: kept"),
        ("unknown", "not gradstore's: kept"),
    )
    lines = [
        f"{found[key]['objects']:,} ({found[key]['bytes']:,} bytes) {what}"
        for key, what in rows
        if found[key]["objects"]
    ]
    return lines or ["nothing to remove"]
