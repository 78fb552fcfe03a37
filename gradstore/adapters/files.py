"""The files of a source: local or behind a URL, listed in an order that does not depend on the filesystem."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from gradstore.errors import DataError, SpecError

COMPRESSIONS: Final = (".gz", ".bz2", ".xz", ".zst")
_FILES_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files of a source, sorted by name.

    Attributes
    ----------
    filesystem
        The fsspec filesystem that holds them.
    root
        The folder that their names are relative to.
    key
        Where run.toml names the source, for messages: ``data.train``.
    paths
        The files' paths on the filesystem.
    """

    filesystem: Any
    root: str
    key: str
    paths: tuple[str, ...]

    @classmethod
    def open(cls, location: str, key: str, suffixes: Sequence[str], *, compressed: bool = False) -> Files:
        """List the files under a path or URL whose names end in one of ``suffixes``, in any case; all if there are none.

        With ``compressed`` a name may end in .gz and the like behind that.

        Raises
        ------
        SpecError
            If no package that is installed opens the URL.
        DataError
            If there is no such file, or none with such a name.
        """
        from fsspec.core import url_to_fs

        try:
            filesystem, root = url_to_fs(location)
        except (ImportError, ValueError) as error:
            raise SpecError(
                f"{key}.source: {location} cannot be opened: {error}. For s3:// install 'gradstore[s3]'."
            ) from error
        with explained(key, location, "listed"):
            is_file = filesystem.isfile(root)
            paths = [root] if is_file else filesystem.find(root)
        if not paths:
            raise DataError(f"{key}.source: {location}: there is no such file or folder, or the folder is empty.")
        folder = root.rpartition("/")[0] if is_file else root.rstrip("/")
        files = cls(filesystem=filesystem, root=folder, key=key, paths=tuple(sorted(paths)))
        if not suffixes or is_file:
            return files
        kept = tuple(path for path in files.paths if has_suffix(path, suffixes, compressed=compressed))
        if not kept:
            raise DataError(
                f"{key}.source: {location} has no {' or '.join(suffixes)} files; it holds {some(files.names)}."
            )
        return cls(filesystem=filesystem, root=folder, key=key, paths=kept)

    @property
    def names(self) -> list[str]:
        """The files' paths inside the source."""
        return [self.name(path) for path in self.paths]

    def name(self, path: str) -> str:
        """A file's path inside the source."""
        return path.removeprefix(self.root).lstrip("/")

    @contextmanager
    def opened(self, path: str, compression: str | None = None) -> Iterator[Any]:
        """Open one of the files for reading bytes."""
        with explained(self.key, path, "opened"):
            opened = self.filesystem.open(path, "rb", compression=compression)
        with opened as file:
            yield file

    def contents(self) -> Iterator[tuple[str, bytes]]:
        """Yield each file's name and bytes; many at once, because a small object's cost is its round trip."""
        remaining = iter(self.paths)
        while paths := list(islice(remaining, _FILES_AT_ONCE)):
            with explained(self.key, f"one of {some(paths)}", "read"):
                contents = self.filesystem.cat_ranges(paths, None, None, on_error="raise")
            yield from zip(map(self.name, paths), contents, strict=True)


@contextmanager
def explained(key: str, what: str, action: str) -> Iterator[None]:
    """Turn what a filesystem raises into one error: each has its own for credentials, endpoints and names."""
    try:
        yield
    except Exception as error:
        raise DataError(
            f"{key}.source: {what} cannot be {action}: {type(error).__name__}: {error}. "
            "Check its name, and the credentials and endpoint in the environment."
        ) from error


def has_suffix(name: str, suffixes: Sequence[str], *, compressed: bool = False) -> bool:
    """Whether a name ends in one of some suffixes, in any case, the suffix of a compression apart."""
    name = name.lower()
    for compression in COMPRESSIONS if compressed else ():
        name = name.removesuffix(compression)
    return name.endswith(tuple(suffixes))


def some(names: Sequence[str]) -> str:
    """The first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
