"""Documents as their sources hold them: parquet, JSON lines, folders of text files, and `datasets` directories.

Files are read through fsspec, so that local paths and s3:// are one thing, and streamed: nothing is held that was not
asked for.
"""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gradstore.adapters.files import Files, has_suffix, some
from gradstore.adapters.locations import resolve_location
from gradstore.adapters.text.records import Document, RecordReader, resolve_form
from gradstore.errors import DataError, SpecError
from gradstore.lines import parse_object
from gradstore.spec import SplitSection

FOLDER: Final = "folder"
"""The label of a text file that is the name of its folder."""

_SUFFIXES: Final = {"text": (".txt",), "jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",)}
_DATASET_FILES: Final = ("dataset_dict.json", "state.json")
_ROWS_AT_ONCE: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentReader:
    """Reads the documents of one source in the source's own order, as often as it is asked to.

    Attributes
    ----------
    split
        What run.toml says of the source.
    key
        Where run.toml says it, for messages: ``data.train``.
    streamed
        Whether a hub dataset is streamed rather than downloaded first: right for a single reading of its beginning.
    """

    split: SplitSection
    key: str
    streamed: bool = False

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents.

        Raises
        ------
        SpecError
            If the keys do not fit the format, or a package that reads it is not installed.
        DataError
            If the source cannot be found or read, a column is missing, or does not hold what it should.
        """
        location = resolve_location(self.split.source, f"{self.key}.source")
        kind = self.split.format if self.split.format != "auto" else self._detect(location)
        if kind == "datasets":
            return self._read_dataset(location)
        readers = {"text": self._read_text, "jsonl": self._read_jsonl, "parquet": self._read_parquet}
        if kind not in readers:
            raise SpecError(f"{self.key}.format: found {kind!r}; texts are read as {', '.join(readers)} or datasets.")
        return readers[kind](Files.open(location, self.key, _SUFFIXES[kind], compressed=True))

    @property
    def _records(self) -> RecordReader:
        return RecordReader(split=self.split, key=self.key, form=resolve_form(self.split, self.key))

    def _detect(self, location: str) -> str:
        if "://" not in location and not Path(location).exists() and _may_be_hub_id(location):
            return "datasets"
        names = Files.open(location, self.key, ()).names
        if any(name in _DATASET_FILES for name in names):
            return "datasets"
        kinds = [
            kind
            for kind, suffixes in _SUFFIXES.items()
            if any(has_suffix(name, suffixes, compressed=True) for name in names)
        ]
        if len(kinds) != 1:
            found = " and ".join(kinds) if kinds else f"no text, JSON lines or parquet among {some(names)}"
            raise DataError(
                f"{self.key}.source: {self.split.source} holds {found}. "
                f"Set {self.key}.format to text, jsonl, parquet or datasets, or choose another source."
            )
        return kinds[0]

    def _read_text(self, files: Files) -> Iterator[Document]:
        form = resolve_form(self.split, self.key)
        if self.split.label not in (None, FOLDER) or self.split.id is not None or form != "text":
            raise SpecError(
                f"{self.key}: text files have no columns. Found label = {self.split.label!r}, id = {self.split.id!r}"
                f"{'' if form == 'text' else f' and {form}'}; accepted: label = {FOLDER!r} (the folder's name) or no "
                "label, no id (the path is the id), and neither prompt, completion nor messages."
            )
        for name, content in files.contents():
            label = (name.rpartition("/")[0] or files.root).rpartition("/")[2] if self.split.label else None
            yield Document(document_id=name, text=self._decode(content, name), label=label)

    def _read_jsonl(self, files: Files) -> Iterator[Document]:
        records = self._records
        for path in files.paths:
            name = files.name(path)
            try:
                with files.opened(path, compression="infer") as file:
                    for number, line in enumerate(file, start=1):
                        # A byte order mark may stand before the first.
                        if text := self._decode(line, f"{name}, line {number}").removeprefix("\ufeff").strip():
                            record = parse_object(text, f"{self.key}: {name}, line {number}")
                            yield records.document(record, name, number)
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                raise DataError(f"{self.key}: {name} cannot be read: {error}.") from error

    def _read_parquet(self, files: Files) -> Iterator[Document]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        records = self._records
        for path in files.paths:
            name = files.name(path)
            try:
                with files.opened(path) as file:
                    table = pq.ParquetFile(file)
                    records.require_columns(table.schema_arrow.names, name)
                    row = 0
                    for batch in table.iter_batches(_ROWS_AT_ONCE, columns=records.columns()):
                        for record in batch.to_pylist():
                            yield records.document(record, name, row)
                            row += 1
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{self.key}: {name} cannot be read as parquet: {error}.") from error

    def _read_dataset(self, location: str) -> Iterator[Document]:
        records, dataset = self._records, self._open_dataset(location)
        if dataset.column_names is not None:
            records.require_columns(dataset.column_names, self.split.source)
        names = getattr((dataset.features or {}).get(self.split.label or ""), "names", None)
        for row, record in enumerate(dataset.select_columns(records.columns())):
            if names is not None and record[self.split.label] is not None:
                record[self.split.label] = names[record[self.split.label]]
            yield records.document(record, self.split.split or "row", row)

    def _open_dataset(self, location: str) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise SpecError(f"{self.key}.source: {location} needs: pip install 'gradstore[datasets]'.") from error
        try:
            if "://" in location or any((Path(location) / name).exists() for name in _DATASET_FILES):
                opened = datasets.load_from_disk(location)
            else:
                opened = datasets.load_dataset(location, self.split.subset, streaming=self.streamed)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"{self.key}.source: {self.split.source!r} is no folder here that `datasets` reads, "
                f"and no dataset that the hub gives: {error}"
            ) from error
        if not isinstance(opened, Mapping):
            return opened
        if self.split.split not in opened:
            raise DataError(
                f"{self.key}.split: found {self.split.split!r}; {self.split.source} has: {', '.join(map(str, opened))}."
            )
        return opened[self.split.split]

    def _decode(self, content: bytes, name: str) -> str:
        """Decode by the first of the split's encodings that fits; one that is just wrong may fit too, so order matters."""
        encodings = [self.split.encoding] if isinstance(self.split.encoding, str) else self.split.encoding
        failure: UnicodeDecodeError | None = None
        for encoding in encodings:
            try:
                return content.decode(encoding)
            except UnicodeDecodeError as error:
                failure = failure or error
            except LookupError as error:
                raise SpecError(f"{self.key}.encoding: found {encoding!r}; Python knows no such encoding.") from error
        assert failure is not None, "spec.py refuses an empty list of encodings"
        raise DataError(
            f"{self.key}: {name} of {self.split.source} is not {' nor '.join(encodings)}: byte {failure.start} is "
            f"0x{content[failure.start]:02x}. Set {self.key}.encoding (latin-1 and cp1252 are common) or mend the file."
        ) from failure


def _may_be_hub_id(location: str) -> bool:
    """``name`` or ``owner/name``; anything else that does not exist is a path with a mistake in it."""
    path = Path(location)
    return not path.is_absolute() and len(path.parts) <= 2 and location[:1] not in (".", "~")
