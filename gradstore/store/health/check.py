"""A whole store looked at once: what is wrong with it, what is missing of it, and what nothing names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from gradstore.errors import ObjectMissingError
from gradstore.store.backend import ObjectInfo, Storage
from gradstore.store.blocks import in_parallel
from gradstore.store.commits import is_commit
from gradstore.store.features import FeatureSet
from gradstore.store.health.objects import Objects, difference
from gradstore.store.health.problems import Problem
from gradstore.store.health.survey import Survey, take_survey
from gradstore.store.health.units import Advance, Unit, check_units
from gradstore.store.layout import set_path

Watch = Callable[[str, int, str], AbstractContextManager[Advance]]
"""Tells somebody of a stage: its label, how many units it has, and what they are called; yields what advances it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphans:
    """Objects of a unit that is not committed: of an attempt that died, or is at work."""

    unit: Unit
    objects: tuple[ObjectInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What was found of a store.

    Attributes
    ----------
    survey
        Its documents and its listing.
    units
        Every unit of every ledger.
    problems
        All that is wrong: of documents, metadata, inputs, then of units.
    orphans
        Objects of units that are not committed.
    unknown
        Objects that the format does not know, or whose set or artifact has documents that cannot be read.
    """

    survey: Survey
    units: tuple[Unit, ...]
    problems: tuple[Problem, ...]
    orphans: tuple[Orphans, ...]
    unknown: tuple[ObjectInfo, ...]

    @property
    def loose(self) -> list[ObjectInfo]:
        """Every object that nothing names."""
        return [*self.survey.old_inputs, *(info for each in self.orphans for info in each.objects)]


def check_store(storage: Storage, *, full: bool, watch: Watch) -> Health:
    """Look at a store: by one listing and its records and documents, or if ``full`` at every byte.

    Memory: the listing, the records of some thousand objects, and a chunk for every request in flight.

    Raises
    ------
    NotReadyError
        If there is no store.
    ContractError
        If a newer gradstore made it.
    """
    survey = take_survey(storage)
    objects = Objects(storage, survey.listing)
    problems = [*survey.problems, *_check_metadata(survey)]
    units: list[Unit] = []
    total = len(survey.inputs) + sum(_objects_of_commits(survey))
    with watch("verify", total, "objects") as advance:
        for feature_set in survey.sets.values():
            problems += _check_inputs(feature_set, objects, full=full, advance=advance)
        for ledger in survey.ledgers:
            units += check_units(survey, ledger, objects, full=full, advance=advance)
    problems += [problem for unit in units for problem in unit.problems]
    orphans, unknown = _unnamed(survey, units)
    return Health(
        survey=survey, units=tuple(units), problems=tuple(problems), orphans=tuple(orphans), unknown=tuple(unknown)
    )


def _objects_of_commits(survey: Survey) -> Iterator[int]:
    for ledger in survey.ledgers:
        for unit, generations in survey.generations(ledger).items():
            if unit < ledger.num_units and is_commit(generations[-1]):
                yield len(ledger.objects_of(unit))


def _check_metadata(survey: Survey) -> list[Problem]:
    remedy = f"Run `gradstore repair {survey.storage.url}`: it writes it again."

    def check(path: str) -> Problem | None:
        try:
            found = difference(survey.storage.read(path), survey.metadata[path])
        except ObjectMissingError:
            return Problem(kind="missing metadata", path=path, found="is missing", remedy=remedy)
        return None if found is None else Problem(kind="wrong metadata", path=path, found=found, remedy=remedy)

    found = in_parallel(check, survey.metadata, threads=survey.storage.concurrency)
    return [problem for problem in found if problem is not None]


def _check_inputs(feature_set: FeatureSet, objects: Objects, *, full: bool, advance: Advance) -> list[Problem]:
    storage, info, version = feature_set.storage, feature_set.info, feature_set.version

    def check(path: str) -> Problem | None:
        place, entry = f"{info.folder}/{path}", version.inputs[path]
        fault = objects.by_bytes(place, entry, None) if full or objects.by_size(place, entry) else None
        advance(1)
        if fault is None:
            return None
        missing = fault.kind == "missing object"
        return Problem(
            kind="missing inputs" if missing else "damaged inputs",
            path=place,
            found="is missing" if missing else fault.found,
            remedy="Run `gradstore featurize` again: it restores it.",
        )

    found = in_parallel(check, version.inputs, threads=storage.concurrency)
    problems = [problem for problem in found if problem is not None]
    if problems:
        try:
            storage.read(set_path(info.folder, version.number + 1))
        except ObjectMissingError:
            return problems
    # Nothing is wrong, or there is a newer version by now, which names other tables.
    return []


def _unnamed(survey: Survey, units: list[Unit]) -> tuple[list[Orphans], list[ObjectInfo]]:
    """Objects of units that are not committed, and those that are not of the format."""
    orphans = []
    placed = {*survey.known, *(info.path for info in survey.old_inputs)}
    for unit in units:
        folder = unit.ledger.folder
        paths = [f"{folder}/{path}" for path in unit.ledger.objects_of(unit.number)]
        there = [survey.listing[path] for path in paths if path in survey.listing]
        placed.update(info.path for info in there)
        if there and not (unit.is_committed or unit.is_held or unit.is_broken):
            orphans.append(Orphans(unit=unit, objects=tuple(there)))
    return orphans, [info for path, info in survey.listing.items() if path not in placed]
