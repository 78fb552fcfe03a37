"""Writing and reading the blocks of one feature set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gradstore.errors import DataError, IntegrityError, NotReadyError, ObjectMissingError, SupersededError
from gradstore.store.backend import Storage
from gradstore.store.blocks import Buffers, ObjectEntry, in_parallel, read_object
from gradstore.store.codecs import checksum, decode_table, encode_table
from gradstore.store.commits import Attempt, CommitLog, Record
from gradstore.store.features.chunks import FeatureChunks, Put
from gradstore.store.features.info import SetVersion, Snapshot
from gradstore.store.layout import part_path, set_path


class FeatureSet:
    """One member's features in a feature set of a store; `FeatureStore.create_set` and `FeatureStore.open_set` make it.

    Reading and writing are safe from several threads and, but for the buffers, from any number of processes. Of every block
    one generation is read throughout: that of the snapshot, or else of the first read. An append is not seen by a set that
    was opened before it; a block that a repair or an erasure took back ends its readers and writers with SupersededError.
    """

    def __init__(self, storage: Storage, version: SetVersion, member: str, *, buffers: Buffers | None = None) -> None:
        self.storage = storage
        self.version = version
        self.info = version.info
        self.member = member
        self.log = CommitLog(storage, f"{self.info.folder}/blocks/{member}", "featurize")
        self._buffers = Buffers() if buffers is None else buffers
        self._chunks = FeatureChunks(self.info, member, self.log, self._buffers)
        self._arrays = {array.name: array for array in self.info.arrays}
        self._begun: dict[int, int] = {}
        self._inputs = version.input_paths()

    def of_member(self, member: str) -> FeatureSet:
        """Return the same set as another of its members has it; both share the memory that chunks are read into.

        Raises
        ------
        NotReadyError
            If the set has no such member.
        """
        if member not in self.info.members:
            raise NotReadyError(f"{self._where}: has no member {member}; found: {', '.join(self.info.members)}.")
        return FeatureSet(self.storage, self.version, member, buffers=self._buffers)

    def missing_blocks(self) -> list[int]:
        """Blocks that are not committed, in order."""
        return self.log.missing(self.info.num_blocks)

    def snapshot(self) -> Snapshot:
        """Return the blocks and the generations that this opened set reads from now on.

        Raises
        ------
        NotReadyError
            If a block is not committed.
        """
        units = {block: generation for block, generation in self.log.pin().items() if block < self.info.num_blocks}
        if len(units) < self.info.num_blocks:
            raise NotReadyError(
                f"{self._where}: {len(units)} of {self.info.num_blocks} blocks are committed. Run `gradstore featurize` "
                "again: it computes the missing ones."
            )
        return Snapshot(feature_set=self.info.name, member=self.member, blocks=tuple(units.items()))

    def read_inputs(self, block: int) -> pa.Table:
        """What enters the model for a block's rows: the table that the creator gave; of erased rows nothing is left.

        Raises
        ------
        ObjectMissingError, IntegrityError
            If it is not there, or not what the creator wrote.
        """
        return decode_table(self._read_input(self._inputs[block]))

    def damaged_inputs(self) -> list[int]:
        """Blocks whose table of inputs is missing or not what the creator wrote; all are read."""

        def is_damaged(block: int) -> bool:
            try:
                self._read_input(self._inputs[block])
            except (ObjectMissingError, IntegrityError):
                return True
            return False

        blocks = range(self.info.num_blocks)
        damaged = in_parallel(is_damaged, blocks, threads=self.storage.concurrency)
        return [block for block, found in zip(blocks, damaged, strict=True) if found]

    def begin(self, block: int) -> bool:
        """Begin an attempt at a block, before its inputs are read; False if the block is committed.

        Raises
        ------
        SupersededError
            If the block was taken back and the set has changed since this one was opened: an erased row would come back.
        """
        generation = self.log.begin(block)
        if generation is None:
            return False
        if generation > 0:
            self.refuse_an_older_version()
        self._begun[block] = generation
        return True

    def write_block(
        self,
        block: int,
        features: Mapping[str, npt.NDArray[np.float32]],
        *,
        examples: pa.Table,
        statistics: pa.Table,
        facts: Mapping[str, Any],
    ) -> Record:
        """Write and commit a block, unless it is committed; return the record that counts.

        The attempt began with `begin`, or begins now.

        Parameters
        ----------
        block
            The block.
        features
            float32 [rows, k_j] of every group.
        examples
            The example table of the block's rows.
        statistics
            Sums over the block's valid rows, one row for each group or part of one.
        facts
            What to keep in the record beside ``rows``, ``nan_rows`` (rows in which a feature is not finite),
            ``saturated`` and ``flushed`` (numbers that the dtype could not hold, and that it made zero), and
            ``saturated_groups`` (where), and ``erased`` (rows of the block whose example was erased).

        Raises
        ------
        DataError
            If the features or examples do not have the block's shape, or a column has no type.
        SupersededError
            If the block was taken back since the attempt began.
        """
        if block not in self._begun and not self.begin(block):
            latest = self.log.latest(block)
            assert latest is not None
            return latest
        generation = self._begun.pop(block)
        # Looked for before anything is written, so that only one that is stopped while it writes leaves objects behind.
        self.log.refuse_overtaken(block, generation)
        self._check(block, features, examples)
        self._check_types(block, examples, statistics)
        attempt = Attempt(self.log, block, generation)
        tables = {"examples": examples, "statistics": statistics}
        objects, found = self.put_block(block, features, tables, attempt.publish)
        return attempt.commit(objects, {**facts, **found})

    def put_block(
        self,
        block: int,
        features: Mapping[str, npt.NDArray[np.float32]],
        tables: Mapping[str, pa.Table],
        put: Put,
    ) -> tuple[dict[str, ObjectEntry], dict[str, Any]]:
        """Encode the objects of a block and store each with ``put``; return their entries, and what was found of them."""
        written = self._chunks.write(block, features, put)
        objects = dict(written.objects)
        for part, table in tables.items():
            path = part_path(f"{part}/{self.member}", block)
            objects[path] = put(f"{self.info.folder}/{path}", encode_table(table))
        erased = self.info.erased_in(block)
        assert not written.finite_rows[erased].any(), "of an erased row no feature may be written"
        found: dict[str, Any] = {
            "rows": len(written.finite_rows),
            "nan_rows": len(written.finite_rows) - int(np.count_nonzero(written.finite_rows)),
            "saturated": written.rounding.saturated,
            "flushed": written.rounding.flushed,
            "saturated_groups": written.saturated_groups,
        }
        return objects, found | ({"erased": erased} if erased else {})

    def read_block(
        self,
        block: int,
        names: Sequence[str] | None = None,
        out: Mapping[str, npt.NDArray[np.float32]] | None = None,
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Features of a committed block, by group: float32 [rows, k_j], in their true scale, checksums verified.

        Parameters
        ----------
        block
            The block.
        names
            Groups to read; all by default.
        out
            Contiguous float32 arrays [at least rows, k_j] to read into, by group; what is returned are views of them.
            Without them new arrays are made, which costs about as much as the read.

        Raises
        ------
        NotReadyError
            If the block is not committed.
        IntegrityError
            If a chunk is not what the commit record says.
        """
        record = self._record(block)
        names = list(self._arrays) if names is None else names
        start, stop = self.info.block_range(block)
        shapes = {name: (stop - start, self._arrays[name].features) for name in names}
        into = {
            name: np.empty(shape, np.float32) if out is None else out[name][: shape[0]]
            for name, shape in shapes.items()
        }
        self._chunks.read(record, into)
        return into

    def read_rows(self, block: int, rows: Sequence[int], out: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Read some rows of a committed block, counted from its first: float32 [rows, k_j] of every group of ``out``.

        What is read of a chunk in ranges no checksum vouches for: the caller must have one of every row.
        """
        self._chunks.read_rows(self._record(block), rows, out)

    @property
    def reads_in_place(self) -> bool:
        """Whether `read_in_place` can be asked for: chunks hold the float32 numbers that they read as."""
        return self._chunks.are_as_they_read

    def read_in_place(self, block: int, name: str, memory: npt.NDArray[np.uint8]) -> None:
        """Read a group of a committed block to the beginning of memory that holds a whole chunk: float32 [rows, k_j].

        It saves the copy that `read_block` makes, and raises what that does.
        """
        self._chunks.read_in_place(self._record(block), name, memory)

    def read_half_erased(
        self, of: Record, erased: Sequence[int]
    ) -> tuple[dict[str, npt.NDArray[np.float32]], pa.Table]:
        """Features, by group, and example table of a block of which an erasure of some rows was not finished.

        Every object is still what the record ``of`` says, or already without these rows.

        Raises
        ------
        ObjectMissingError, IntegrityError
            If one is missing, or neither.
        """
        start, stop = self.info.block_range(of.unit)
        found = {array.name: np.empty((stop - start, array.features), np.float32) for array in self.info.arrays}
        crcs = self._chunks.read_as_they_are(of.unit, found)
        rows = list(erased)
        for path, name in zip(crcs, found, strict=True):
            if crcs[path] != of.objects[path].crc32c and not np.isnan(found[name][rows]).all():
                raise self._neither(path)
        path = part_path(f"examples/{self.member}", of.unit)
        place = f"{self.info.folder}/{path}"
        self.storage.forget(place)
        data = self.storage.read(place)
        table = decode_table(data, verify=True)
        if checksum(data) != of.objects[path].crc32c and any(table["valid"].take(rows).to_pylist()):
            raise self._neither(path)
        return found, table

    def _neither(self, path: str) -> IntegrityError:
        return IntegrityError(
            f"{self._where}/{path}: is neither what was committed nor what an erasure makes of it. {self.log.remedy()}"
        )

    def invalid_blocks(self) -> list[int]:
        """Committed blocks in which some row is not valid: its features are NaN."""
        facts = self.log.facts()
        return [block for block, told in facts.items() if told["nan_rows"] and block < self.info.num_blocks]

    def valid_rows(self) -> npt.NDArray[np.bool_]:
        """Which rows [rows] are of a valid example, in a set of which every block is committed; those of gaps are not."""
        valid = np.zeros(self.info.rows, bool)
        for block in range(self.info.num_blocks):
            valid[slice(*self.info.block_range(block))] = True
        for block in self.invalid_blocks():
            valid[slice(*self.info.block_range(block))] = self.valid_in(block)
        return valid

    def valid_in(self, block: int) -> npt.NDArray[np.bool_] | None:
        """Which rows of a committed block are of a valid example; None where all are, which its record tells."""
        if not self._record(block).facts["nan_rows"]:
            return None
        mask: npt.NDArray[np.bool_] = self.read_examples(["valid"], block=block)["valid"].to_numpy()
        return mask

    def read_column(self, name: str) -> list[Any]:
        """Return a column of the example table by row, [rows]: None where a row is in a gap or its block not committed."""
        table = self.read_examples(["row", name])
        column: list[Any] = [None] * self.info.rows
        for row, value in zip(table["row"].to_pylist(), table[name].to_pylist(), strict=True):
            column[row] = value
        return column

    def read_examples(self, columns: Sequence[str] | None = None, *, block: int | None = None) -> pa.Table:
        """Return the example table, or some of its columns, of one committed block or of all, in the order of rows."""
        return self._read_parts("examples", lambda data: decode_table(data, columns), block)

    def read_statistics(self, columns: Sequence[str] | None = None, *, block: int | None = None) -> pa.Table:
        """Return the statistics, or some of their columns, of one committed block or of all, in the order of blocks."""
        return self._read_parts("statistics", lambda data: decode_table(data, columns), block)

    @property
    def _where(self) -> str:
        return f"{self.storage.url}/{self.info.folder}"

    def _read_input(self, path: str) -> bytes:
        place, remedy = f"{self.info.folder}/{path}", "Run `gradstore featurize` again: it restores it."
        entry = self.version.inputs[path]
        try:
            return read_object(self.storage, place, entry, remedy=remedy)
        except (ObjectMissingError, IntegrityError):
            # Perhaps a kept copy of another version.
            self.storage.forget(place)
            return read_object(self.storage, place, entry, remedy=remedy)

    def refuse_an_older_version(self) -> None:
        """Make sure that the set is what it was when it was opened.

        Raises
        ------
        SupersededError
            If examples were appended or erased since.
        """
        path = set_path(self.info.folder, self.version.number + 1)
        try:
            self.storage.read(path)
        except ObjectMissingError:
            return
        raise SupersededError(
            f"{self._where}: examples were appended or erased since it was opened ({path} is there). Run the same command "
            "again: it sees what is there now."
        )

    def _record(self, block: int) -> Record:
        what = (
            f"{self._where}: block {block} is not committed. Run `gradstore featurize`: it computes the missing blocks."
        )
        return self.log.require(block, what)

    def _check(self, block: int, features: Mapping[str, npt.NDArray[np.float32]], examples: pa.Table) -> None:
        start, stop = self.info.block_range(block)
        rows = stop - start
        where = f"{self._where}: block {block}"
        if not 0 <= block < self.info.num_blocks:
            raise DataError(f"{where}: the set has {self.info.num_blocks} blocks.")
        if examples.num_rows != rows:
            raise DataError(f"{where}: has {rows} rows; the example table has {examples.num_rows}.")
        if set(features) != set(self._arrays):
            strange = sorted(set(features) ^ set(self._arrays))
            raise DataError(f"{where}: features and arrays of the set must be of the same groups; not so: {strange}.")
        for name, array in self._arrays.items():
            found = features[name]
            if found.shape != (rows, array.features) or found.dtype != np.float32:
                raise DataError(
                    f"{where}: {name}: found {found.dtype} {list(found.shape)}; "
                    f"the set takes float32 {[rows, array.features]}."
                )

    def _check_types(self, block: int, *tables: pa.Table) -> None:
        """Refuse columns of nulls alone: as parquet they have no type, and the folder of parts no common schema."""
        untyped = [column.name for table in tables for column in table.schema if pa.types.is_null(column.type)]
        if untyped:
            raise DataError(
                f"{self._where}: block {block}: columns without a type: {', '.join(untyped)}. Give the tables a schema."
            )

    def _read_parts(self, part: str, decode: Callable[[bytes], pa.Table], block: int | None) -> pa.Table:
        def read(record: Record) -> pa.Table:
            path = part_path(f"{part}/{self.member}", record.unit)
            place, entry, remedy = f"{self.info.folder}/{path}", record.objects[path], self.log.remedy()
            data = self.log.read(record, place, lambda: read_object(self.storage, place, entry, remedy=remedy))
            return decode(data)

        if block is None:
            records = [record for unit, record in self.log.committed().items() if unit < self.info.num_blocks]
        else:
            records = [self._record(block)]
        tables = in_parallel(read, records, threads=self.storage.concurrency)
        return pa.concat_tables(tables) if tables else pa.table({})
