"""A feature store: one feature contract, and the feature sets made under it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from itertools import zip_longest
from typing import Any

import pyarrow as pa

from gradstore.errors import ContractError, DataError, NotReadyError, ObjectMissingError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.blocks import ObjectEntry, publish_exactly, publish_metadata
from gradstore.store.codecs import decode_document, encode_document, encode_table, plain
from gradstore.store.contract import require_equal
from gradstore.store.features.feature_set import FeatureSet
from gradstore.store.features.info import SetInfo
from gradstore.store.layout import (
    FORMAT_VERSION,
    METADATA_FILE,
    SET_FILE,
    STORE_FILE,
    check_name,
    metadata_objects,
    part_path,
    set_folder,
)

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
        document = plain({"format_version": FORMAT_VERSION, "contract": contract, "run": run, "versions": versions})
        existing = _read_document(storage, STORE_FILE)
        if existing is None:
            storage.publish(STORE_FILE, encode_document(document).parts)
        store = cls.open(storage)
        remedy = "Restore these settings, or choose another run.store."
        require_equal(f"The store {storage.url}", store.contract, document["contract"], remedy=remedy)
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
        document = _read_document(storage, STORE_FILE)
        if document is None:
            raise NotReadyError(
                f"{storage.url}: no store is there ({STORE_FILE} is missing). Run `gradstore featurize` first, or "
                "correct run.store."
            )
        found = document.get("format_version")
        if found != FORMAT_VERSION:
            raise ContractError(
                f"{storage.url}: the store has format version {found}; this gradstore reads version {FORMAT_VERSION}. "
                "Use the gradstore that made it, or a newer one."
            )
        return cls(storage, document)

    def set_names(self) -> list[str]:
        """Names of the feature sets, in order."""
        names = self.storage.list_folders("features")
        return [name for name in names if _read_document(self.storage, f"{set_folder(name)}/{SET_FILE}") is not None]

    def open_set(self, name: str) -> FeatureSet:
        """Open a feature set.

        Raises
        ------
        NotReadyError
            If the store has no such set.
        """
        found = self._find_set(name)
        if found is None:
            raise NotReadyError(
                f"{self.storage.url}: there is no feature set {name}; found: {', '.join(self.set_names()) or 'none'}. "
                "Run `gradstore featurize` first."
            )
        return found

    def create_set(self, info: SetInfo, inputs: Iterable[pa.Table]) -> FeatureSet:
        """Create a feature set, or open the one that is there if it is of the same examples and groups.

        One process creates a set, before any worker writes a block of it; if it dies, creating again goes on.

        Parameters
        ----------
        info
            The set. Of one that is there, its own block_rows, dtype, scales and record of how it was made count.
        inputs
            For each block, in order, the table of what enters the model. Not read if the set is there.

        Raises
        ------
        ContractError
            If a set of that name is there and differs in its rows, data hash or arrays: one line for each field.
        DataError
            If there are not as many tables as blocks, or a table has not as many rows as its block.
        """
        existing = self._find_set(info.name)
        if existing is None:
            entries = self._publish_inputs(info, inputs)
            metadata = metadata_objects(
                {f"{info.folder}/{info.array_path(array.name)}": info.array_layout(array) for array in info.arrays}
            )
            publish_metadata(self.storage, info.folder, metadata)
            self._remove_leftovers(info, {f"{info.folder}/{path}" for path in entries} | set(metadata))
            inputs_entries = {path: asdict(entry) for path, entry in entries.items()}
            document = {"info": info.to_json(), "inputs": inputs_entries}
            # Last: a set without this document was not finished, and nobody reads it.
            self.storage.publish(f"{info.folder}/{SET_FILE}", encode_document(document).parts)
            existing = self.open_set(info.name)
        existing.info.require_same(info, f"The feature set {self.storage.url}/{info.folder}")
        return existing

    def _find_set(self, name: str) -> FeatureSet | None:
        document = _read_document(self.storage, f"{set_folder(check_name('feature set', name))}/{SET_FILE}")
        if document is None:
            return None
        inputs = {path: ObjectEntry(**entry) for path, entry in document["inputs"].items()}
        return FeatureSet(self.storage, SetInfo.from_json(document["info"]), inputs)

    def _publish_inputs(self, info: SetInfo, inputs: Iterable[pa.Table]) -> dict[str, ObjectEntry]:
        entries: dict[str, ObjectEntry] = {}
        for block, table in zip_longest(range(info.num_blocks), inputs):
            if block is None or table is None:
                given = f"more than {info.num_blocks}" if block is None else f"only {block}"
                raise DataError(
                    f"feature set {info.name}: has {info.num_blocks} blocks; {given} input tables were given."
                )
            start, stop = info.block_range(block)
            if table.num_rows != stop - start:
                raise DataError(
                    f"feature set {info.name}: block {block} has {stop - start} rows; its input table has {table.num_rows}."
                )
            payload = encode_table(table)
            path = part_path("inputs", block)
            publish_exactly(self.storage, f"{info.folder}/{path}", payload.parts)
            entries[path] = ObjectEntry(bytes=payload.bytes, crc32c=payload.crc32c)
        return entries

    def _remove_leftovers(self, info: SetInfo, expected: set[str]) -> None:
        """Remove inputs and metadata of a creation with other settings that was not finished.

        Only these: where two creators of equal settings race, workers of the faster one may be writing blocks.
        """
        for found in list(self.storage.list_objects(info.folder)):
            made_by_creators = found.path.endswith(f"/{METADATA_FILE}") or found.path.startswith(
                f"{info.folder}/inputs/"
            )
            if made_by_creators and found.path not in expected:
                self.storage.delete(found.path)


def _read_document(storage: Storage, path: str) -> dict[str, Any] | None:
    try:
        return decode_document(storage.read(path), f"{storage.url}/{path}")
    except ObjectMissingError:
        return None
