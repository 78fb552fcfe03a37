"""Units of work, published object by object and committed last; used by feature sets and by every artifact.

A unit (a block of rows, a bundle of groups, or the whole of a small artifact) is committed by one record that is published
if absent, after every object of the unit. So of any number of workers one commits; a worker that dies leaves objects that
nobody trusts and that the next worker keeps if they are sound; and no rename and no lock is needed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from gradstore.errors import IntegrityError, NotReadyError, ObjectMissingError, StorageError
from gradstore.store.backend import Storage
from gradstore.store.codecs import Payload, checksum, decode_chunk, decode_document, encode_document
from gradstore.store.layout import ArrayLayout, metadata_objects, parse_record_path, record_path

T = TypeVar("T")
R = TypeVar("R")

# Publishing again is needed only when another writer removed a damaged object at the same moment.
_ATTEMPTS: Final = 5

# Records that a log keeps, at about 300 bytes for each object that they name: 4 MiB with 224 groups.
_KEPT_RECORDS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectEntry:
    """What a commit record says of an object: its size, and the crc32c of its content as eight hex digits.

    The content of a Zarr chunk is its values without the checksum that the chunk itself ends in.
    """

    bytes: int
    crc32c: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A commit record.

    Attributes
    ----------
    unit
        The block, bundle, or 0 for an artifact that is one unit.
    generation
        0 for the first record of a unit; the highest counts.
    state
        ``committed``, or ``missing`` where a repair or an erasure has taken the unit back.
    attempt
        Names the attempt that wrote the record.
    objects
        Every object of the unit, by its path inside the set or artifact.
    facts
        What the writer found: rows, NaN rows, saturated values, seconds, versions.
    """

    unit: int
    generation: int
    state: Literal["committed", "missing"]
    attempt: str
    objects: Mapping[str, ObjectEntry]
    facts: Mapping[str, Any]


def publish_object(storage: Storage, path: str, payload: Payload) -> ObjectEntry:
    """Publish an object unless a sound one exists, and return what is there now.

    A sound object of another attempt is kept, because a record may name it already; a damaged one is replaced.
    """
    for _ in range(_ATTEMPTS):
        if storage.publish(path, payload.parts):
            return ObjectEntry(bytes=payload.bytes, crc32c=payload.crc32c)
        try:
            existing = storage.read(path)
        except ObjectMissingError:
            continue
        found = payload.inspect(existing)
        if found is not None:
            return ObjectEntry(bytes=len(existing), crc32c=found)
        storage.delete(path)
    raise StorageError(
        f"{storage.url}/{path}: was removed or found damaged {_ATTEMPTS} times while it was being written. "
        "Check the storage, then run the same command again."
    )


def publish_metadata(storage: Storage, arrays: Mapping[str, ArrayLayout]) -> None:
    """Publish the Zarr metadata of arrays, by path, and of the groups above them, where there is none yet."""
    objects = metadata_objects(arrays)
    in_parallel(lambda path: storage.publish(path, (objects[path],)), objects, threads=storage.concurrency)


def claim_document(storage: Storage, path: str, value: Mapping[str, Any], *, remedy: str) -> dict[str, Any]:
    """Publish a document unless there is one, and return the one that is there: of any number of creators, the first's.

    Raises
    ------
    IntegrityError
        If the one that is there is damaged; ``remedy`` says what to do.
    """
    while (found := read_document(storage, path, remedy=remedy)) is None:
        storage.publish(path, encode_document(value).parts)
    return found


def read_document(storage: Storage, path: str, *, remedy: str) -> dict[str, Any] | None:
    """Return a document, or None if there is none.

    Raises
    ------
    IntegrityError
        If it is damaged; ``remedy`` says what to do.
    """
    try:
        return decode_document(storage.read(path), f"{storage.url}/{path}", remedy)
    except ObjectMissingError:
        return None


def read_object(storage: Storage, path: str, entry: ObjectEntry, *, remedy: str) -> bytes:
    """Read a whole object and check it against its entry.

    Raises
    ------
    ObjectMissingError, IntegrityError
        If it is not there, or not what the entry says; ``remedy`` says what to do.
    """
    with _expected(storage, path, remedy):
        data = storage.read(path)
    if len(data) != entry.bytes or checksum(data) != entry.crc32c:
        raise _damaged(storage, path, remedy)
    return data


class Buffers:
    """Byte buffers that reads borrow and give back: fresh memory would cost more than the read itself."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []

    @contextmanager
    def borrow(self, num_bytes: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Lend a buffer of ``num_bytes``; other threads get other buffers."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(num_bytes, np.uint8)
        if buffer.size < num_bytes:
            buffer = np.empty(num_bytes, np.uint8)
        try:
            yield buffer[:num_bytes]
        finally:
            self._free.append(buffer)


def read_chunk(
    storage: Storage, path: str, entry: ObjectEntry, layout: ArrayLayout, buffer: npt.NDArray[np.uint8], *, remedy: str
) -> npt.NDArray[Any]:
    """Read a chunk into ``buffer`` (at least ``layout.chunk_bytes`` long) and return its values as a view of it.

    Raises
    ------
    ObjectMissingError, IntegrityError
        If it is not there, or its size or checksum is not its own or not the record's; ``remedy`` says what to do.
    """
    with _expected(storage, path, remedy):
        size = storage.read_into(path, buffer.data)
    decoded = decode_chunk(buffer[:size], layout)
    if decoded is None or decoded[1] != entry.crc32c:
        raise _damaged(storage, path, remedy)
    return decoded[0]


class CommitLog:
    """The commit records of one feature set or artifact.

    What is there now is asked anew each time by writers (`committed_units`, `missing`, `latest`, `commit`). Readers (`pin`,
    `committed`, `require`) get of every unit the generation that they got first, for the life of the log: a snapshot, to
    which units that are committed later are added.

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

    def committed_units(self) -> dict[int, int]:
        """Generation of every committed unit, in order."""
        latest: dict[int, int] = {}
        for info in self.storage.list_objects(self.folder):
            found = parse_record_path(info.path)
            if found is not None:
                latest[found[0]] = max(found[1], latest.get(found[0], 0))
        # Only a committed unit can be taken back, so a first record is a commit: no need to read it.
        later = [(unit, generation) for unit, generation in latest.items() if generation > 0]
        records = in_parallel(lambda key: self.record(*key), later, threads=self.storage.concurrency)
        taken_back = {record.unit for record in records if record.state == "missing"}
        return {unit: latest[unit] for unit in sorted(latest) if unit not in taken_back}

    def pin(self) -> dict[int, int]:
        """Generation, for readers, of every committed unit, in order."""
        return {unit: self._pinned.setdefault(unit, now) for unit, now in self.committed_units().items()}

    def committed(self) -> dict[int, Record]:
        """Record, for readers, of every committed unit, in order."""
        keys = self.pin().items()
        records = in_parallel(lambda key: self.record(*key), keys, threads=self.storage.concurrency)
        return {record.unit: record for record in records}

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
            If it is damaged.
        """
        return self._kept(unit, generation)

    def latest(self, unit: int) -> Record | None:
        """Record of a unit with the highest generation, or None if the unit was never committed."""
        found = None
        for generation in range(2**31):
            try:
                found = self.record(unit, generation)
            except ObjectMissingError:
                break
        return found

    def require(self, unit: int, what: str) -> Record:
        """Return the record, for readers, of a committed unit.

        Raises
        ------
        NotReadyError
            If the unit is not committed; ``what`` says what it is and how to make it.
        """
        if unit not in self._pinned:
            record = self.latest(unit)
            if record is None or record.state != "committed":
                raise NotReadyError(what)
            self._pinned.setdefault(unit, record.generation)
        return self.record(unit, self._pinned[unit])

    def commit(self, unit: int, objects: Mapping[str, ObjectEntry], facts: Mapping[str, Any]) -> Record:
        """Commit a unit whose objects are all published, and return the record that counts.

        That is another attempt's if it was faster: its record is as good, since it names the same objects.
        """
        last = self.latest(unit)
        if last is not None and last.state == "committed":
            return last
        record = Record(
            unit=unit,
            generation=0 if last is None else last.generation + 1,
            state="committed",
            attempt=uuid.uuid4().hex,
            objects=objects,
            facts=facts,
        )
        path = record_path(self.folder, unit, record.generation)
        # Published last: whoever sees it may trust every object that it names (ADR 0003).
        if self.storage.publish(path, encode_document(asdict(record)).parts):
            return record
        # Lost to another attempt, or to an earlier reply of our own that never arrived: the stored one tells.
        return self.record(unit, record.generation)

    def remedy(self, record: Record) -> str:
        """Say what to do about an object of a record that is missing or damaged."""
        path = record_path(self.folder, record.unit, record.generation)
        return (
            f"Delete it, if it is there, and its commit record {self.storage.url}/{path}; then run "
            f"`gradstore {self.verb}` again: it makes both anew."
        )

    def _read(self, unit: int, generation: int) -> Record:
        path = record_path(self.folder, unit, generation)
        where = f"{self.storage.url}/{path}"
        remedy = f"Delete it, then run `gradstore {self.verb}` again: it makes this part anew."
        value = decode_document(self.storage.read(path), where, remedy)
        try:
            objects = {name: ObjectEntry(**entry) for name, entry in value.pop("objects").items()}
            return Record(objects=objects, **value)
        except (KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{where}: is not a commit record of this version: {error!r}. {remedy}") from error


def in_parallel(function: Callable[[T], R], items: Iterable[T], *, threads: int) -> list[R]:
    """Results of ``function`` for every item, in order; with one thread, one after another in this one.

    When one fails, those not yet begun are not begun, and its error is raised when the others have ended.
    """
    items = list(items)
    if threads <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items))) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _expected(storage: Storage, path: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except ObjectMissingError as error:
        raise ObjectMissingError(f"{storage.url}/{path}: is missing, though it was committed. {remedy}") from error


def _damaged(storage: Storage, path: str, remedy: str) -> IntegrityError:
    return IntegrityError(f"{storage.url}/{path}: its bytes are not those that were committed. {remedy}")
