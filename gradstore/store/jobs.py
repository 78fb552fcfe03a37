"""Jobs: runs that go on without the command that submitted them, as the store knows them.

A job has attempts at driving it, one after another, of which the newest counts. All that is known of it are documents that
are written once, so that any number of drivers, submitters and readers need no lock:

    jobs/<id>/job.json                     the run, who submitted it, and when
    jobs/<id>/attempts/<g>.json            attempt g: on which cluster, at which priority, after which job
    jobs/<id>/events/<n>.<g>.json          what happened in attempt g, in order; event 0 says that its driver has begun
    jobs/<id>/heartbeats/<n>.<g>.json      that its driver lives, and how far it is; but for the newest, drivers remove them
    jobs/<id>/cancellations/<g>.json       somebody wants attempt g to stop
    jobs/<id>/ends/<g>.json                how attempt g ended
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from gradstore.errors import NotReadyError, ObjectMissingError
from gradstore.store.backend import ObjectInfo, Storage
from gradstore.store.blocks import in_parallel
from gradstore.store.codecs import as_written, decode_document, encode_document, require_types
from gradstore.store.layout import parse_record_path, record_path

JOBS_FOLDER: Final = "jobs"
_JOB: Final = "job.json"
_OBJECT: Final = re.compile(
    rf"{JOBS_FOLDER}/([^/]+)/(?:job\.json|(?:attempts|cancellations|ends)/\d+\.json|(?:events|heartbeats)/\d+\.\d+\.json)"
)
_NUMBERED: Final = re.compile(r"(\d+)\.json")
_KEPT_HEARTBEATS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job as it was submitted first.

    Attributes
    ----------
    id
        The name of its run and a part of ``run_hash``: the same run in the same store is the same job.
    name
        Of the run.
    run_hash
        Of all of the run but its cluster.
    run
        run.toml as resolved, without its cluster.
    by, at
        Who submitted it, and when by that machine's clock.
    """

    id: str
    name: str
    run_hash: str
    run: Mapping[str, Any]
    by: str
    at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """An attempt at driving a job.

    Attributes
    ----------
    number
        From 1 on. Whoever publishes the next number ends this attempt.
    cluster
        [cluster] of run.toml, where its tasks run.
    priority
        Of its tasks among those of other jobs on one scheduler: higher goes first.
    after
        Job that has to be done before.
    append
        Whether sets may have grown.
    by, at
        Who asked for it, and when by that machine's clock.
    """

    number: int
    cluster: Mapping[str, Any]
    priority: int = 0
    after: str | None = None
    append: bool = False
    by: str
    at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a listing tells of a job: its newest attempt, and how far that is.

    Attributes
    ----------
    id
        Of the job.
    attempt
        Number of its newest attempt; 0 where it has none yet.
    cancelled, ended
        Whether somebody wants that attempt to stop, and whether it says how it ended.
    events
        Numbers of its events; empty before its driver has begun.
    begun
        When its first event was written, by the clock of the storage; None before.
    heartbeat, beaten
        Number of its newest heartbeat, and when that was written; None before the first.
    """

    id: str
    attempt: int = 0
    cancelled: bool = False
    ended: bool = False
    events: tuple[int, ...] = ()
    begun: float | None = None
    heartbeat: int | None = None
    beaten: float | None = None


@dataclass(slots=True)
class _Found:
    """Objects of one job in a listing, by folder and number."""

    attempts: set[int] = field(default_factory=set)
    cancellations: set[int] = field(default_factory=set)
    ends: set[int] = field(default_factory=set)
    events: dict[tuple[int, int], float] = field(default_factory=dict)
    heartbeats: dict[tuple[int, int], float] = field(default_factory=dict)

    def sight(self, job: str) -> Sight:
        attempt = max(self.attempts, default=0)
        events = tuple(sorted(number for number, of in self.events if of == attempt))
        heartbeat = max((number for number, of in self.heartbeats if of == attempt), default=None)
        return Sight(
            id=job,
            attempt=attempt,
            cancelled=attempt in self.cancellations,
            ended=attempt in self.ends,
            events=events,
            begun=self.events.get((0, attempt)),
            heartbeat=heartbeat,
            beaten=None if heartbeat is None else self.heartbeats[heartbeat, attempt],
        )


def is_job_object(path: str) -> bool:
    """Whether an object lies where the documents of jobs do."""
    return _OBJECT.fullmatch(path) is not None


def job_of(path: str) -> str:
    """Return the id of the job to which an object belongs, or a folder ``jobs/<id>``."""
    return path.split("/")[1]


def forget(store_url: str, job: str) -> str:
    """Say what to do about a job whose documents are damaged."""
    return (
        f"Run `gradstore prune {store_url} {JOBS_FOLDER}/{job}`: it forgets the job, and what that has committed stays."
    )


class Jobs:
    """The jobs of one store.

    Parameters
    ----------
    storage
        Where they are; without copies nearby, since what is new is asked for again and again.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def create(self, record: JobRecord) -> bool:
        """Write a job down unless it is there; False if it was."""
        return self._publish(record.id, _JOB, asdict(record))

    def record(self, job: str) -> JobRecord:
        """Return a job as it was submitted first.

        Raises
        ------
        NotReadyError
            If there is none of that id.
        IntegrityError
            If its document is damaged.
        """
        try:
            value = self._read(job, _JOB)
        except ObjectMissingError:
            known = ", ".join(sight.id for sight in self.sights()) or "none"
            raise NotReadyError(
                f"{self.storage.url}/{JOBS_FOLDER}/{job}: there is no such job; found: {known}."
            ) from None
        with as_written(self._where(job, _JOB), self._remedy(job)):
            require_types(value, dict.fromkeys(("id", "name", "run_hash", "by", "at"), (str,)) | {"run": (dict,)})
            return JobRecord(**value)

    def sights(self) -> list[Sight]:
        """Every job, by one listing, in order of their ids."""
        return self._sights(JOBS_FOLDER)

    def sight(self, job: str) -> Sight:
        """One job, by one listing; without attempts if there is no such job."""
        return next(iter(self._sights(f"{JOBS_FOLDER}/{job}")), Sight(id=job))

    def start(self, job: str, attempt: Attempt) -> bool:
        """Publish the next attempt, which ends that before it; False if another's has its number."""
        return self._publish(job, _numbered("attempts", attempt.number), asdict(attempt))

    def attempt(self, job: str, number: int) -> Attempt:
        """Return an attempt.

        Raises
        ------
        ObjectMissingError, IntegrityError
            If there is none of that number, or its document is damaged.
        """
        name = _numbered("attempts", number)
        value = self._read(job, name)
        with as_written(self._where(job, name), self._remedy(job)):
            require_types(value, {"number": (int,), "cluster": (dict,), "priority": (int,), "append": (bool,)})
            return Attempt(**value)

    def has_attempt(self, job: str, number: int) -> bool:
        """Whether an attempt has been published, by one request."""
        return self._exists(job, _numbered("attempts", number))

    def cancel(self, job: str, attempt: int, by: str, at: str) -> bool:
        """Ask an attempt to stop; False if somebody has."""
        return self._publish(job, _numbered("cancellations", attempt), {"by": by, "at": at})

    def is_cancelled(self, job: str, attempt: int) -> bool:
        """Whether somebody wants an attempt to stop, by one request."""
        return self._exists(job, _numbered("cancellations", attempt))

    def add_event(self, job: str, attempt: int, number: int, event: Mapping[str, Any]) -> bool:
        """Publish an event of an attempt; False if one of its number is there."""
        return self._publish(job, record_path("events", number, attempt), event)

    def events(self, job: str) -> list[dict[str, Any]]:
        """Events of all attempts, in order, each with the number of its attempt."""
        found = []
        for info in self.storage.list_objects(f"{JOBS_FOLDER}/{job}/events"):
            numbers = parse_record_path(info.path)
            if numbers is not None:
                found.append((numbers[1], numbers[0]))

        def read(key: tuple[int, int]) -> dict[str, Any]:
            return {**self._read(job, record_path("events", key[1], key[0])), "attempt": key[0]}

        return list(in_parallel(read, sorted(found), threads=self.storage.concurrency))

    def beat(self, job: str, attempt: int, number: int, values: Mapping[str, Any]) -> None:
        """Publish a heartbeat, and remove what its readers need no more."""
        self._publish(job, record_path("heartbeats", number, attempt), values)
        if number >= _KEPT_HEARTBEATS:
            old = record_path("heartbeats", number - _KEPT_HEARTBEATS, attempt)
            self.storage.delete(self._path(job, old))

    def heartbeat(self, sight: Sight) -> dict[str, Any]:
        """Return what the newest heartbeat says; nothing where there is none, or a newer one took its place."""
        if sight.heartbeat is None:
            return {}
        try:
            return self._read(sight.id, record_path("heartbeats", sight.heartbeat, sight.attempt))
        except ObjectMissingError:
            return {}

    def end(self, job: str, attempt: int, values: Mapping[str, Any]) -> bool:
        """Publish how an attempt ended; False if that was said."""
        return self._publish(job, _numbered("ends", attempt), values)

    def ending(self, job: str, attempt: int) -> dict[str, Any]:
        """Return how an attempt ended.

        Raises
        ------
        ObjectMissingError, IntegrityError
            If that was not said, or the document is damaged.
        """
        name = _numbered("ends", attempt)
        value = self._read(job, name)
        with as_written(self._where(job, name), self._remedy(job)):
            require_types(value, {"state": (str,), "exit_code": (int,)})
        return value

    def remove(self, job: str) -> int:
        """Remove all that is known of a job; return how many objects that were. If it dies, removing again goes on."""
        paths = sorted(info.path for info in self.storage.list_objects(f"{JOBS_FOLDER}/{job}"))
        record = self._path(job, _JOB)
        in_parallel(self.storage.delete, [path for path in paths if path != record], threads=self.storage.concurrency)
        # Last, so that what is left of a removal can still be named.
        self.storage.delete(record)
        return len(paths)

    def _sights(self, folder: str) -> list[Sight]:
        found: dict[str, _Found] = defaultdict(_Found)
        for info in self.storage.list_objects(folder):
            if (named := _OBJECT.fullmatch(info.path)) is not None:
                _note(found[named[1]], info)
        return [found[job].sight(job) for job in sorted(found)]

    def _publish(self, job: str, name: str, value: Mapping[str, Any]) -> bool:
        return self.storage.publish(self._path(job, name), encode_document(value).parts)

    def _read(self, job: str, name: str) -> dict[str, Any]:
        return decode_document(self.storage.read(self._path(job, name)), self._where(job, name), self._remedy(job))

    def _exists(self, job: str, name: str) -> bool:
        try:
            self.storage.read(self._path(job, name))
        except ObjectMissingError:
            return False
        return True

    def _path(self, job: str, name: str) -> str:
        return f"{JOBS_FOLDER}/{job}/{name}"

    def _where(self, job: str, name: str) -> str:
        return f"{self.storage.url}/{self._path(job, name)}"

    def _remedy(self, job: str) -> str:
        return forget(self.storage.url, job)


def _numbered(folder: str, number: int) -> str:
    return f"{folder}/{number:06d}.json"


def _note(found: _Found, info: ObjectInfo) -> None:
    folder, _, name = info.path.split("/", 2)[2].rpartition("/")
    if (numbers := parse_record_path(name)) is not None:
        (found.events if folder == "events" else found.heartbeats)[numbers] = info.modified
    elif (number := _NUMBERED.fullmatch(name)) is not None:
        getattr(found, folder).add(int(number[1]))
