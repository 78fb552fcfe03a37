"""What loads by a folder or a hub id: quietly, with one error for whatever goes wrong, and never half."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gradstore.adapters.locations import resolve_location
from gradstore.errors import DataError, GradstoreError, SpecError


def find_source(source: str, key: str, holds: str) -> str:
    """Return the folder or hub id that run.toml names.

    Raises
    ------
    SpecError
        If it can only be a folder and there is none; ``holds`` says what it should hold.
    """
    found = resolve_location(source, key)
    # A hub id is NAME or OWNER/NAME; whatever else there is must be a folder.
    if (found.startswith(("/", ".", "~")) or found.count("/") > 1) and not Path(found).is_dir():
        raise SpecError(f"{key}: {source!r}: there is no such folder. Name a folder with {holds}, or a hub id.")
    return found


def refuse_unfilled(key: str, source: str, missing: Sequence[str], mismatched: Sequence[str], what: str) -> None:
    """What a checkpoint lacks or has in another shape its library fills with random numbers, and only warns."""
    for names, found in ((missing, "lack {} tensors"), (mismatched, "have the wrong shape for {} tensors")):
        if names:
            raise DataError(
                f"{key}: the weights of {source} {found.format(len(names))} of the model: "
                f"{', '.join(sorted(names)[:5])}. Name a checkpoint of {what}."
            )


@contextmanager
def explained(named: str, *, role: str, holds: str) -> Iterator[None]:
    """Turn what transformers or peft raises about what it cannot load into one error, without progress bars and tables.

    ``named`` is the key and its value, ``role`` what should load, ``holds`` what a folder of it holds.
    """
    from safetensors import SafetensorError

    try:
        with quiet():
            yield
    except (GradstoreError, MemoryError):
        raise
    except SafetensorError as error:
        raise DataError(f"{named} holds damaged weights: {error}. Fetch or copy it again.") from error
    # A broken file makes the readers of its format fail in any way: struct.error, IndexError, KeyError and others.
    except Exception as error:
        raise SpecError(
            f"{named} does not load as {role}: {error}\n"
            f"Name a folder with {holds}, or a hub id that this machine can reach."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Enter with transformers' progress bars and warnings off; they are put back."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
