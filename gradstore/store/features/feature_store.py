"""A feature store: one feature contract, and the feature sets made under it."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from gradstore.errors import DataError, NotReadyError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.blocks import (
    ObjectEntry,
    claim_document,
    publish_metadata,
    publish_object,
    read_document,
)
from gradstore.store.codecs import encode_document, encode_table, plain
from gradstore.store.contract import require_equal, require_version
from gradstore.store.features.feature_set import FeatureSet
from gradstore.store.features.info import RESTORE, SetInfo
from gradstore.store.layout import (
    CLAIM_FILE,
    FORMAT_VERSION,
    SET_FILE,
    STORE_FILE,
    check_name,
    part_path,
    set_folder,
)

_RESTORE_STORE = "Restore it from a copy, or choose another run.store."
_RECORDED_PACKAGES = ("gradstore", "numpy", "pyarrow", "zarr")


class FeatureStore:
    """A store, opened; `create` and `open` make it.

    Attributes
    ----------
    storage
        Where its objects are.
    contract
        The feature contract: what every feature set of the store has in common, and what a run must match.
    run
        run.toml as resolved by the run that made the store.
    """

    def __init__(self, storage: Storage, document: Mapping[str, Any]) -> None:
        self.storage = storage
        self.contract: Mapping[str, Any] = document["contract"]
        self.run: Mapping[str, Any] = document["run"]

    @classmethod
    def create(cls, url: str | Storage, *, contract: Mapping[str, Any], run: Mapping[str, Any]) -> FeatureStore:
        """Create a store, or open the one that is there if its feature contract is equal.

        Raises
        ------
        ContractError
            If a store is there and its contract differs: one line for each field.
        """
        storage = open_storage(url) if isinstance(url, str) else url
        versions = {name: version(name) for name in _RECORDED_PACKAGES} | {"python": platform.python_version()}
        document = {"format_version": FORMAT_VERSION, "contract": contract, "run": run, "versions": versions}
        claim_document(storage, STORE_FILE, document, remedy=_RESTORE_STORE)
        store = cls.open(storage)
        remedy = "Restore these settings, or choose another run.store."
        require_equal(f"The store {storage.url}", store.contract, plain(contract), remedy=remedy)
        return store

    @classmethod
    def open(cls, url: str | Storage) -> FeatureStore:
        """Open a store.

        Raises
        ------
        NotReadyError
            If there is none at the URL.
        ContractError
            If a newer gradstore made it, in a format that this one does not know.
        """
        storage = open_storage(url) if isinstance(url, str) else url
        document = read_document(storage, STORE_FILE, remedy=_RESTORE_STORE)
        if document is None:
            raise NotReadyError(
                f"{storage.url}: no store is there ({STORE_FILE} is missing). Run `gradstore featurize` first, or "
                "correct run.store."
            )
        require_version(f"The store {storage.url}", document)
        return cls(storage, document)

    def set_names(self) -> list[str]:
        """Names of the feature sets, in order."""
        names = self.storage.list_folders("features")
        return [name for name in names if self._read_set(name) is not None]

    def open_set(self, name: str, member: str | None = None) -> FeatureSet:
        """Open a feature set, as one of its members has it: the first unless another is named.

        Raises
        ------
        NotReadyError
            If the store has no such set, or the set no such member.
        """
        found = self._find_set(name)
        if found is None:
            raise NotReadyError(
                f"{self.storage.url}: there is no feature set {name}; found: {', '.join(self.set_names()) or 'none'}. "
                "Run `gradstore featurize` first."
            )
        return found if member is None else found.of_member(member)

    def create_set(self, info: SetInfo, inputs: Iterable[pa.Table]) -> FeatureSet:
        """Create a feature set, or open the one that is there if it is of the same examples and groups.

        One process creates a set, before any worker writes a block of it; if it dies, creating again goes on. Whoever
        creates publishes claim.json first, or takes on the one that is there: so of creators at once, or one after another's
        death, all write the same objects.

        Parameters
        ----------
        info
            The set. Of one that is there or claimed, its own block_rows, dtype, scales and record of how it was made count.
        inputs
            What enters the model: tables of consecutive rows, which are cut at the set's blocks. Not read if the set is
            there and those that it holds are sound; what is missing or damaged of them is written anew.

        Raises
        ------
        ContractError
            If a set of that name is there or claimed and differs in its rows, data hash or arrays: one line for each field.
        DataError
            If the tables have not as many rows as the set.
        """
        where = f"The feature set {self.storage.url}/{info.folder}"
        existing = self._find_set(info.name)
        if existing is None:
            folder = f"{self.storage.url}/{info.folder}"
            claim = claim_document(
                self.storage,
                f"{info.folder}/{CLAIM_FILE}",
                {"info": info.to_json()},
                remedy=f"Delete the folder {folder}, then run `gradstore featurize` again: it makes the set anew.",
            )
            claimed = SetInfo.from_json(claim["info"])
            remedy = (
                f"{RESTORE} The set's creation was not finished: if no other run is at it, delete the folder {folder}, "
                "then run the same command again."
            )
            claimed.require_same(info, where, remedy=remedy)
            self._publish_set(claimed, inputs)
            existing = self.open_set(info.name)
            existing.info.require_same(info, where)
        else:
            existing.info.require_same(info, where)
            existing = self._restore_set(existing, inputs)
        if existing.missing_blocks():
            self.storage.sweep(info.folder)
        return existing

    def _find_set(self, name: str) -> FeatureSet | None:
        document = self._read_set(check_name("feature set", name))
        if document is None:
            return None
        inputs = {path: ObjectEntry(**entry) for path, entry in document["inputs"].items()}
        info = SetInfo.from_json(document["info"])
        return FeatureSet(self.storage, info, inputs, info.members[0])

    def _read_set(self, name: str) -> dict[str, Any] | None:
        # The claim holds all that the document does but for the entries of the inputs, which its creator publishes again.
        remedy = "Delete it, then run `gradstore featurize` again: it makes it anew and keeps the blocks."
        return read_document(self.storage, f"{set_folder(name)}/{SET_FILE}", remedy=remedy)

    def _restore_set(self, existing: FeatureSet, inputs: Iterable[pa.Table]) -> FeatureSet:
        """Publish what is missing of a set's metadata, and its inputs where one is missing or damaged."""
        info = existing.info
        damaged = existing.damaged_inputs()
        if not damaged:
            self._publish_metadata(info)
            return existing
        # Another version of pyarrow writes other bytes, so set.json, which names them, is written anew with them; a
        # creation that dies between is finished from the claim like any other.
        remedy = "Delete it, then run `gradstore featurize` again: it makes it anew."
        claim_document(self.storage, f"{info.folder}/{CLAIM_FILE}", {"info": info.to_json()}, remedy=remedy)
        for path in (f"{info.folder}/{SET_FILE}", *damaged):
            self.storage.delete(path)
        self._publish_set(info, inputs)
        return self.open_set(info.name)

    def _publish_metadata(self, info: SetInfo) -> None:
        arrays = {
            f"{info.folder}/{info.array_path(member, array.name)}": info.array_layout(array)
            for member in info.members
            for array in info.arrays
        }
        publish_metadata(self.storage, arrays)

    def _publish_set(self, info: SetInfo, inputs: Iterable[pa.Table]) -> None:
        """Publish all that its creator makes of a set, keeping what another creator published under the same claim."""
        entries = {}
        for block, table in enumerate(_cut_at_blocks(info, inputs)):
            path = part_path("inputs", block)
            # A sound one of another creator is kept: the data hash, which the claim holds, says that it is the same.
            entries[path] = asdict(publish_object(self.storage, f"{info.folder}/{path}", encode_table(table)))
        self._publish_metadata(info)
        document = {"info": info.to_json(), "inputs": entries}
        # Last: a set without this document was not finished, and nobody reads it.
        self.storage.publish(f"{info.folder}/{SET_FILE}", encode_document(document).parts)


def _cut_at_blocks(info: SetInfo, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Cut tables of consecutive rows at the blocks of a set, of which the claim, not the giver of the tables, decides."""
    rows = deque(stop - start for start, stop in map(info.block_range, range(info.num_blocks)))
    left, given = None, 0
    for table in tables:
        given += table.num_rows
        left = table if left is None else pa.concat_tables([left, table])
        while rows and left.num_rows >= rows[0]:
            yield left.slice(0, rows[0]).combine_chunks()
            left = left.slice(rows.popleft())
    if given != info.rows:
        raise DataError(f"feature set {info.name}: has {info.rows} rows; its input tables have {given}.")
