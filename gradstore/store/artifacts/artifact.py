"""What every artifact has: a name, settings that are never changed, and units of work with commit records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt

from gradstore.errors import NotReadyError, SupersededError
from gradstore.spec import content_hash
from gradstore.store.artifacts.staleness import changed_blocks, snapshots_in, stale_error
from gradstore.store.backend import Storage
from gradstore.store.blocks import (
    Buffers,
    ObjectEntry,
    claim_document,
    in_parallel,
    publish_metadata,
    publish_object,
    read_chunk,
    read_document,
    read_object,
)
from gradstore.store.codecs import Payload, as_written, plain, require_types
from gradstore.store.commits import Attempt, CommitLog, Record
from gradstore.store.contract import require_equal, require_version
from gradstore.store.layout import ARTIFACT_FILE, FORMAT_VERSION, ArrayLayout, check_name, chunk_path

# Top folder of each kind of artifact, and how many names lead from there to the artifact.
# Far above any artifact: no number of units makes a loop that does not end.
MOST_UNITS: Final = 10**7
FOLDERS: Final = {
    "projection": ("projections", 1),
    "kernel": ("kernels", 2),
    "full_kernel": ("full-kernels", 2),
    "partials": ("partials", 3),
    "self_influence": ("self-influence", 2),
    "queries": ("queries", 3),
    "contributions": ("contributions", 2),
    "moments": ("moments", 2),
    "score_matrix": ("score-matrices", 2),
    "sketch": ("sketches", 1),
    "weights": ("weights", 1),
    "scores": ("scores", 1),
    "retrained": ("retrained", 2),
    "patched": ("patched", 1),
    "embeddings": ("embeddings", 2),
    "evaluation": ("evaluations", 2),
}
VERBS: Final = {
    "projection": "featurize",
    "kernel": "kernel",
    "full_kernel": "kernel",
    "partials": "run",
    "self_influence": "self-influence",
    "queries": "contribute",
    "contributions": "contribute",
    "moments": "contribute",
    "score_matrix": "contribute",
    "sketch": "sketch",
    "weights": "learn",
    "scores": "score",
    "retrained": "evaluate lds",
    "patched": "evaluate tail-patch",
    "embeddings": "evaluate",
    "evaluation": "evaluate",
}
# How a run gets its settings where an artifact of other settings is in the way.
_WAYS_OUT: Final = {
    "projection": "",
    "kernel": "choose another run.store, ",
    "full_kernel": "choose another run.store, ",
    "partials": "",
    "self_influence": "choose another kernel.name (and learn.name), ",
    "queries": "choose another kernel.name (and learn.name), ",
    "contributions": "choose another kernel.name (and learn.name), ",
    "moments": "choose another kernel.name (and learn.name), ",
    "score_matrix": "choose another kernel.name (and learn.name), ",
    "sketch": "",
    "weights": "choose another learn.name, ",
    "scores": "",
    "retrained": "choose another evaluate.lds.name, ",
    "patched": "",
    "embeddings": "",
    "evaluation": "",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactInfo:
    """What artifact.json says.

    Attributes
    ----------
    kind
        A key of FOLDERS.
    num_units
        Units of work; the artifact is complete when all are committed.
    settings
        What the artifact is: its settings and what it was made from. Compared when it is created again.
    recorded
        How it was made, such as the division into units. Fixed by the first creation, never compared.
    """

    kind: str
    num_units: int
    settings: Mapping[str, Any]
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def commits(self) -> str:
        """Folder, in the artifact, of its commit records: one that is made anew with other settings has another."""
        return f"commits/{content_hash(plain(asdict(self)))[:16]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactStatus:
    """An artifact of a store: its kind, its name (``kernel/set`` for two names) and how much of it is committed."""

    kind: str
    name: str
    committed: int
    total: int
    settings: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Its folder in the store."""
        return f"{FOLDERS[self.kind][0]}/{self.name}"


class Artifact(ABC):
    """An artifact of a store; its kinds add how their units are written and read.

    Attributes
    ----------
    storage
        Where its objects are.
    folder
        Its folder.
    info
        What its artifact.json says: that of the first creation.
    log
        The commit records of its units.
    """

    kind: ClassVar[str]

    def __init__(self, storage: Storage, folder: str, info: ArtifactInfo) -> None:
        self.storage = storage
        self.folder = folder
        self.info = info
        self.log = _log(storage, folder, info)
        self._buffers = Buffers()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the artifact is and was made from."""
        return self.info.settings

    def missing_units(self) -> list[int]:
        """Units that are not committed, in order."""
        return self.log.missing(self.info.num_units)

    def is_complete(self) -> bool:
        """Whether every unit is committed."""
        return not self.missing_units()

    @abstractmethod
    def arrays(self) -> dict[str, ArrayLayout]:
        """Layout of every Zarr array, by its path in the artifact."""

    @abstractmethod
    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """Every object that the record of a unit names, by its path in the artifact: of a chunk with the array's layout."""

    @classmethod
    def find(cls, storage: Storage, folder: str) -> Self | None:
        """Open the artifact in a folder of a store, or return None if there is none."""
        info = _read_info(storage, cls.kind, folder)
        return None if info is None else cls(storage, folder, info)

    @classmethod
    def find_named(cls, storage: Storage, *names: str) -> Self | None:
        """Open the artifact of these names in a store, or return None if there is none."""
        return cls.find(storage, _folder(cls.kind, names))

    @classmethod
    def _create(cls, storage: Storage, names: tuple[str, ...], info: ArtifactInfo) -> Self:
        """Create the artifact, or open the one that is there if its settings are equal.

        artifact.json comes first, so that all creators, at once or one after another's death, make what the first asked
        for.
        """
        folder = _folder(cls.kind, names)
        info = ArtifactInfo(**plain(asdict(info)))
        claim_document(
            storage,
            f"{folder}/{ARTIFACT_FILE}",
            {"format_version": FORMAT_VERSION, **asdict(info), "commits": info.commits},
            remedy=_make_anew(storage, cls.kind, folder),
        )
        existing = cls._open(storage, names)
        _refuse_stale(f"{storage.url}/{folder}", storage.url, existing.settings, info.settings)
        prune = f"run `gradstore prune {storage.url} {folder}`: `gradstore {VERBS[cls.kind]}` then makes it anew."
        remedy = f"Restore these settings, {_WAYS_OUT[cls.kind]}or {prune}"
        require_equal(f"The artifact {storage.url}/{folder}", existing.settings, info.settings, remedy=remedy)
        return existing

    @classmethod
    def _open(cls, storage: Storage, names: tuple[str, ...]) -> Self:
        found = cls.find_named(storage, *names)
        if found is None:
            raise NotReadyError(
                f"{storage.url}/{_folder(cls.kind, names)}: there is no such artifact. Run `gradstore {VERBS[cls.kind]}` first."
            )
        return found

    def _publish_arrays(self, chunks: Mapping[str, Payload] | None = None) -> None:
        """Publish metadata of all arrays, and chunks that are known already, by path, where there is none yet or no more."""
        if not self.is_complete():
            self.storage.sweep(self.folder)
        for path, payload in (chunks or {}).items():
            publish_object(self.storage, f"{self.folder}/{path}", payload, adopt=False)
        publish_metadata(self.storage, {f"{self.folder}/{path}": layout for path, layout in self.arrays().items()})

    def _write_unit(self, unit: int, payloads: Mapping[str, Payload], facts: Mapping[str, Any]) -> Record:
        """Publish the objects of a unit and commit it, unless it is committed; return the record that counts.

        Raises
        ------
        SupersededError
            If the artifact was pruned since it was opened, or another attempt was faster or took the unit back.
        """
        attempt = self._begin(unit)
        if attempt is None:
            return self._record(unit)
        return attempt.commit(self._publish(attempt, payloads), facts)

    def _begin(self, unit: int) -> Attempt | None:
        """Begin an attempt at a unit; None if it is committed."""
        generation = self.log.begin(unit)
        if generation is None:
            return None
        self._refuse_pruned()
        return Attempt(self.log, unit, generation, guard=self._refuse_pruned)

    def _publish(self, attempt: Attempt, payloads: Mapping[str, Payload]) -> dict[str, ObjectEntry]:
        """Publish some objects of a unit, by path; return what its record is to say of them."""
        entries = in_parallel(
            lambda item: attempt.publish(f"{self.folder}/{item[0]}", item[1]),
            payloads.items(),
            threads=self.storage.concurrency,
        )
        return dict(zip(payloads, entries, strict=True))

    def _refuse_pruned(self) -> None:
        """Make sure that the artifact is still the one that was opened, not made anew with other settings."""
        if _read_info(self.storage, self.kind, self.folder) != self.info:
            raise SupersededError(
                f"{self.storage.url}/{self.folder}: was pruned while it was being written. Run the same command again: it goes "
                "on from what is there now."
            )

    def _committed(self, unit: int) -> Record | None:
        last = self.log.latest(unit)
        return last if last is not None and last.state == "committed" else None

    def _record(self, unit: int) -> Record:
        what = f"{self.storage.url}/{self.folder}: part {unit} of {self.info.num_units} is not committed. Run "
        return self.log.require(unit, f"{what}`gradstore {VERBS[self.kind]}`: it goes on from there.")

    def _read_object(self, path: str, unit: int = 0) -> bytes:
        record, place = self._record(unit), f"{self.folder}/{path}"
        entry, remedy = record.objects[path], self.log.remedy()
        return self.log.read(record, place, lambda: read_object(self.storage, place, entry, remedy=remedy))

    def _read_chunk(self, unit: int, array: str, layout: ArrayLayout) -> npt.NDArray[Any]:
        """Values of the only chunk of an array, in memory of their own."""
        path = chunk_path(array, *(0 for _ in layout.shape))
        buffer = np.empty(layout.buffer_bytes, np.uint8)
        return self._read_into(self._record(unit), path, layout, buffer)

    def _read_into(
        self, record: Record, path: str, layout: ArrayLayout, buffer: npt.NDArray[np.uint8]
    ) -> npt.NDArray[Any]:
        place, entry, remedy = f"{self.folder}/{path}", record.objects[path], self.log.remedy()
        return self.log.read(
            record, place, lambda: read_chunk(self.storage, place, entry, layout, buffer, remedy=remedy)
        )


def only_chunks(arrays: Mapping[str, ArrayLayout]) -> dict[str, ArrayLayout | None]:
    """Layout, by path of the chunk, of arrays of one chunk each."""
    return {chunk_path(path, *(0 for _ in layout.shape)): layout for path, layout in arrays.items()}


def list_artifacts(storage: Storage) -> list[ArtifactStatus]:
    """Every artifact of a store, and how many of its units are committed."""
    found = []
    for kind, (top, depth) in FOLDERS.items():
        for name in _names_below(storage, top, depth):
            info = _read_info(storage, kind, f"{top}/{name}")
            if info is not None:
                committed = _log(storage, f"{top}/{name}", info).committed_units()
                found.append(
                    ArtifactStatus(
                        kind=kind, name=name, committed=len(committed), total=info.num_units, settings=info.settings
                    )
                )
    return found


def remove_artifact(storage: Storage, path: str) -> int:
    """Remove an artifact and all of its objects; return how many. If it dies, removing again goes on.

    Its commit records go first, so that nothing trusts what is left, and its settings last, so that nobody makes another
    in its place before.
    """
    objects = sorted(info.path for info in storage.list_objects(path))
    records = [found for found in objects if found.startswith(f"{path}/commits/")]
    settings = f"{path}/{ARTIFACT_FILE}"
    rest = [found for found in objects if found not in records and found != settings]
    for batch in (records, rest, [settings]):
        in_parallel(storage.delete, batch, threads=storage.concurrency)
    return len(objects)


def _refuse_stale(where: str, store: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Tell of sets that have changed since an artifact was made, which is no matter of settings.

    Raises
    ------
    ContractError
        Naming the blocks.
    """
    now = dict(snapshots_in(asked))
    for place, made_from in snapshots_in(stored):
        changed = changed_blocks(made_from, now.get(place, made_from))
        if changed:
            raise stale_error(where, store, place, changed)


def _names_below(storage: Storage, folder: str, depth: int) -> list[str]:
    names = storage.list_folders(folder)
    if depth == 1:
        return names
    return [f"{name}/{rest}" for name in names for rest in _names_below(storage, f"{folder}/{name}", depth - 1)]


def _folder(kind: str, names: tuple[str, ...]) -> str:
    top, depth = FOLDERS[kind]
    assert len(names) == depth
    return "/".join((top, *(check_name(f"name of {kind}", name) for name in names)))


def _log(storage: Storage, folder: str, info: ArtifactInfo) -> CommitLog:
    return CommitLog(storage, f"{folder}/{info.commits}", VERBS[info.kind])


def _make_anew(storage: Storage, kind: str, folder: str) -> str:
    return f"Delete the folder {storage.url}/{folder}, then run `gradstore {VERBS[kind]}` again: it makes it anew."


def _read_info(storage: Storage, kind: str, folder: str) -> ArtifactInfo | None:
    document = read_document(storage, f"{folder}/{ARTIFACT_FILE}", remedy=_make_anew(storage, kind, folder))
    if document is None:
        return None
    require_version(f"The artifact {storage.url}/{folder}", document)
    with as_written(f"{storage.url}/{folder}/{ARTIFACT_FILE}", _make_anew(storage, kind, folder)):
        require_types(document, {"kind": (str,), "num_units": (int,), "settings": (dict,), "recorded": (dict,)})
        if document["kind"] not in FOLDERS or not 0 <= document["num_units"] <= MOST_UNITS:
            raise ValueError(f"{document['num_units']:,} units of the kind {document['kind']!r:.60}")
        for _ in snapshots_in(document["settings"]):
            pass
        return ArtifactInfo(**{name: document[name] for name in ("kind", "num_units", "settings", "recorded")})
