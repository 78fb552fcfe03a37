"""The units of a ledger: what their newest records say, and whether every object that these name is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from gradstore.errors import IntegrityError, ObjectMissingError
from gradstore.store.backend import Storage
from gradstore.store.blocks import ObjectEntry, in_parallel
from gradstore.store.codecs import decode_document
from gradstore.store.commits import Record, is_commit
from gradstore.store.features.erasure import REASON, is_unfinished
from gradstore.store.health.ledger import Ledger
from gradstore.store.health.objects import Fault, Objects
from gradstore.store.health.problems import Kind, Problem
from gradstore.store.health.survey import Survey
from gradstore.store.layout import ArrayLayout, record_path

Advance = Callable[[int], None]
T = TypeVar("T")

# Objects whose records are in memory at once, at about 300 bytes each.
_AT_ONCE: Final = 16_384
# Facts of a block that are kept while a store is looked at.
_KEPT_FACTS: Final = ("rows", "nan_rows", "saturated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One unit of a ledger, as it was found.

    Attributes
    ----------
    ledger, number
        Which.
    generation
        The highest that is listed; None if it has no record.
    is_held
        Whether its objects stay though it is not committed: an erasure that was not finished goes on from them, or somebody
        is at work on it.
    facts
        Numbers of its record.
    problems
        What is wrong with it.
    """

    ledger: Ledger
    number: int
    generation: int | None
    is_held: bool = False
    facts: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def is_broken(self) -> bool:
        """Whether repair must take it back: unfinished erasures are others' to finish."""
        return any(problem.kind != "unfinished erasure" for problem in self.problems)

    @property
    def is_committed(self) -> bool:
        """Whether its highest generation is a commit, whatever its objects are."""
        return self.generation is not None and is_commit(self.generation)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """An object of a unit that is to be looked at; ``fault`` is what its listing says already."""

    path: str
    entry: ObjectEntry | None
    layout: ArrayLayout | None
    fault: Fault | None


def check_units(survey: Survey, ledger: Ledger, objects: Objects, *, full: bool, advance: Advance) -> Iterator[Unit]:
    """Look at every unit of a ledger: its newest record, and the objects that it names; ``advance`` counts these.

    Sizes are those of the listing. Every byte of every object is read if ``full``; else only those are read that the
    listing lacks, or has with another size, because writers may have been at work since.
    """
    listed = survey.generations(ledger)
    width = max(1, len(ledger.objects_of(0)) if ledger.num_units else 1)
    for numbers in _batches(range(ledger.num_units), max(1, _AT_ONCE // width)):
        found = in_parallel(
            lambda number: _read(survey, ledger, number, listed.get(number, [])),
            numbers,
            threads=survey.storage.concurrency,
        )
        targets = [_targets(ledger, unit, record, objects) for unit, record in found]
        chosen = [target for each in targets for target in each if full or target.fault]
        faults = dict(zip([target.path for target in chosen], _look(survey, chosen, objects, advance), strict=True))
        for (unit, _), each in zip(found, targets, strict=True):
            if not full:
                advance(len(each))
            broken = {target.path: fault for target in each if (fault := faults.get(target.path)) is not None}
            if broken and ledger.log.newest(unit.number) != unit.generation:
                # Written anew, or taken back, since it was listed.
                now = ledger.log.newest(unit.number)
                yield Unit(ledger=ledger, number=unit.number, generation=now, is_held=True)
            else:
                yield _judged(survey, unit, broken)


def _look(survey: Survey, targets: Sequence[_Target], objects: Objects, advance: Advance) -> list[Fault | None]:
    def look(target: _Target) -> Fault | None:
        return objects.by_bytes(target.path, target.entry, target.layout)

    found: list[Fault | None] = []
    # A few for each request in flight, so that progress is told.
    for batch in _batches(targets, 16 * survey.storage.concurrency):
        found += in_parallel(look, batch, threads=survey.storage.concurrency)
        advance(len(batch))
    return found


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _read(survey: Survey, ledger: Ledger, number: int, generations: Sequence[int]) -> tuple[Unit, Record | None]:
    """Read the newest record of a unit; the record is None if there is none, or it says nothing that can be trusted."""
    erased, remedy = ledger.erased_of(number), _remedy(survey.storage, ledger)
    if not generations:
        problems = _unfinished(ledger, number, None, erased)
        return Unit(ledger=ledger, number=number, generation=None, problems=problems), None
    newest = generations[-1]
    lost = _lost_generation(generations)
    if lost is not None:
        path = record_path(ledger.log.folder, number, lost)
        problem = Problem(kind="missing record", path=path, found="is missing, and later ones are there", remedy=remedy)
        return Unit(ledger=ledger, number=number, generation=newest, problems=(problem,)), None
    try:
        record = _trusted(survey.storage, ledger, number, newest)
        of = None if isinstance(record, Problem) else _goes_on_from(record)
        if of is not None and isinstance(found := _trusted(survey.storage, ledger, number, of), Problem):
            record = found
    except ObjectMissingError:
        # Its artifact was pruned since it was listed.
        return Unit(ledger=ledger, number=number, generation=None), None
    if isinstance(record, Problem):
        return Unit(ledger=ledger, number=number, generation=newest, problems=(record,)), None
    unit = Unit(
        ledger=ledger,
        number=number,
        generation=newest,
        is_held=of is not None,
        facts={key: record.facts[key] for key in _KEPT_FACTS if key in record.facts},
        problems=_unfinished(ledger, number, record, erased),
    )
    return unit, record


def _goes_on_from(record: Record) -> int | None:
    """Generation of the commit whose objects an erasure that was not finished goes on from, or None."""
    is_erasure = not is_commit(record.generation) and record.facts["reason"] == REASON
    of: int | None = record.facts.get("of") if is_erasure else None
    return of


def _trusted(storage: Storage, ledger: Ledger, number: int, generation: int) -> Record | Problem:
    """Return a record, or what is wrong with it."""
    path, remedy = record_path(ledger.log.folder, number, generation), _remedy(storage, ledger)
    try:
        record = ledger.log.record(number, generation)
    except IntegrityError as error:
        found = str(error).removeprefix(f"{storage.url}/{path}: ").removesuffix(ledger.log.remedy()).strip(" .")
        kind = _kind_of_damage(storage, path, number, generation)
        return Problem(kind=kind, path=path, found=found, remedy=remedy)
    said = _contradiction(ledger, record)
    return record if said is None else Problem(kind="damaged record", path=path, found=said, remedy=remedy)


def _contradiction(ledger: Ledger, record: Record) -> str | None:
    """What a record says that its name or its ledger does not allow."""
    if (record.state == "committed") != is_commit(record.generation):
        return f"says that the unit is {record.state}, which generation {record.generation} is not"
    if is_commit(record.generation):
        lacking = sorted(ledger.objects_of(record.unit).keys() - record.objects.keys())
        if lacking:
            return f"does not name {lacking[0]}, which is of the unit"
    elif "reason" not in record.facts:
        return "does not say why the unit is taken back"
    return None


def _lost_generation(generations: Sequence[int]) -> int | None:
    """Return a generation that must have a record, since later ones do; None if there is no such."""
    # After one that takes back, the next commit may be missing: one that was fenced off. See `CommitLog.newest`.
    newest = -1
    for generation in generations:
        if generation - newest > (1 if is_commit(newest) else 2):
            return newest + 1 if is_commit(newest) else newest + 2
        newest = generation
    return None


def _kind_of_damage(storage: Storage, path: str, number: int, generation: int) -> Kind:
    try:
        value = decode_document(storage.read(path), path, "")
    except (IntegrityError, ObjectMissingError):
        return "damaged record"
    return (
        "damaged record"
        if (value.get("unit"), value.get("generation")) == (number, generation)
        else ("record of another unit")
    )


def _unfinished(ledger: Ledger, number: int, record: Record | None, erased: Sequence[int]) -> tuple[Problem, ...]:
    if not erased or (record is not None and not is_unfinished(record, erased)):
        return ()
    path = record_path(ledger.log.folder, number, 0 if record is None else record.generation)
    found = f"rows {', '.join(map(str, erased))} of block {number} are erased, and the block does not say so yet"
    remedy = "Run `gradstore featurize`, or `gradstore delete` of the same examples, again: both finish it."
    return (Problem(kind="unfinished erasure", path=path, found=found, remedy=remedy),)


def _targets(ledger: Ledger, unit: Unit, record: Record | None, objects: Objects) -> list[_Target]:
    if record is None:
        return []
    layouts = ledger.objects_of(unit.number)
    named: Mapping[str, ObjectEntry | None] = record.objects
    if unit.is_held:
        named = dict.fromkeys(layouts)
    return [
        _Target(
            path=f"{ledger.folder}/{path}",
            entry=entry,
            layout=layouts.get(path),
            fault=objects.by_size(f"{ledger.folder}/{path}", entry),
        )
        for path, entry in named.items()
    ]


def _judged(survey: Survey, unit: Unit, broken: Mapping[str, Fault]) -> Unit:
    remedy = _remedy(survey.storage, unit.ledger)
    problems = [Problem(kind=fault.kind, path=path, found=fault.found, remedy=remedy) for path, fault in broken.items()]
    return replace(unit, problems=(*unit.problems, *problems))


def _remedy(storage: Storage, ledger: Ledger) -> str:
    return f"Run `gradstore repair {storage.url}`, then `gradstore {ledger.log.verb}`: it makes this part anew."
