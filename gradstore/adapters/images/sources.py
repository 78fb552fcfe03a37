"""Labelled images as their sources hold them: folders of files, parquet, IDX files and npz archives.

Files are read through fsspec, so that local paths, s3:// and hf:// are one thing. Labels are read first and images only
where they are asked for, so that nothing is held that is not taken.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gradstore.adapters.files import Files, some
from gradstore.adapters.images.arrays import IdxImages, NpzImages
from gradstore.adapters.images.entries import Entry, ImageSource
from gradstore.adapters.images.pixels import decode
from gradstore.adapters.locations import resolve_location
from gradstore.errors import DataError, SpecError
from gradstore.spec import SplitSection

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

FOLDER: Final = "folder"
"""The label of an image that is the name of its folder."""

_IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg")
_PARQUET: Final = ".parquet"
_ROWS_AT_ONCE: Final = 64


def open_images(split: SplitSection, key: str) -> ImageSource:
    """Return what reads the images of a split's source.

    ``format`` may be left at ``auto``: an .npz archive, IDX files where ``labels`` names a file, parquet files, or folders
    of PNG and JPEG files.

    Raises
    ------
    SpecError
        If the format is none of images.
    DataError
        If it cannot be told.
    """
    kind = split.format if split.format != "auto" else _detect(split, key)
    if kind not in SOURCES:
        raise SpecError(
            f"{key}.format: found {kind!r}; images are read as {', '.join(SOURCES)}. A dataset of the hub is parquet: "
            'source = "hf://datasets/OWNER/NAME/FOLDER".'
        )
    return SOURCES[kind](split, key)


def _detect(split: SplitSection, key: str) -> str:
    if split.labels is not None:
        return "idx"
    names = Files.open(resolve_location(split.source, f"{key}.source"), key, ()).names
    suffixes = {"npz": (".npz",), "parquet": (_PARQUET,), "images": _IMAGE_SUFFIXES}
    kinds = [kind for kind, ends in suffixes.items() if any(name.lower().endswith(ends) for name in names)]
    if len(kinds) != 1:
        found = " and ".join(kinds) if kinds else f"no images, parquet or npz files among {some(names)}"
        raise DataError(f"{key}.source: {split.source} holds {found}. Set {key}.format to {', '.join(SOURCES)}.")
    return kinds[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderImages:
    """PNG and JPEG files in folders whose names are their classes: ``source/CLASS/any/path.png``, as torchvision has it."""

    split: SplitSection
    key: str

    names: tuple[str, ...] | None = None

    def entries(self) -> list[Entry]:
        """Return every file's path inside the source, and the folder of the source that it is in."""
        if self.split.label not in (None, FOLDER) or self.split.labels is not None or self.split.id is not None:
            raise SpecError(
                f"{self.key}: image files have no columns. Found label = {self.split.label!r}, labels = "
                f"{self.split.labels!r}, id = {self.split.id!r}; accepted: label = {FOLDER!r} (the folder's name) or none, "
                "no labels and no id (the path is the id)."
            )
        return [Entry(image_id=name, label=name.split("/")[0] if "/" in name else None) for name in self._files().names]

    def pixels(self, places: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the images at ascending places."""
        files = self._files()
        chosen = Files(
            filesystem=files.filesystem,
            root=files.root,
            key=self.key,
            paths=tuple(files.paths[place] for place in places),
        )
        for name, content in chosen.contents():
            yield decode(content, f"{self.key}: {name}")

    def _files(self) -> Files:
        return Files.open(resolve_location(self.split.source, f"{self.key}.source"), self.key, _IMAGE_SUFFIXES)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetImages:
    """Parquet files with a column of image files, plain bytes or `datasets`' structs of bytes and path, and one of labels.

    Where `datasets` wrote the file and its labels are numbers, their names are taken from it.
    """

    split: SplitSection
    key: str

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names of the classes in the order of their numbers, where the files say so."""
        files = self._files()
        with self._table(files, files.paths[0]) as table:
            return _class_names(table.schema_arrow, self._label)

    def entries(self) -> list[Entry]:
        """Return every image's id and label, in the order of files and rows; no image is read."""
        found: list[Entry] = []
        files = self._files()
        for path in files.paths:
            with self._table(files, path) as table:
                found += self._entries(table, files.name(path))
        return found

    def pixels(self, places: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the images at ascending places; groups of rows with none of them are not read."""
        files = self._files()
        chosen, first = np.asarray(places, np.int64), 0
        for path in files.paths:
            with self._table(files, path) as table:
                for group in range(table.num_row_groups):
                    stop = first + table.metadata.row_group(group).num_rows
                    rows = chosen[(chosen >= first) & (chosen < stop)] - first
                    if len(rows):
                        yield from self._group(table, group, rows, f"{files.name(path)}, group {group}")
                    first = stop

    def _group(self, table: pq.ParquetFile, group: int, rows: np.ndarray, where: str) -> Iterator[np.ndarray]:
        start = 0
        for batch in table.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[self.split.image]):
            column = batch.column(0)
            for row in rows[(rows >= start) & (rows < start + len(column))].tolist():
                name = f"{self.key}: row {row} of {where}"
                value = column[row - start].as_py()
                content = value.get("bytes") if isinstance(value, dict) else value
                if not isinstance(content, bytes):
                    held = (
                        f"only a path, {value['path']!r}" if isinstance(value, dict) and value.get("path") else "none"
                    )
                    raise DataError(
                        f"{name}: column {self.split.image!r} holds no image but {held}. Save it with its bytes."
                    )
                yield decode(content, name)
            start += len(column)

    def _entries(self, table: pq.ParquetFile, name: str) -> Iterator[Entry]:
        columns = {"label": self._label, "id": self.split.id, "image": self.split.image}
        for option, column in columns.items():
            if column is not None and column not in table.schema_arrow.names:
                raise DataError(
                    f"{self.key}.{option}: {name} has no column {column!r}; its columns are: "
                    f"{', '.join(table.schema_arrow.names)}."
                )
        captions = _is_text(table.schema_arrow, self.split.text)
        wanted = [self._label, self.split.id, self.split.text if captions else None]
        names = _class_names(table.schema_arrow, self._label)
        row = 0
        for batch in table.iter_batches(columns=list(dict.fromkeys(column for column in wanted if column is not None))):
            for record in batch.to_pylist():
                where = f"{name}:{row}"
                yield Entry(
                    image_id=where if self.split.id is None else str(record[self.split.id]),
                    label=self._class(record[self._label], names, where),
                    text=(record[self.split.text] or "") if captions else "",
                )
                row += 1

    def _class(self, value: object, names: Sequence[str] | None, where: str) -> int | str | None:
        if value is None or value == "":
            return None
        if not isinstance(value, int | str):
            raise DataError(
                f"{self.key}.label: column {self._label!r} of {where} holds {type(value).__name__}; accepted: integers or "
                "texts."
            )
        if names is None or isinstance(value, str):
            return value
        # `datasets` has -1 for a label that is not known.
        return names[value] if 0 <= value < len(names) else None

    @property
    def _label(self) -> str:
        return self.split.label or "label"

    def _files(self) -> Files:
        return Files.open(resolve_location(self.split.source, f"{self.key}.source"), self.key, (_PARQUET,))

    @contextmanager
    def _table(self, files: Files, path: str) -> Iterator[pq.ParquetFile]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with files.opened(path) as file:
            try:
                yield pq.ParquetFile(file)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{self.key}: {files.name(path)} cannot be read as parquet: {error}.") from error


SOURCES: Final[dict[str, Callable[[SplitSection, str], ImageSource]]] = {
    "images": lambda split, key: FolderImages(split=split, key=key),
    "idx": lambda split, key: IdxImages(split=split, key=key),
    "npz": lambda split, key: NpzImages(split=split, key=key),
    "parquet": lambda split, key: ParquetImages(split=split, key=key),
}


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """The names that `datasets` wrote for the numbers of a column."""
    written: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = written.get("info", {}).get("features", {}).get(label, {}).get("names")
    return None if names is None else tuple(map(str, names))


def _is_text(schema: pa.Schema, column: str) -> bool:
    import pyarrow as pa

    return column in schema.names and pa.types.is_string(schema.field(column).type)
