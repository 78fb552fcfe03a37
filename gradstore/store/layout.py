"""The format, version 1: where every object lies, and the Zarr metadata that lets other tools read the arrays.

A store holds
    gradstore.json                                    format version, feature contract, the run that made the store
    features/<set>/claim.<version>.json               what the first to make this version of a feature set asked for
    features/<set>/set.<version>.json                 rows, blocks, arrays and data hash of a version that is ready
    features/<set>/<member>/<group>                   Zarr array [rows, features]; a lone member is m0
    features/<set>/scales/<member>                    Zarr array [rows, groups], where every row of a group has a scale
    features/<set>/inputs/<block>.<version>.parquet   what enters the model, written by who made that version of the set
    features/<set>/{examples,statistics}/<member>/<block>.parquet
    features/<set>/blocks/<member>/<block>.<generation>.json   commit records
    projections/<name>/{left,right}/<part>            Zarr arrays [r, O] and [r, I]
    kernels/<kind>/<member>/{eigenvalues,eigenvectors}/<group> Zarr arrays [d] and [d, d]
    kernels/ekfac/<member>/{left,right}/<part>        Zarr arrays [r_o, r_o] and [r_i, r_i]
    full-kernels/<route>/<member>/spectrum/{eigenvalues,rotation} Zarr arrays [r] and [p, r]
    full-kernels/<route>/<member>/basis/<group>       Zarr array [d, p]
    full-kernels/<route>/<member>/coordinates/<member> Zarr array [examples, p]
    partials/<of>/<member>/<phase>/sums/values        Zarr array [parts, rows, columns], while a kernel is being built
    self-influence/<kernel>/<member>/values/tau       Zarr array [examples, groups]
    queries/<kernel>/<set>/<member>/features/<group>  Zarr array [queries, features]
    queries/<kernel>/<set>/<member>/values/{self,coefficients} Zarr arrays [queries, groups] and [queries, groups, p]
    contributions/<kernel>/<set>/values/c             Zarr array [queries, examples, groups]
    moments/<kernel>/<set>/values/{second_moments,candidates,rows} Zarr arrays [spans, queries, ...]
    score-matrices/<kernel>.<weights>/<set>/values/s  Zarr array [queries, examples]
    sketches/<kernel>/basis/<member>/<group>          Zarr array [features, r]
    sketches/<kernel>/values/{levels,scales,checksums} Zarr arrays [examples, r], [examples] and [examples, members]
    sketches/<kernel>/recall.json
    weights/<name>/{weights,trajectory}.parquet
    scores/<name>/{proponents.parquet,summary.json}
and in the folder of each artifact, which are all but the feature sets,
    artifact.json                                     settings and number of units, of the first creator
    commits/<hash of artifact.json>/<unit>.<generation>.json   commit records
Beside all this jobs/<id>/ tells of runs that were submitted (gradstore/store/jobs.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gradstore.errors import SpecError
from gradstore.store.compression import COMPRESSIONS

if TYPE_CHECKING:
    from zarr.storage import MemoryStore

FORMAT_VERSION: Final = 1
STORE_FILE: Final = "gradstore.json"
ARTIFACT_FILE: Final = "artifact.json"
METADATA_FILE: Final = "zarr.json"
LONE_MEMBER: Final = "m0"
# One of SET_FOLDERS, with an array for each member of an int8 set.
SCALES_FOLDER: Final = "scales"

# Longest encoded group name: file systems take 255 bytes, and object stores 1,024 for the whole path.
_LONGEST_NAME: Final = 200
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RECORD: Final = re.compile(r"(?:.*/)?(\d+)\.(\d+)\.json")


def check_name(key: str, name: str) -> str:
    """Return the name of a set or artifact, which becomes a folder.

    Raises
    ------
    SpecError
        If it holds anything but letters, digits, ``.``, ``_`` and ``-``, or begins with one of the last three.
    """
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise SpecError(
            f"{key}: found {name!r}; accepted: at most {_LONGEST_NAME} letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit."
        )
    return name


@lru_cache(maxsize=4096)
def encode_group(name: str) -> str:
    """Return the folder name of a parameter group's array.

    Letters, digits, ``.``, ``_`` and ``-`` stay; every other byte of the UTF-8 text becomes ``%XX``, and so does the
    first character where a file system or Zarr would take the name for something else. A long name is cut and ends in
    ``~`` and the hash of the whole; no other name holds a ``~``. The real name is an attribute of the array.
    """
    encoded = "".join(
        character
        if re.fullmatch(r"[A-Za-z0-9._-]", character)
        else "".join(f"%{byte:02X}" for byte in character.encode())
        for character in name
    )
    if not encoded or encoded.startswith((".", "__")) or encoded == METADATA_FILE:
        encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}" if encoded else "%"
    if len(encoded) > _LONGEST_NAME:
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        encoded = f"{encoded[: _LONGEST_NAME - 33]}~{digest}"
    return encoded


def set_folder(name: str) -> str:
    """Folder of a feature set."""
    return f"features/{name}"


def group_array(folder: str, group: str) -> str:
    """Path of a group's array in a folder that holds one array per group."""
    return f"{folder}/{encode_group(group)}"


def set_path(folder: str, version: int) -> str:
    """Path of the document of one version of a feature set: 0 as it was created, one more with each append or erasure."""
    return f"{folder}/set.{version}.json"


def claim_path(folder: str, version: int) -> str:
    """Path of the document that says what the first to make a version of a feature set asked for."""
    return f"{folder}/claim.{version}.json"


def part_path(part: str, block: int) -> str:
    """Path, inside a feature set, of a block's parquet part: ``examples/<member>``, ``statistics/<member>``."""
    return f"{part}/{block:06d}.parquet"


def inputs_path(block: int, version: int) -> str:
    """Path, inside a feature set, of what enters the model for a block, as that version of the set has it."""
    return f"inputs/{block:06d}.{version}.parquet"


def chunk_path(array: str, *index: int) -> str:
    """Path of a chunk of a Zarr array: beside its metadata, since a folder for every chunk costs more than its file."""
    return f"{array}/{'.'.join(('c', *map(str, index)))}"


def metadata_path(node: str) -> str:
    """Path of the metadata of a Zarr array or group; ``""`` is the root."""
    return f"{node}/{METADATA_FILE}" if node else METADATA_FILE


def record_path(folder: str, unit: int, generation: int) -> str:
    """Path of a commit record in its folder."""
    return f"{folder}/{unit:06d}.{generation}.json"


def parse_record_path(path: str) -> tuple[int, int] | None:
    """(unit, generation) that a commit record's path names, or None for any other path."""
    match = _RECORD.fullmatch(path)
    return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBlocks:
    """Rows in blocks of ``block_rows``, the last of which may be shorter.

    Attributes
    ----------
    rows
        Length of the arrays.
    block_rows
        Rows of a block.
    gaps
        Rows [start, stop) that belong to no example: each from where an append found the end of the examples to the next
        multiple of ``block_rows``.
    """

    rows: int
    block_rows: int
    gaps: tuple[tuple[int, int], ...] = ()

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return -(-self.rows // self.block_rows)

    @property
    def num_examples(self) -> int:
        """Rows that belong to an example."""
        return self.rows - sum(stop - start for start, stop in self.gaps)

    def block_range(self, block: int) -> tuple[int, int]:
        """Rows [start, stop) of a block's examples."""
        start = block * self.block_rows
        stop = min(start + self.block_rows, self.rows)
        return start, min([stop, *(first for first, last in self.gaps if last == stop and first > start)])


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayLayout:
    """A Zarr array of the format: unsharded, one chunk per unit of work, checksummed, no number where unwritten.

    Attributes
    ----------
    shape, chunk_shape, dtype, dimension_names, attributes
        As its metadata has them.
    fill_value
        What an unwritten value reads as.
    compression
        Name in COMPRESSIONS.
    """

    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: str
    dimension_names: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    fill_value: float | int = math.nan
    compression: str = "none"

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Type of the values in a chunk: little-endian on every machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def raw_bytes(self) -> int:
        """Size of a chunk's values, padded to the whole chunk."""
        return int(np.prod(self.chunk_shape)) * self.stored_dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk object, its values and four bytes of crc32c; of a compressed one the largest."""
        compressor = COMPRESSIONS[self.compression]
        return self.raw_bytes + (0 if compressor is None else compressor.overhead_bytes) + 4

    @property
    def buffer_bytes(self) -> int:
        """Bytes that reading a chunk takes: a compressed one as it is stored, and its values."""
        return self.chunk_bytes + (0 if COMPRESSIONS[self.compression] is None else self.raw_bytes)

    @property
    def num_chunks(self) -> tuple[int, ...]:
        """Chunks along each axis."""
        return tuple(-(-length // chunk) for length, chunk in zip(self.shape, self.chunk_shape, strict=True))

    def chunk_extent(self, index: Sequence[int]) -> tuple[int, ...]:
        """Shape of what a chunk holds: shorter than ``chunk_shape`` at the ends of the array."""
        return tuple(
            min(chunk, length - place * chunk)
            for place, chunk, length in zip(index, self.chunk_shape, self.shape, strict=True)
        )


def metadata_objects(arrays: Mapping[str, ArrayLayout]) -> dict[str, bytes]:
    """Metadata, by path, of arrays and of every group above them, up to the root.

    zarr-python makes it, in memory, so that it is what zarr-python would have written; the store publishes it once. Of many
    arrays of one kind it makes the first, in which the others differ by four fields: seventeen times as fast.
    """
    from zarr import create_group
    from zarr.core.buffer import Buffer
    from zarr.storage import MemoryStore

    made: dict[str, Buffer] = {}
    store = MemoryStore(made)
    found: dict[str, bytes] = {}
    templates: dict[tuple[object, ...], dict[str, Any]] = {}
    for parent in dict.fromkeys(path.rpartition("/")[0] for path in arrays):
        create_group(store, path=parent)
    for path, layout in arrays.items():
        # As text: NaN is not equal to itself.
        kind = (layout.dtype, layout.compression, repr(layout.fill_value), len(layout.shape))
        if kind not in templates:
            _create_array(store, path, layout)
            templates[kind] = json.loads(made[metadata_path(path)].to_bytes())
        else:
            own = {
                "shape": layout.shape,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": layout.chunk_shape}},
                "attributes": layout.attributes,
                "dimension_names": layout.dimension_names,
            }
            found[metadata_path(path)] = json.dumps({**templates[kind], **own}, indent=2).encode()
    return {path: buffer.to_bytes() for path, buffer in made.items()} | found


def _create_array(store: MemoryStore, path: str, layout: ArrayLayout) -> None:
    from zarr import create_array
    from zarr.codecs import BytesCodec, Crc32cCodec

    compressor = COMPRESSIONS[layout.compression]
    compressors = [] if compressor is None else [compressor.zarr_codec(layout.stored_dtype.itemsize)]
    create_array(
        store,
        name=path,
        shape=layout.shape,
        chunks=layout.chunk_shape,
        chunk_key_encoding={"name": "default", "separator": "."},
        dtype=layout.dtype,
        fill_value=layout.fill_value,
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[*compressors, Crc32cCodec()],
        dimension_names=layout.dimension_names,
        attributes=json.loads(json.dumps(layout.attributes)),
    )
