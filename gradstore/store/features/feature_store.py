"""A feature store: one feature contract, and the feature sets made under it."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import pyarrow as pa

from gradstore.errors import NotReadyError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.blocks import (
    ObjectEntry,
    claim_document,
    publish_metadata,
    publish_object,
    read_document,
)
from gradstore.store.codecs import Payload, as_written, encode_document, encode_table, plain
from gradstore.store.contract import require_equal, require_version
from gradstore.store.features.feature_set import FeatureSet
from gradstore.store.features.info import RESTORE, SetInfo, SetVersion
from gradstore.store.features.inputs import inputs_of_blocks
from gradstore.store.layout import (
    FORMAT_VERSION,
    STORE_FILE,
    ArrayLayout,
    check_name,
    claim_path,
    inputs_path,
    metadata_objects,
    set_folder,
    set_path,
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
        return [name for name in names if self.find_set(name) is not None]

    def open_set(self, name: str, member: str | None = None) -> FeatureSet:
        """Open a feature set, as one of its members has it: the first unless another is named.

        Raises
        ------
        NotReadyError
            If the store has no such set, or the set no such member.
        """
        found = self.find_set(name)
        if found is None:
            raise NotReadyError(
                f"{self.storage.url}: there is no feature set {name}; found: {', '.join(self.set_names()) or 'none'}. "
                "Run `gradstore featurize` first."
            )
        return found if member is None else found.of_member(member)

    def create_set(self, info: SetInfo, inputs: Iterable[pa.Table]) -> FeatureSet:
        """Create a feature set, or open the one that is there if it is of the same examples and groups.

        One process creates a set, before any worker writes a block of it; if it dies, creating again goes on. Whoever
        creates publishes claim.0.json first, or takes on the one that is there: so of creators at once, or one after another's
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
        existing = self.find_set(info.name)
        if existing is None:
            folder = f"{self.storage.url}/{info.folder}"
            remedy = (
                f"{RESTORE} The set's creation was not finished: if no other run is at it, delete the folder {folder}, "
                "then run the same command again."
            )
            claimed = self.claim_version(0, info)
            claimed.require_same(info, where, remedy=remedy)
            self.publish_version(0, claimed, self._publish_inputs(claimed, 0, inputs))
            existing = self.open_set(info.name)
            existing.info.require_same(info, where)
        else:
            existing.info.require_same(info, where)
            existing = self._restore_set(existing, info, inputs)
        if existing.missing_blocks():
            self.storage.sweep(info.folder)
        return existing

    def extend_set(self, name: str, extended: SetInfo, inputs: Iterable[pa.Table]) -> FeatureSet:
        """Append examples to a set, in blocks of their own: a new version of it. If it dies, extending again goes on.

        One process extends a set. Those who opened it before read on what it was; what is made from it is stale then.

        Parameters
        ----------
        name
            The set.
        extended
            What it becomes: `SetInfo.appended` of what it is.
        inputs
            What enters the model: tables of the appended rows alone.

        Raises
        ------
        ContractError
            If another append was begun and not finished, or another change came first.
        DataError
            If the tables have not as many rows as are appended.
        """
        existing = self.open_set(name)
        number = existing.version.number + 1
        claimed = self.claim_version(number, extended)
        where = f"The feature set {self.storage.url}/{extended.folder}"
        claim = f"{self.storage.url}/{claim_path(extended.folder, number)}"
        remedy = f"Another change of it was begun and not finished: finish that, or delete {claim}."
        require_equal(where, claimed.to_json(), extended.to_json(), remedy=remedy)
        entries = self._publish_inputs(claimed, number, inputs, first_block=existing.info.num_blocks)
        for path, data in metadata_objects(self._arrays(claimed)).items():
            # The only objects that are ever changed. No reader of ours looks at them, and to others rows are added that
            # are NaN until they are written.
            self.storage.replace(path, (data,))
        self.publish_version(number, claimed, {**existing.version.inputs, **entries})
        return self.open_set(name)

    def describe(self, name: str, members: Sequence[str] | None = None) -> dict[str, Any]:
        """Return what an artifact keeps of a set that it is made from: its data hash, and snapshots of its members.

        Raises
        ------
        NotReadyError
            If a block is not committed.
        """
        info = self.open_set(name).info
        sets = [self.open_set(name, member) for member in members or info.members]
        return {"data": info.data_hash, "members": [item.snapshot().to_json() for item in sets]}

    def find_set(self, name: str) -> FeatureSet | None:
        """Open a feature set as its first member has it, or return None if the store has none of that name."""
        folder, number = set_folder(check_name("feature set", name)), 0
        found: dict[str, Any] | None = None
        # The claim holds all that the document does but for the entries of the inputs, which its creator publishes again.
        remedy = "Delete it, then run `gradstore featurize` again: it makes it anew and keeps the blocks."
        while (later := read_document(self.storage, set_path(folder, number), remedy=remedy)) is not None:
            found, number = later, number + 1
            # Without it the set would be what it was before an append or an erasure.
            remedy = "Restore it from a copy; do not delete it: an erasure may be in it."
        if found is None:
            return None
        with as_written(f"{self.storage.url}/{set_path(folder, number - 1)}", remedy):
            inputs = {path: ObjectEntry(**entry) for path, entry in found["inputs"].items()}
            version = SetVersion(number=number - 1, info=SetInfo.from_json(found["info"]), inputs=inputs)
            # Also that no number of rows makes a loop that does not end.
            if version.info.num_blocks != len(inputs) or version.info.name != name:
                raise ValueError(
                    f"the set {version.info.name} of {version.info.num_blocks} blocks has {len(inputs)} inputs"
                )
        return FeatureSet(self.storage, version, version.info.members[0])

    def claim_version(self, number: int, info: SetInfo) -> SetInfo:
        """Claim a version of a set, and return what the first to claim it asked for."""
        path = claim_path(info.folder, number)
        remedy = f"Delete {self.storage.url}/{path}, then run the same command again: it makes it anew."
        found = claim_document(self.storage, path, {"info": info.to_json()}, remedy=remedy)
        with as_written(f"{self.storage.url}/{path}", remedy):
            return SetInfo.from_json(found["info"])

    def publish_version(self, number: int, info: SetInfo, inputs: Mapping[str, ObjectEntry]) -> None:
        """Publish the document of a version of a set, last: until then it is the version before."""
        self.storage.publish(set_path(info.folder, number), _document_of(info, inputs).parts)

    def _restore_set(self, existing: FeatureSet, asked: SetInfo, inputs: Iterable[pa.Table]) -> FeatureSet:
        """Publish what is missing of a set's metadata, and its inputs where one is missing or damaged."""
        info, number = existing.info, existing.version.number
        damaged = existing.damaged_inputs()
        if not damaged:
            publish_metadata(self.storage, self._arrays(info))
            return existing
        # Another version of pyarrow writes other bytes, so set.<version>.json, which names them, is written anew with them;
        # a creation that dies between is finished from the claim like any other.
        self.claim_version(number, info)
        paths = existing.version.input_paths()
        whole = inputs_of_blocks(info, inputs, without_erased=info.lacks_the_erased(asked))
        tables = {block: table for block, table in enumerate(whole) if block in damaged}
        entries = dict(existing.version.inputs)
        for block, table in tables.items():
            self.storage.delete(f"{info.folder}/{paths[block]}")
            place = f"{info.folder}/{paths[block]}"
            entries[paths[block]] = publish_object(self.storage, place, encode_table(table), adopt=False)
        publish_metadata(self.storage, self._arrays(info))
        # At once: without its newest document the set would be what it was before an erasure.
        self.storage.replace(set_path(info.folder, number), _document_of(info, entries).parts)
        return self.open_set(info.name)

    def _arrays(self, info: SetInfo) -> dict[str, ArrayLayout]:
        return {
            f"{info.folder}/{path}": layout for member in info.members for path, layout in info.layouts(member).items()
        }

    def _publish_inputs(
        self, info: SetInfo, number: int, inputs: Iterable[pa.Table], *, first_block: int = 0
    ) -> dict[str, ObjectEntry]:
        """Publish the inputs of blocks and the metadata of the arrays, keeping what another maker of this version wrote."""
        entries = {}
        for block, table in enumerate(inputs_of_blocks(info, inputs, first_block=first_block), first_block):
            path = inputs_path(block, number)
            place = f"{info.folder}/{path}"
            # A sound one of another creator is kept: the claim says that it is of the same data. The claim of a later version
            # may have been deleted by hand, as its message tells, and with other data made anew.
            entries[path] = publish_object(self.storage, place, encode_table(table), adopt=number == 0)
        publish_metadata(self.storage, self._arrays(info))
        return entries


def _document_of(info: SetInfo, inputs: Mapping[str, ObjectEntry]) -> Payload:
    entries = {path: asdict(entry) for path, entry in inputs.items()}
    return encode_document({"info": info.to_json(), "inputs": entries})
