"""Garbage: what writers that died left behind, and what no version of a set names any more."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from gradstore.store.backend import ObjectInfo
from gradstore.store.blocks import in_parallel
from gradstore.store.health.check import Health, Orphans
from gradstore.store.health.mend import remove_objects
from gradstore.store.layout import record_path

REASON: Final = "gc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was removed, or would be.

    Attributes
    ----------
    temporary
        Files and uploads that were begun and never finished.
    orphans
        Objects of units that are not committed.
    old_inputs
        Tables of inputs of earlier versions of sets.
    young
        What nothing names either, but may be a living attempt's: it stays.
    """

    temporary: tuple[ObjectInfo, ...]
    orphans: tuple[Orphans, ...]
    old_inputs: tuple[ObjectInfo, ...]
    young: tuple[ObjectInfo, ...]


def collect(health: Health, *, grace_seconds: float, dry_run: bool) -> Collected:
    """Remove what nothing names and is older than ``grace_seconds``; whole units only, each fenced off before.

    An attempt that is at such a unit after all does not commit: it is told that it was superseded, and may begin anew.
    """
    survey = health.survey
    storage, before = survey.storage, time.time() - grace_seconds
    temporary = storage.sweep("", grace_seconds=grace_seconds, dry_run=dry_run)
    old_inputs = [info for info in survey.old_inputs if info.modified <= before]
    young = [info for info in survey.old_inputs if info.modified > before]
    orphans = []
    for each in health.orphans:
        number, log = each.unit.number, each.unit.ledger.log
        # Somebody may have begun to make it again, and not have come to its first object yet.
        changed = _modified(health, each) > before
        if changed or log.newest(number) != each.unit.generation:
            young += each.objects
            continue
        if not dry_run:
            remove_objects(storage, each.unit, REASON, {}, [info.path for info in each.objects])
        orphans.append(each)
    if not dry_run:
        in_parallel(storage.delete, [info.path for info in old_inputs], threads=storage.concurrency)
    return Collected(
        temporary=tuple(temporary), orphans=tuple(orphans), old_inputs=tuple(old_inputs), young=tuple(young)
    )


def _modified(health: Health, orphans: Orphans) -> float:
    """When anything of a unit was last written: an object of it, or the record that took it back."""
    written = [info.modified for info in orphans.objects]
    unit = orphans.unit
    if unit.generation is not None:
        record = health.survey.listing.get(record_path(unit.ledger.log.folder, unit.number, unit.generation))
        written += [] if record is None else [record.modified]
    return max(written)
