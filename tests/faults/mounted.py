"""A store on a disk that is full, or that may not be written to: run inside a mount namespace of its own.

    unshare --map-root-user --mount python -m tests.faults.mounted full FOLDER

Prints, as JSON, the error that a writer met, the blocks that were committed then, and those that are once the disk is mended.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

from gradstore.errors import StorageError
from gradstore.store.features import FeatureSet, FeatureStore
from tests import stores
from tests.faults.contents import damage, essence, undisturbed

INFO = stores.set_info(rows=4 * 16, block_rows=16, groups={f"layers.{layer}.mlp": 1600 for layer in range(4)})


def full(folder: str) -> FeatureSet:
    """Mount a disk that holds about half of the set."""
    mount("-t", "tmpfs", "-o", "size=1200k", "tmpfs", folder)
    return stores.create(f"{folder}/store", INFO)


def emptied(folder: str) -> None:
    mount("-o", "remount,size=64m", folder)


def read_only(folder: str) -> FeatureSet:
    """Write one block, then forbid to write."""
    made = stores.create(f"{folder}/store", INFO)
    stores.write(made, 2)
    mount("--bind", folder, folder)
    mount("-o", "remount,ro,bind", folder)
    return made


def writable(folder: str) -> None:
    mount("-o", "remount,rw,bind", folder)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


TROUBLES: dict[str, tuple[Callable[[str], FeatureSet], Callable[[str], None]]] = {
    "full": (full, emptied),
    "read-only": (read_only, writable),
}


def main(trouble: str, folder: str) -> None:
    begin, mend = TROUBLES[trouble]
    made = begin(folder)
    found = {"error": write_all(made), "then": committed_and_right(made)}
    mend(folder)
    error = write_all(made)
    whole = error is None and essence(made.storage) == undisturbed(INFO)
    print(json.dumps({**found, "in the end": committed_and_right(made), "whole": whole}))


def write_all(made: FeatureSet) -> str | None:
    """Write what is missing; return the error that ended it."""
    try:
        for block in made.missing_blocks():
            stores.write(made, block)
    except StorageError as error:
        return str(error)
    return None


def committed_and_right(made: FeatureSet) -> list[int]:
    opened = FeatureStore.open(made.storage.url).open_set(INFO.name)
    assert damage(made.storage.url, finished=False) == []
    return sorted(opened.log.committed())


if __name__ == "__main__":
    main(*sys.argv[1:])
