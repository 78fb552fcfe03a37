"""Files that commands write beside the store: whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from gradstore.errors import SpecError, StorageError
from gradstore.store.backend import Storage


def require_place(output: Path, storage: Storage, *, force: bool) -> None:
    """Refuse a file that cannot be there, would take another's place, or would lie among a store's objects.

    Raises
    ------
    SpecError
        Naming the file, and what to do.
    """
    if not output.parent.is_dir():
        raise SpecError(f"{output}: the folder {output.parent} does not exist. Make it, or choose another place.")
    if output.is_dir():
        raise SpecError(f"{output}: is a folder. Choose another name.")
    if "://" not in storage.url:
        root = Path(storage.url).resolve()
        if root in (output.parent.resolve() / output.name).parents:
            raise SpecError(f"{output}: lies inside the store {storage.url}. Choose another place.")
    if os.path.lexists(output) and not force:
        raise SpecError(f"{output}: exists already, and is left as it is. Choose another name, or give --force.")


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Give a temporary name beside ``output`` for a file or folder, which gets that name once it is whole, and goes if anything fails."""
    temporary = output.parent / f".gradstore-{uuid4().hex}{output.suffix}"
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        elif output.is_dir():
            # No folder takes the place of one that holds something.
            shutil.rmtree(output)
        temporary.replace(output)
    except OSError as error:
        raise StorageError(
            f"{output}: cannot be written: {error.strerror or error}. Free space or choose another place, then run the "
            "same command again."
        ) from error
    finally:
        # Where the folder is none, there is nothing to remove either; what failed is told above.
        with suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink()
