"""What a store holds, as the judges of faults see it: records, attempts, and all that must not differ between two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count

from gradstore.stages.progress import Progress
from gradstore.stages.verify import verify
from gradstore.store.backend import Storage, open_storage
from gradstore.store.blocks import in_parallel
from gradstore.store.features import SetInfo
from gradstore.store.layout import parse_record_path
from tests import stores

_NAMES = count()


def records(storage: Storage, info: SetInfo) -> dict[str, bytes]:
    """Every commit record of a set, by its path."""
    return _read_all(storage, f"{info.folder}/blocks")


def attempts(found: Mapping[str, bytes]) -> dict[int, str]:
    """Attempt of every block, from its records."""
    return {unit_of(path): json.loads(data)["attempt"] for path, data in found.items()}


def unit_of(path: str) -> int:
    """Block of a record."""
    found = parse_record_path(path)
    assert found is not None, path
    return found[0]


def essence(storage: Storage) -> dict[str, bytes]:
    """Every object of a store, records without what differs from attempt to attempt."""
    found = _read_all(storage, "")
    return {path: _without_attempt(data) if "/blocks/" in path else data for path, data in found.items()}


def undisturbed(info: SetInfo) -> dict[str, bytes]:
    """`essence` of a store to which nothing happened."""
    made = stores.create(open_storage(f"memory://undisturbed-{next(_NAMES)}"), info)
    for block in range(info.num_blocks):
        stores.write(made, block)
    return essence(made.storage)


def damage(url: str, *, finished: bool = True) -> list[str]:
    """What `gradstore verify --full` finds wrong with a store, and if it is ``finished``, named by nothing."""
    found = verify(url, full=True, progress=Progress(quiet=True))
    lines = [f"{problem['path']}: {problem['found']}" for problem in found["problems"]]
    loose = ("orphans", "unknown") if finished else ("unknown",)
    return lines + [f"{url}: {what}" for what in loose if found[what]["objects"]]


def _read_all(storage: Storage, folder: str) -> dict[str, bytes]:
    paths = [info.path for info in storage.list_objects(folder)]
    return dict(zip(paths, in_parallel(storage.read, paths, threads=storage.concurrency), strict=True))


def _without_attempt(data: bytes) -> bytes:
    value = json.loads(data)
    return json.dumps({key: value[key] for key in value.keys() - {"attempt", "crc32c"}}, sort_keys=True).encode()
