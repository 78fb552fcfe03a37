"""Mending: broken units are taken back, so that the next run computes them anew; Zarr documents are written again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gradstore.errors import IntegrityError, ObjectMissingError
from gradstore.store.backend import Storage
from gradstore.store.blocks import in_parallel
from gradstore.store.features.erasure import REASON
from gradstore.store.health.check import Health
from gradstore.store.health.objects import Objects
from gradstore.store.health.problems import Problem
from gradstore.store.health.units import Unit

# Problems of a unit that the record which takes it back names.
_MOST_NAMED: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenBack:
    """A broken unit that is to be computed anew, and its objects that were removed."""

    unit: Unit
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """What a repair did, or would do.

    Attributes
    ----------
    taken_back
        Broken units.
    metadata
        Zarr documents that were written again, by path.
    left
        What others must mend.
    """

    taken_back: tuple[TakenBack, ...]
    metadata: tuple[str, ...]
    left: tuple[Problem, ...]


def mend(health: Health, *, dry_run: bool) -> Mended:
    """Take back every broken unit and write missing and wrong Zarr documents again.

    Of a unit that is taken back, those objects go that are not what its record says: all where nothing can be trusted. It
    may be killed at any moment, and run again.
    """
    survey = health.survey
    objects = Objects(survey.storage, survey.listing)
    taken_back = []
    for unit in health.units:
        if unit.is_broken and not _has_changed(unit):
            doomed = _doomed(health, unit, objects)
            if not dry_run:
                facts = {"problems": [problem.to_json() for problem in unit.problems[:_MOST_NAMED]]}
                remove_objects(survey.storage, unit, "repair", facts, doomed)
            taken_back.append(TakenBack(unit=unit, removed=tuple(doomed)))
    metadata = [problem.path for problem in health.problems if problem.kind in ("missing metadata", "wrong metadata")]
    if not dry_run:
        # Also where it was missing: who published it meanwhile published the same.
        in_parallel(
            lambda path: survey.storage.replace(path, (survey.metadata[path][-1],)),
            metadata,
            threads=survey.storage.concurrency,
        )
    broken = {id(problem) for item in taken_back for problem in item.unit.problems}
    left = [problem for problem in health.problems if id(problem) not in broken and problem.path not in metadata]
    return Mended(taken_back=tuple(taken_back), metadata=tuple(metadata), left=tuple(left))


def _has_changed(unit: Unit) -> bool:
    """Whether others have taken the unit back, or committed it, since it was looked at."""
    newest = unit.ledger.log.newest(unit.number)
    return newest is not None and newest > (unit.generation or 0)


def remove_objects(storage: Storage, unit: Unit, reason: str, facts: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Take a unit back, then remove objects of it, so that no attempt at it, however late, commits what is gone.

    A unit with erased rows is left as an erasure would leave it: nothing of it is there.
    """
    log = unit.ledger.log
    # Where a record between two others is lost, the first generation that is free is below the highest that is listed.
    while log.take_back(unit.number, reason, facts).generation < (unit.generation or 0):
        pass
    in_parallel(storage.delete, paths, threads=storage.concurrency)
    # Once more: an attempt that began in between may have found objects to be as its own before they went.
    erased = unit.ledger.erased_of(unit.number)
    if erased:
        log.take_back(unit.number, REASON, {"erased": erased, "of": None})
    else:
        log.take_back(unit.number, reason, facts)


def _doomed(health: Health, unit: Unit, objects: Objects) -> list[str]:
    """Objects of a broken unit that are there, and not what its record says."""
    ledger, listing = unit.ledger, health.survey.listing
    layouts = ledger.objects_of(unit.number)
    there = {path: f"{ledger.folder}/{path}" for path in layouts if f"{ledger.folder}/{path}" in listing}
    distrusted = any("record" in problem.kind for problem in unit.problems)
    if distrusted or not unit.is_committed or ledger.erased_of(unit.number):
        return [*there.values()]
    assert unit.generation is not None
    try:
        entries = ledger.log.record(unit.number, unit.generation).objects
    except (IntegrityError, ObjectMissingError):
        return [*there.values()]

    def is_other(path: str) -> bool:
        return objects.by_bytes(there[path], entries[path], layouts[path]) is not None

    other = in_parallel(is_other, there, threads=health.survey.storage.concurrency)
    return [place for place, found in zip(there.values(), other, strict=True) if found]
