"""What every artifact has: a name, settings that are never changed, and units of work with commit records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Final, Self

import numpy as np
import numpy.typing as npt

from gradstore.errors import NotReadyError, ObjectMissingError
from gradstore.store.backend import Storage
from gradstore.store.blocks import (
    Buffers,
    CommitLog,
    Record,
    in_parallel,
    publish_exactly,
    publish_metadata,
    publish_object,
    read_chunk,
    read_object,
)
from gradstore.store.codecs import Payload, decode_document, encode_document, plain
from gradstore.store.contract import require_equal
from gradstore.store.layout import ARTIFACT_FILE, FORMAT_VERSION, ArrayLayout, check_name, chunk_path, metadata_objects

# Top folder of each kind of artifact, and how many names lead from there to the artifact.
FOLDERS: Final = {
    "kernel": ("kernels", 1),
    "queries": ("queries", 2),
    "contributions": ("contributions", 2),
    "weights": ("weights", 1),
    "scores": ("scores", 1),
}
VERBS: Final = {
    "kernel": "kernel",
    "queries": "contribute",
    "contributions": "contribute",
    "weights": "learn",
    "scores": "score",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactInfo:
    """What artifact.json says.

    Attributes
    ----------
    kind
        ``kernel``, ``queries``, ``contributions``, ``weights`` or ``scores``.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactStatus:
    """An artifact of a store: its kind, its name (``kernel/set`` for two names) and how much of it is committed."""

    kind: str
    name: str
    committed: int
    total: int
    settings: Mapping[str, Any]


class Artifact:
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
        self.log = CommitLog(storage, f"{folder}/commits")
        self._records: dict[int, Record] = {}
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

    @classmethod
    def _create(
        cls,
        storage: Storage,
        names: tuple[str, ...],
        info: ArtifactInfo,
        *,
        arrays: Mapping[str, ArrayLayout],
        chunks: Mapping[str, Payload],
    ) -> Self:
        """Create the artifact, or open the one that is there if its settings are equal.

        The metadata of its arrays and the chunks that are known already, by their paths inside the artifact, are
        published before artifact.json, which is last.
        """
        folder = _folder(cls.kind, names)
        info = ArtifactInfo(**plain(asdict(info)))
        if _read_info(storage, folder) is None:
            for path, payload in chunks.items():
                publish_exactly(storage, f"{folder}/{path}", payload.parts)
            metadata = metadata_objects({f"{folder}/{path}": layout for path, layout in arrays.items()})
            publish_metadata(storage, folder, metadata)
            document = {"format_version": FORMAT_VERSION, **asdict(info)}
            storage.publish(f"{folder}/{ARTIFACT_FILE}", encode_document(document).parts)
        existing = cls._open(storage, names)
        remedy = "Restore these settings, or choose another name for the artifact in run.toml."
        require_equal(f"The artifact {storage.url}/{folder}", existing.settings, info.settings, remedy=remedy)
        return existing

    @classmethod
    def _open(cls, storage: Storage, names: tuple[str, ...]) -> Self:
        folder = _folder(cls.kind, names)
        info = _read_info(storage, folder)
        if info is None:
            raise NotReadyError(
                f"{storage.url}/{folder}: there is no such artifact. Run `gradstore {VERBS[cls.kind]}` first."
            )
        return cls(storage, folder, info)

    def _write_unit(self, unit: int, payloads: Mapping[str, Payload], facts: Mapping[str, Any]) -> Record:
        entries = in_parallel(
            lambda item: publish_object(self.storage, f"{self.folder}/{item[0]}", item[1]),
            payloads.items(),
            threads=self.storage.concurrency,
        )
        return self.log.commit(unit, dict(zip(payloads, entries, strict=True)), facts)

    def _committed(self, unit: int) -> Record | None:
        last = self.log.latest(unit)
        return last if last is not None and last.state == "committed" else None

    def _record(self, unit: int) -> Record:
        """Record of a committed unit; read once, because every read of the unit needs it."""
        if unit not in self._records:
            what = f"{self.storage.url}/{self.folder}: part {unit} of {self.info.num_units} is not committed. Run "
            self._records[unit] = self.log.require(
                unit, f"{what}`gradstore {VERBS[self.kind]}`: it goes on from there."
            )
        return self._records[unit]

    def _read_object(self, path: str) -> bytes:
        return read_object(self.storage, f"{self.folder}/{path}", self._record(0).objects[path])

    def _read_chunk(self, unit: int, array: str, layout: ArrayLayout) -> npt.NDArray[Any]:
        """Values of the only chunk of an array, in memory of their own."""
        path = chunk_path(array, *(0 for _ in layout.shape))
        buffer = np.empty(layout.chunk_bytes, np.uint8)
        return read_chunk(self.storage, f"{self.folder}/{path}", self._record(unit).objects[path], layout, buffer)


def list_artifacts(storage: Storage) -> list[ArtifactStatus]:
    """Every artifact of a store, and how many of its units are committed."""
    found = []
    for kind, (top, depth) in FOLDERS.items():
        for name in _names_below(storage, top, depth):
            info = _read_info(storage, f"{top}/{name}")
            if info is not None:
                committed = CommitLog(storage, f"{top}/{name}/commits").committed_units()
                found.append(
                    ArtifactStatus(
                        kind=kind, name=name, committed=len(committed), total=info.num_units, settings=info.settings
                    )
                )
    return found


def _names_below(storage: Storage, folder: str, depth: int) -> list[str]:
    names = storage.list_folders(folder)
    if depth == 1:
        return names
    return [f"{name}/{rest}" for name in names for rest in _names_below(storage, f"{folder}/{name}", depth - 1)]


def _folder(kind: str, names: tuple[str, ...]) -> str:
    top, depth = FOLDERS[kind]
    assert len(names) == depth
    return "/".join((top, *(check_name(f"name of {kind}", name) for name in names)))


def _read_info(storage: Storage, folder: str) -> ArtifactInfo | None:
    path = f"{folder}/{ARTIFACT_FILE}"
    try:
        document = decode_document(storage.read(path), f"{storage.url}/{path}")
    except ObjectMissingError:
        return None
    return ArtifactInfo(**{name: document[name] for name in ("kind", "num_units", "settings", "recorded")})
