"""The kinds of files that features are exported to. A new kind is one class here and one line in `KINDS`."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gradstore.errors import ResourceError
from gradstore.opening.datasets import variable_names
from gradstore.stages.export.selection import Chosen
from gradstore.store.features import FeatureArray
from gradstore.store.features.reader import BlockReader

Advance = Callable[[int], None]

# Names in a file that are not groups'.
RESERVED: Final = frozenset({"row", "example_id", "label", "gradstore", "__metadata__"})

# Features of a row group: enough to scan fast, and little beside a block.
_ROW_GROUP_BYTES: Final = 64 * 2**20
# Stacks of threads, encoders, arenas of the allocator.
_OVERHEAD_BYTES: Final = 32 * 2**20
# What safetensors' own reader takes.
_LARGEST_HEADER: Final = 100_000_000


class FileKind(Protocol):
    """Writes features to one kind of file."""

    advice: str
    """How to need less memory, where it is short."""

    def memory_bytes(self, chosen: Chosen) -> int:
        """Most that `write` holds at once."""

    def write(self, path: Path, chosen: Chosen, about: Mapping[str, Any], advance: Advance) -> None:
        """Write the file; ``about`` tells where the features come from. ``advance`` is called with rows x groups done."""


class Parquet:
    """One column per group, of lists of fixed size, beside row, example_id and label; written block by block."""

    advice = "Choose fewer groups (--groups)."

    def memory_bytes(self, chosen: Chosen) -> int:
        """See `FileKind.memory_bytes`."""
        block_bytes = max(len(piece.within) for piece in chosen.pieces) * chosen.row_bytes
        return self._reader(chosen).memory_bytes + block_bytes + 2 * _ROW_GROUP_BYTES + _OVERHEAD_BYTES

    def write(self, path: Path, chosen: Chosen, about: Mapping[str, Any], advance: Advance) -> None:
        """See `FileKind.write`."""
        names = file_names(chosen)
        fields = [pa.field(names[array.name], pa.list_(pa.float32(), array.features)) for array in chosen.arrays]
        schema = pa.schema([*chosen.examples.schema, *fields], {"gradstore": json.dumps(about)})
        tables = ["row", "example_id", "label"]
        blocks = self._reader(chosen).read(piece.block for piece in chosen.pieces)
        # Gradient features do not compress, and their least and greatest values help no query.
        options: dict[str, Any] = {"compression": "none", "use_dictionary": ["label"], "write_statistics": tables}
        with pq.ParquetWriter(path, schema, write_page_checksum=True, **options) as writer:
            for piece, found in zip(chosen.pieces, blocks, strict=True):
                columns = chosen.examples.slice(piece.first, len(piece.within)).columns
                columns += [_lists(_rows(found.rows[array.name], piece.within)) for array in chosen.arrays]
                rows_at_once = max(1, _ROW_GROUP_BYTES // max(1, chosen.row_bytes))
                writer.write_table(pa.table(columns, schema=schema), row_group_size=rows_at_once)
                advance(len(piece.within) * len(chosen.arrays))

    def _reader(self, chosen: Chosen) -> BlockReader:
        return BlockReader([chosen.feature_set], [[array.name for array in chosen.arrays]])


class _Arrays:
    """What kinds of one array per group share: group after group, so that memory holds one."""

    advice = "Write a parquet file, which is written block by block, or choose fewer rows (--rows, --ids)."

    def memory_bytes(self, chosen: Chosen) -> int:
        """See `FileKind.memory_bytes`."""
        widest = max(chosen.arrays, key=lambda array: array.features)
        return 4 * chosen.num_rows * widest.features + _reader_of(chosen, widest).memory_bytes + _OVERHEAD_BYTES


class Npz(_Arrays):
    """numpy's archive of arrays, uncompressed: ``row``, ``example_id``, ``label``, and one array per group."""

    def write(self, path: Path, chosen: Chosen, about: Mapping[str, Any], advance: Advance) -> None:
        """See `FileKind.write`."""
        names = file_names(chosen)
        facts = {
            "row": chosen.examples["row"].to_numpy(),
            # Texts of fixed width: numpy would pickle any other.
            "example_id": np.array(chosen.examples["example_id"].to_pylist(), np.str_),
            "label": np.array([label or "" for label in chosen.examples["label"].to_pylist()], np.str_),
            "gradstore": np.array(json.dumps(about)),
        }
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, values in facts.items():
                _add(archive, name, values)
            for array, values in _by_group(chosen, advance):
                _add(archive, names[array.name], values)


class Safetensors(_Arrays):
    """One tensor per group; row numbers, ids and labels as JSON in the metadata.

    Written here and not by the safetensors library, which takes all tensors at once.
    """

    def write(self, path: Path, chosen: Chosen, about: Mapping[str, Any], advance: Advance) -> None:
        """See `FileKind.write`."""
        names, start = file_names(chosen), 0
        facts = {name: chosen.examples[name].to_pylist() for name in ("row", "example_id", "label")}
        header: dict[str, Any] = {
            "__metadata__": {name: json.dumps(value) for name, value in {**facts, "gradstore": about}.items()}
        }
        for array in chosen.arrays:
            stop = start + 4 * chosen.num_rows * array.features
            shape = [chosen.num_rows, array.features]
            header[names[array.name]] = {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > _LARGEST_HEADER:
            raise ResourceError(
                f"{path.suffix}: the ids of {chosen.num_rows:,} rows take {len(text):,} bytes of metadata; a safetensors "
                f"file may have {_LARGEST_HEADER:,}. Write a parquet file, or choose fewer rows (--rows, --ids)."
            )
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, values in _by_group(chosen, advance):
                file.write(values.astype("<f4", copy=False).data)


KINDS: Final[Mapping[str, FileKind]] = {".parquet": Parquet(), ".npz": Npz(), ".safetensors": Safetensors()}


def file_names(chosen: Chosen) -> dict[str, str]:
    """Name of every chosen group in the file: its own, unless that is reserved."""
    return variable_names([array.name for array in chosen.arrays], RESERVED)


def _by_group(chosen: Chosen, advance: Advance) -> Iterator[tuple[FeatureArray, np.ndarray]]:
    """(group, float32 [rows, k_j]) of every group; one array takes the place of the one before."""
    widest = max(array.features for array in chosen.arrays)
    memory = np.empty(chosen.num_rows * widest, np.float32)
    for array in chosen.arrays:
        values = memory[: chosen.num_rows * array.features].reshape(chosen.num_rows, array.features)
        found = _reader_of(chosen, array).read(piece.block for piece in chosen.pieces)
        for piece, block in zip(chosen.pieces, found, strict=True):
            values[piece.first : piece.first + len(piece.within)] = _rows(block.rows[array.name], piece.within)
            advance(len(piece.within))
        yield array, values


def _reader_of(chosen: Chosen, array: FeatureArray) -> BlockReader:
    # A piece is one chunk here, so as many are read ahead as the storage serves at once.
    return BlockReader([chosen.feature_set], [[array.name]], ahead=chosen.feature_set.storage.concurrency)


def _rows(values: np.ndarray, within: np.ndarray) -> np.ndarray:
    """Rows of a block; no copy where they are all of them."""
    return values if len(within) == len(values) else values[within]


def _lists(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def _add(archive: zipfile.ZipFile, name: str, values: np.ndarray) -> None:
    # The date is the oldest that zip has, so that equal features make equal files.
    entry = zipfile.ZipInfo(f"{name}.npy")
    with archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array(file, values, allow_pickle=False)
