"""One object against what is said of it: by its listed size, or by all of its bytes."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradstore.errors import IntegrityError, ObjectMissingError, StorageError
from gradstore.store.backend import ObjectInfo, Storage
from gradstore.store.blocks import Buffers, ObjectEntry, read_chunk, read_object
from gradstore.store.codecs import decode_chunk, decode_table
from gradstore.store.health.problems import Kind
from gradstore.store.layout import ArrayLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What is wrong with an object."""

    kind: Kind
    found: str


class Objects:
    """Looks at objects of a store, by several threads at once; each borrows one buffer of a chunk's size.

    Parameters
    ----------
    storage
        Where they are.
    listing
        What is listed there.
    """

    def __init__(self, storage: Storage, listing: Mapping[str, ObjectInfo]) -> None:
        self._storage = storage
        self._listing = listing
        self._buffers = Buffers()

    def by_size(self, path: str, entry: ObjectEntry | None) -> Fault | None:
        """Tell whether an object is listed with the size of its entry; without an entry, whether it is listed."""
        info = self._listing.get(path)
        if info is None:
            return Fault(kind="missing object", found="is missing, though it was committed")
        if entry is not None and info.bytes != entry.bytes:
            return Fault(kind="wrong size", found=f"has {info.bytes:,} bytes instead of {entry.bytes:,}")
        return None

    def by_bytes(self, path: str, entry: ObjectEntry | None, layout: ArrayLayout | None) -> Fault | None:
        """Read an object and compare its checksum with its entry, or without one with the checksum that it holds.

        One that seems damaged is read once more: the bytes may have been damaged on their way.
        """
        for _ in range(2):
            try:
                self._read(path, entry, layout)
            except ObjectMissingError:
                return Fault(kind="missing object", found="is missing, though it was committed")
            except IntegrityError:
                self._storage.forget(path)
            except StorageError as error:
                # A bad sector is a matter of this object; whatever else fails, of the storage.
                if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EIO:
                    raise
                return Fault(kind="wrong bytes", found=f"cannot be read: {error.__cause__.strerror}")
            else:
                return None
        sized = self.by_size(path, entry)
        if sized is not None and sized.kind == "wrong size":
            return sized
        return Fault(kind="wrong bytes", found="its bytes are not those that were committed: their crc32c is another")

    def _read(self, path: str, entry: ObjectEntry | None, layout: ArrayLayout | None) -> None:
        if entry is None:
            self._read_alone(path, layout)
        elif layout is None:
            read_object(self._storage, path, entry, remedy="")
        else:
            with self._buffers.borrow(layout.buffer_bytes) as buffer:
                read_chunk(self._storage, path, entry, layout, buffer, remedy="")

    def _read_alone(self, path: str, layout: ArrayLayout | None) -> None:
        data = self._storage.read(path)
        if layout is not None:
            if decode_chunk(np.frombuffer(data, np.uint8), layout) is None:
                raise IntegrityError(f"{path}: is damaged.")
            return
        try:
            decode_table(data)
        # pyarrow's errors are of both kinds.
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{path}: is no table: {error}.") from error


def difference(found: bytes, accepted: Sequence[bytes]) -> str | None:
    """What a Zarr document says unlike all that are accepted, or None; of attributes, those that it has beside are its own.

    What is accepted and no JSON is compared byte by byte.
    """
    try:
        theirs, ours = json.loads(found), [json.loads(each) for each in accepted]
    except (ValueError, RecursionError):
        return None if found in accepted else "is damaged"
    if not isinstance(theirs, dict):
        return "is no Zarr document"
    told = [_differing(theirs, each) for each in ours]
    return None if None in told else told[0]


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    for key, value in ours.items():
        if key == "attributes":
            has = theirs.get(key)
            pairs = [(f"attribute {name}", dict(has or {}).get(name), wanted) for name, wanted in value.items()]
        else:
            pairs = [(key, theirs.get(key), value)]
        for name, found, wanted in pairs:
            if found != wanted:
                return f"{name} is {_short(found)} instead of {_short(wanted)}"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
