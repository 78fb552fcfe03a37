"""Files that commands write beside the store: whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from gradstore.errors import StorageError


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Give a temporary file beside ``output``, which gets its name once it is whole, and goes if anything fails."""
    temporary = output.with_name(f".gradstore-{uuid4().hex}{output.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(output)
    except OSError as error:
        raise StorageError(
            f"{output}: cannot be written: {error.strerror or error}. Free space or choose another place, then run the "
            "same command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
