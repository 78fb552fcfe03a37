"""repair: take back what is broken, so that the next run computes just that anew."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from gradstore.stages.progress import Progress
from gradstore.stages.verify import render_problems
from gradstore.store.backend import open_storage
from gradstore.store.health import TakenBack, check_store, mend


def repair(store_url: str, *, full: bool, dry_run: bool, progress: Progress) -> dict[str, Any]:
    """Plain values: what was wrong with a store, what was taken back and written again, and what is left to others.

    Parameters
    ----------
    store_url
        The store.
    full
        Whether every byte is read to find what is broken.
    dry_run
        Whether nothing is changed.
    progress
        Told of the objects that were looked at.

    Raises
    ------
    NotReadyError
        If there is no store at the URL.
    """
    started = time.monotonic()
    health = check_store(open_storage(store_url, copies=False), full=full, watch=progress.stage)
    mended = mend(health, dry_run=dry_run)
    return {
        "store": health.survey.storage.url,
        "full": full,
        "dry_run": dry_run,
        "problems": [problem.to_json() for problem in health.problems],
        "taken_back": [_plain(item) for item in mended.taken_back],
        "metadata": list(mended.metadata),
        "left": [problem.to_json() for problem in mended.left],
        "commands": list(dict.fromkeys(f"gradstore {item.unit.ledger.log.verb}" for item in mended.taken_back)),
        "seconds": time.monotonic() - started,
    }


def _plain(item: TakenBack) -> dict[str, Any]:
    unit = item.unit
    return {
        "name": unit.ledger.name,
        "block": unit.number,
        "generation": unit.generation,
        "removed": list(item.removed),
        "problems": [problem.to_json() for problem in unit.problems],
    }


def render_repair(found: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal."""
    would = "would be " if found["dry_run"] else ""
    lines = []
    for item in found["taken_back"]:
        first, others = item["problems"][0], len(item["problems"]) - 1
        why = f"{first['path']}: {first['kind']}" + (f" and {others:,} more" if others else "")
        lines.append(f"{item['name']}: block {item['block']} {would}taken back ({why})")
    lines += [f"{path}: {would}written again" for path in found["metadata"]]
    lines += render_problems(found["left"])
    if found["taken_back"]:
        commands = ", ".join(f"`{command}`" for command in found["commands"])
        lines.append(f"blocks to be computed anew: {len(found['taken_back']):,}, by {commands}")
    return lines or ["nothing to repair"]
