"""Commit records: which units of work are done, and what their objects are.

A unit (a block of rows, a bundle of groups, or the whole of a small artifact) is committed by one record that is published
if absent, after every object of the unit. So of any number of workers one commits; a worker that dies leaves objects that
nobody trusts; and no rename and no lock is needed.

Generations of a unit count up. The even ones are commits, the odd ones say that what was committed below them, or was
being written, is taken back: by a repair or an erasure. The highest counts, so a listing of names tells what is committed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, Final, Literal, TypeVar

from gradstore.errors import IntegrityError, NotReadyError, ObjectMissingError, SupersededError
from gradstore.store.backend import Storage
from gradstore.store.blocks import Entries, ObjectEntry, in_parallel, publish_object
from gradstore.store.codecs import Payload, decode_document, encode_document
from gradstore.store.layout import parse_record_path, record_path

T = TypeVar("T")

# Records that a log keeps, at about 300 bytes for each object that they name: 4 MiB with 224 groups.
_KEPT_RECORDS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A commit record.

    Attributes
    ----------
    unit
        The block, bundle, or 0 for an artifact that is one unit.
    generation
        Even for a commit, odd where the unit is taken back; the highest counts.
    state
        ``committed``, or ``missing`` where a repair or an erasure has taken the unit back.
    attempt
        Names the attempt that wrote the record.
    objects
        Every object of the unit, by its path inside the set or artifact; none where it is taken back.
    facts
        What the writer found: rows, NaN rows, saturated values, seconds, versions; or why the unit is taken back.
    """

    unit: int
    generation: int
    state: Literal["committed", "missing"]
    attempt: str
    objects: Mapping[str, ObjectEntry]
    facts: Mapping[str, Any]


def is_commit(generation: int) -> bool:
    """Whether a record of this generation commits its unit; else it takes it back."""
    return generation % 2 == 0


class CommitLog:
    """The commit records of one feature set or artifact.

    What is there now is asked anew each time by writers (`committed_units`, `missing`, `latest`, `begin`, `commit`). Readers
    (`pin`, `committed`, `require`) get of every unit the generation that they got first, for the life of the log: a snapshot,
    to which units that are committed later are added.

    Parameters
    ----------
    storage
        Where the records are.
    folder
        Their folder.
    verb
        The command of gradstore that commits units here, for messages.
    """

    def __init__(self, storage: Storage, folder: str, verb: str) -> None:
        self.storage = storage
        self.folder = folder
        self.verb = verb
        self._pinned: dict[int, int] = {}
        # A record never changes, so it is read once.
        self._kept = lru_cache(maxsize=_KEPT_RECORDS)(self._read)

    def generations(self) -> dict[int, int]:
        """Highest generation of every unit that has a record, in order: one listing."""
        latest: dict[int, int] = {}
        for info in self.storage.list_objects(self.folder):
            found = parse_record_path(info.path)
            if found is not None:
                latest[found[0]] = max(found[1], latest.get(found[0], 0))
        return dict(sorted(latest.items()))

    def committed_units(self) -> dict[int, int]:
        """Generation of every committed unit, in order."""
        return {unit: generation for unit, generation in self.generations().items() if is_commit(generation)}

    def pin(self) -> dict[int, int]:
        """Generation, for readers, of every committed unit, in order."""
        return {unit: self._pinned.setdefault(unit, now) for unit, now in self.committed_units().items()}

    def committed(self) -> dict[int, Record]:
        """Record, for readers, of every committed unit, in order."""
        keys = self.pin().items()
        records = in_parallel(lambda key: self.record(*key), keys, threads=self.storage.concurrency)
        return {record.unit: record for record in records}

    def facts(self) -> dict[int, Mapping[str, Any]]:
        """Facts, for readers, of every committed unit, in order.

        The objects that records name are let go of one by one: of 39,063 blocks of 224 groups they are 2 GB.
        """
        keys = self.pin().items()
        found = in_parallel(lambda key: (key[0], self.record(*key).facts), keys, threads=self.storage.concurrency)
        return dict(found)

    def missing(self, total: int) -> list[int]:
        """Units below ``total`` that are not committed, in order."""
        committed = self.committed_units()
        return [unit for unit in range(total) if unit not in committed]

    def record(self, unit: int, generation: int) -> Record:
        """Return one record.

        Raises
        ------
        ObjectMissingError
            If there is none.
        IntegrityError
            If it is damaged, or another unit's.
        """
        return self._kept(unit, generation)

    def newest(self, unit: int) -> int | None:
        """Highest generation of a unit, or None if it has no record."""
        newest = -1
        while True:
            # After a generation that takes back the next commit may be missing: one that was fenced off.
            candidates = [newest + 1] if is_commit(newest) else [newest + 1, newest + 2]
            found = next((generation for generation in candidates if self._exists(unit, generation)), None)
            if found is None:
                return None if newest < 0 else newest
            newest = found

    def latest(self, unit: int) -> Record | None:
        """Record of a unit with the highest generation, or None if the unit was never committed nor taken back."""
        generation = self.newest(unit)
        return None if generation is None else self.record(unit, generation)

    def require(self, unit: int, what: str) -> Record:
        """Return the record, for readers, of a committed unit.

        Raises
        ------
        NotReadyError
            If the unit is not committed; ``what`` says what it is and how to make it.
        """
        if unit not in self._pinned:
            generation = self.newest(unit)
            if generation is None or not is_commit(generation):
                raise NotReadyError(what)
            self._pinned.setdefault(unit, generation)
        return self.record(unit, self._pinned[unit])

    def begin(self, unit: int) -> int | None:
        """Generation that an attempt which begins now is to commit; None if the unit is committed.

        The attempt is bound to it: if the unit is taken back while it works, what it made counts for nothing.
        """
        generation = self.newest(unit)
        if generation is None:
            return 0
        return None if is_commit(generation) else generation + 1

    def commit(
        self, unit: int, generation: int, objects: Mapping[str, ObjectEntry], facts: Mapping[str, Any]
    ) -> Record:
        """Commit a unit whose objects are all published, and return the record that counts.

        That is another attempt's if it was faster: its record is as good, since it names the same objects.

        Raises
        ------
        SupersededError
            If the unit was taken back since the attempt began.
        """
        assert is_commit(generation), "only even generations are commits"
        record = Record(
            unit=unit,
            generation=generation,
            state="committed",
            attempt=uuid.uuid4().hex,
            objects=dict(objects),
            facts=facts,
        )
        # Published last: whoever sees it may trust every object that it names (ADR 0003).
        if not self._publish(record):
            # Lost to another attempt, or to an earlier reply of our own that never arrived: the stored one tells.
            record = self.record(unit, generation)
        self.refuse_superseded(record)
        if record.objects != objects:
            # Of two attempts at one generation each found the other's objects wanting, so the record may name what is gone.
            self.take_back(unit, "two attempts wrote different objects")
            raise self._superseded(unit)
        return record

    def take_back(self, unit: int, reason: str, facts: Mapping[str, Any] | None = None) -> Record:
        """Mark a unit missing, whatever attempts are at it now, and return the record that says so.

        Its objects may be removed or replaced afterwards, never before. One that is taken back already is so once more: an
        attempt that began since is fenced off.
        """
        while True:
            with suppress(SupersededError):
                return self.take_back_from(unit, self.newest(unit), reason, facts)

    def take_back_from(
        self, unit: int, newest: int | None, reason: str, facts: Mapping[str, Any] | None = None
    ) -> Record:
        """Mark a unit missing as `take_back` does, of which the newest generation was ``newest`` when it was looked at.

        Raises
        ------
        SupersededError
            If it is another by now: what was read of the unit is not what is there.
        """
        record = Record(
            unit=unit,
            generation=1 if newest is None else newest + (1 if is_commit(newest) else 2),
            state="missing",
            attempt=uuid.uuid4().hex,
            objects={},
            facts={"reason": reason, **(facts or {})},
        )
        if self.newest(unit) != newest:
            raise self._superseded(unit)
        # Whose it is, where the reply to our own was lost, the stored one tells.
        if not self._publish(record) and self.record(unit, record.generation).attempt != record.attempt:
            raise self._superseded(unit)
        return record

    def refuse_overtaken(self, unit: int, generation: int) -> None:
        """Make sure that an attempt may still commit its generation.

        Raises
        ------
        SupersededError
            If its unit was taken back since it began.
        """
        if self._exists(unit, generation + 1):
            # Whoever takes a unit back takes the generation after that of an attempt, so that one name tells.
            raise self._superseded(unit)

    def refuse_outrun(self, unit: int, generation: int) -> None:
        """Make sure that an attempt may still replace objects of its unit: that no record names them, nor will.

        Raises
        ------
        SupersededError
            If its unit was taken back since it began, or another attempt has committed it.
        """
        self.refuse_overtaken(unit, generation)
        if self._exists(unit, generation):
            raise self._superseded(unit)

    def refuse_superseded(self, record: Record) -> None:
        """Make sure that a record still counts.

        Raises
        ------
        SupersededError
            If its unit was taken back after it.
        """
        self.refuse_overtaken(record.unit, record.generation)

    def read(self, record: Record, path: str, read: Callable[[], T]) -> T:
        """Read an object that a record names; where it is not what the record says, look why and try once more.

        Raises
        ------
        SupersededError
            If the unit was taken back since the record was read.
        ObjectMissingError, IntegrityError
            If the object is missing or damaged at the origin too.
        """
        try:
            return read()
        except (ObjectMissingError, IntegrityError):
            self.refuse_superseded(record)
            # A kept copy of an earlier generation, or bytes that were damaged on their way.
            self.storage.forget(path)
            return read()

    def remedy(self) -> str:
        """Say what to do about an object or record of this log that is missing or damaged."""
        return (
            f"Run `gradstore repair {self.storage.url}`, then `gradstore {self.verb}` again: it makes this part anew."
        )

    def _publish(self, record: Record) -> bool:
        path = record_path(self.folder, record.unit, record.generation)
        return self.storage.publish(path, encode_document(asdict(record)).parts)

    def _exists(self, unit: int, generation: int) -> bool:
        try:
            self.record(unit, generation)
        except ObjectMissingError:
            return False
        except IntegrityError:
            # Its name alone counts here; whoever reads it is told what is wrong with it.
            return True
        return True

    def _superseded(self, unit: int) -> SupersededError:
        return SupersededError(
            f"{self.storage.url}/{self.folder}: unit {unit} was taken back by a repair or an erasure, or committed by another "
            "attempt, while it was in use. Run the same command again: it goes on from what is there now."
        )

    def _read(self, unit: int, generation: int) -> Record:
        path = record_path(self.folder, unit, generation)
        where = f"{self.storage.url}/{path}"
        value = decode_document(self.storage.read(path), where, self.remedy())
        try:
            entries = {name: ObjectEntry(**entry) for name, entry in value.pop("objects").items()}
            record = Record(objects=Entries(entries, where, self.remedy()), **value)
        except (KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"{where}: is not a commit record of this version: {error!r}. {self.remedy()}"
            ) from error
        if (record.unit, record.generation) != (unit, generation):
            raise IntegrityError(
                f"{where}: is the record of unit {record.unit}, generation {record.generation}. {self.remedy()}"
            )
        return record


class Attempt:
    """An attempt at a unit: publishes its objects, then commits the generation that it is bound to.

    It keeps objects of other attempts that equal its own. Before it replaces the first that does not, it takes the unit back
    and goes on at the next generation: no other attempt can then commit a record that names what is replaced.

    Parameters
    ----------
    log, unit, generation
        What `CommitLog.begin` said.
    guard
        Raises where the unit is not to be written any more.
    """

    def __init__(
        self, log: CommitLog, unit: int, generation: int, *, guard: Callable[[], object] = lambda: None
    ) -> None:
        self._log = log
        self._unit = unit
        self._generation = generation
        self._guard = guard
        self._fenced = False
        self._fencing = Lock()

    def publish(self, path: str, payload: Payload) -> ObjectEntry:
        """Publish an object of the unit, from any thread; return what is there now.

        Raises
        ------
        SupersededError
            If another attempt's is there and has been committed, or the unit was taken back since this one began.
        """
        return publish_object(self._log.storage, path, payload, adopt=False, before_replacing=self._fence)

    def commit(self, objects: Mapping[str, ObjectEntry], facts: Mapping[str, Any]) -> Record:
        """Commit the unit, as `CommitLog.commit` does."""
        record = self._log.commit(self._unit, self._generation, objects, facts)
        self._guard()
        return record

    def _fence(self) -> None:
        self._guard()
        with self._fencing:
            if not self._fenced:
                newest = self._generation - 1 if self._generation else None
                reason = "objects of another attempt were replaced"
                self._generation = self._log.take_back_from(self._unit, newest, reason).generation + 1
                self._fenced = True
        self._log.refuse_outrun(self._unit, self._generation)
