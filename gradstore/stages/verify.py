"""verify: whether a store is as it was committed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradstore.errors import DamageError
from gradstore.stages.progress import Progress
from gradstore.store.backend import open_storage
from gradstore.store.health import Health, Problem, check_store

# Problems that a terminal is shown; --json has all.
_MOST_SHOWN: Final = 50


def verify(store_url: str, *, full: bool, progress: Progress) -> dict[str, Any]:
    """Plain values: what is wrong with a store, what of it is missing, and what nothing names.

    Parameters
    ----------
    store_url
        The store.
    full
        Whether every byte is read, or only what one listing tells, the records and the documents.
    progress
        Told of the objects that were looked at.

    Raises
    ------
    NotReadyError
        If there is no store at the URL.
    ContractError
        If a newer gradstore made it.
    """
    started = time.monotonic()
    # The objects themselves, not copies of them.
    health = check_store(open_storage(store_url, copies=False), full=full, watch=progress.stage)
    survey = health.survey
    return {
        "store": survey.storage.url,
        "full": full,
        "objects": len(survey.listing),
        "bytes": sum(info.bytes for info in survey.listing.values()),
        "blocks": count_blocks(health),
        "parts": [row for row in parts_of(health) if row["missing"]],
        "problems": [problem.to_json() for problem in health.problems],
        "orphans": total(health.loose),
        "unknown": total(health.unknown),
        "seconds": time.monotonic() - started,
    }


def count_blocks(health: Health) -> dict[str, int]:
    """How many blocks, of sets and artifacts, are committed and whole, not committed, and broken."""
    states = Counter(
        "broken" if unit.is_broken else "committed" if unit.is_committed else "missing" for unit in health.units
    )
    return {state: states[state] for state in ("committed", "missing", "broken")}


def parts_of(health: Health) -> list[dict[str, Any]]:
    """Of every member of a set and every artifact, how many blocks it has, how many are missing, and who computes them."""
    missing = Counter(unit.ledger.name for unit in health.units if not unit.is_committed)
    return [
        {
            "name": ledger.name,
            "total": ledger.num_units,
            "missing": missing[ledger.name],
            "command": f"gradstore {ledger.log.verb}",
        }
        for ledger in health.survey.ledgers
    ]


def total(infos: Sequence[Any]) -> dict[str, int]:
    """How many objects, and their bytes together."""
    return {"objects": len(infos), "bytes": sum(info.bytes for info in infos)}


def render_problems(problems: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines for a terminal: of each problem its kind, object, what was found, and what to do."""
    lines = [
        f"{problem['path']}: {problem['kind']}: {problem['found']}. {problem['remedy']}"
        for problem in problems[:_MOST_SHOWN]
    ]
    more = len(problems) - _MOST_SHOWN
    return [*lines, f"and {more:,} more; --json names all"] if more > 0 else lines


def render_verify(found: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal."""
    lines = render_problems(found["problems"])
    for row in found["parts"]:
        lines.append(f"{row['name']}: {row['missing']:,} of {row['total']:,} blocks are missing: `{row['command']}`")
    for what, reason in (
        ("orphans", "no record names them: `gradstore gc`"),
        ("unknown", "of no set or artifact that can be read"),
    ):
        if found[what]["objects"]:
            lines.append(f"{found[what]['objects']:,} objects, {found[what]['bytes']:,} bytes: {reason}")
    how = "every byte was read" if found["full"] else "sizes and records; --full reads every byte"
    blocks = found["blocks"]
    lines.append(
        f"{found['objects']:,} objects, {found['bytes']:,} bytes, {blocks['committed']:,} blocks whole, "
        f"{blocks['broken']:,} broken, {blocks['missing']:,} missing; {how}; {found['seconds']:.1f} s"
    )
    return lines


def refuse_damage(store_url: str, problems: Sequence[Mapping[str, Any] | Problem]) -> None:
    """End a command that has told of problems.

    Raises
    ------
    DamageError
        If there are any.
    """
    if problems:
        raise DamageError(f"{store_url}: problems: {len(problems):,}. What to do is said with each.")
