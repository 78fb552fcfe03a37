"""Erasing examples: their bytes go from chunks, tables and inputs; their rows stay, NaN, so that every other keeps its place.

An erasure is a new version of the set, which names the erased rows: published before the first block is touched, so that
whoever finds it half done finishes it, and whoever computes a block from then on leaves these rows out. Then each block
that holds such rows is taken back, its objects are replaced by what is left of them, and it is committed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from gradstore.errors import ContractError, DataError
from gradstore.store.blocks import ObjectEntry, publish_object
from gradstore.store.codecs import Payload, encode_table
from gradstore.store.commits import Record, is_commit
from gradstore.store.examples import data_hash_of_facts
from gradstore.store.features.feature_set import FeatureSet
from gradstore.store.features.info import SetInfo
from gradstore.store.features.inputs import blanked
from gradstore.store.layout import chunk_path, inputs_path, part_path

if TYPE_CHECKING:
    from gradstore.store.features.feature_store import FeatureStore

StatisticsOf = Callable[[SetInfo, Mapping[str, npt.NDArray[np.float32]]], pa.Table]
"""The statistics of a block with these features: without covariances, which cannot be told from features."""

REASON = "erase"


def erase_rows(store: FeatureStore, name: str, rows: Sequence[int], statistics: StatisticsOf) -> list[int]:
    """Erase the examples of some rows of a set, of all its members; return the blocks that were rewritten.

    If it dies, erasing again goes on, and so does whatever calls `finish_erasure`. What is made from the set, kernels and
    contributions, is stale then, and holds sums over what was erased until it is made anew.

    Raises
    ------
    DataError
        If a row is not of an example.
    ContractError
        If an append was begun and not finished.
    IntegrityError, ObjectMissingError
        If a block of such a row is damaged: repair it first.
    """
    rewritten: set[int] = set()
    while True:
        existing = store.open_set(name)
        rewritten.update(finish_erasure(existing, statistics))
        if set(rows) <= set(existing.info.erased):
            return sorted(rewritten)
        number = existing.version.number + 1
        claimed = store.claim_version(number, _erased_version(existing, rows))
        if claimed.num_examples != existing.info.num_examples:
            raise ContractError(
                f"{store.storage.url}/{existing.info.folder}: an append to it was begun and not finished. Run the append "
                "again, then erase."
            )
        store.publish_version(number, claimed, _publish_blank_inputs(existing, claimed, number))


def _erased_version(existing: FeatureSet, rows: Sequence[int]) -> SetInfo:
    """Return what a set becomes when the examples of some rows are erased, beside those that are already.

    Raises
    ------
    DataError
        If a row is not of an example.
    """
    info = existing.info
    ranges = [info.block_range(block) for block in range(info.num_blocks)]
    strange = [row for row in rows if not any(start <= row < stop for start, stop in ranges)]
    if strange:
        raise DataError(
            f"{existing.storage.url}/{info.folder}: row {strange[0]} is of no example; the set has {info.num_examples:,} in "
            f"rows 0 to {info.rows - 1:,}."
        )
    erased = tuple(sorted({*info.erased, *rows}))
    left = []
    for block, (start, _) in enumerate(ranges):
        table = existing.read_inputs(block).select(["content_hash", "example_id", "label"])
        facts = zip(*(column.to_pylist() for column in table.columns), strict=True)
        left += [fact for row, fact in enumerate(facts, start) if row not in erased]
    return replace(info, erased=erased, remaining_hash=data_hash_of_facts(left))


def _publish_blank_inputs(existing: FeatureSet, erasing: SetInfo, number: int) -> dict[str, ObjectEntry]:
    """Publish, for a new version, the inputs of the blocks that an erasure is of; return the entries of all inputs."""
    entries = dict(existing.version.inputs)
    paths = existing.version.input_paths()
    for block in _blocks_with(set(erasing.erased) - set(existing.info.erased), erasing):
        table = blanked(existing.read_inputs(block), erasing.erased_in(block))
        path = inputs_path(block, number)
        entries[path] = publish_object(existing.storage, f"{erasing.folder}/{path}", encode_table(table), adopt=False)
        del entries[paths[block]]
    return entries


def finish_erasure(feature_set: FeatureSet, statistics: StatisticsOf) -> list[int]:
    """Take the erased rows of a set out of every block, member and input that still holds them; return the blocks.

    Raises
    ------
    IntegrityError, ObjectMissingError
        If a committed block is damaged; repair it first: what is computed anew leaves the rows out too.
    """
    blocks = _blocks_with(feature_set.info.erased, feature_set.info)
    rewritten = set()
    for member in feature_set.info.members:
        for block in blocks:
            if _erase_block(feature_set.of_member(member), block, statistics):
                rewritten.add(block)
    current = {f"{feature_set.info.folder}/{path}" for path in feature_set.version.inputs}
    for info in [*feature_set.storage.list_objects(f"{feature_set.info.folder}/inputs")]:
        if info.path not in current and _version_of_inputs(info.path) < feature_set.version.number:
            feature_set.storage.delete(info.path)
    return sorted(rewritten)


def is_finished(feature_set: FeatureSet) -> bool:
    """Whether no committed block and no input holds a row that the set has as erased."""
    for member in feature_set.info.members:
        log = feature_set.of_member(member).log
        for block in _blocks_with(feature_set.info.erased, feature_set.info):
            newest = log.newest(block)
            if newest is None or is_unfinished(log.record(block, newest), feature_set.info.erased_in(block)):
                return False
    return True


def _erase_block(feature_set: FeatureSet, block: int, statistics: StatisticsOf) -> bool:
    """Erase rows of one block of one member; False if nothing was left to do."""
    log, erased = feature_set.log, feature_set.info.erased_in(block)
    newest = log.newest(block)
    latest = None if newest is None else log.record(block, newest)
    if latest is not None and not is_unfinished(latest, erased):
        return False
    if latest is not None and is_commit(latest.generation):
        features, of = feature_set.read_block(block), latest
        examples = feature_set.read_examples(block=block)
    elif latest is not None and latest.facts["reason"] == REASON and latest.facts["of"] is not None:
        # Another erasure died here: every object is still what it was, or already what is left of it.
        of = log.record(block, latest.facts["of"])
        features, examples = feature_set.read_half_erased(of, latest.facts["erased"])
    else:
        # Nothing is committed; an attempt that began before must not be, and what it wrote goes. Only then are the rows
        # named as erased; and an attempt that began in between, which may have found objects before they went, is fenced.
        log.take_back(block, REASON, {"erased": [], "of": None})
        _delete_objects(feature_set, block)
        log.take_back(block, REASON, {"erased": erased, "of": None})
        return True
    # Not if the block has changed since it was read: rows would come back that a later erasure took out.
    taken = log.take_back_from(block, newest, REASON, {"erased": erased, "of": of.generation})
    feature_set.refuse_an_older_version()
    generation = taken.generation + 1

    def replace_object(path: str, payload: Payload) -> ObjectEntry:
        log.refuse_outrun(block, generation)
        feature_set.storage.replace(path, payload.parts)
        return ObjectEntry(bytes=payload.bytes, crc32c=payload.crc32c)

    for values in features.values():
        values[erased] = np.nan
    tables = {"examples": blanked(examples, erased), "statistics": statistics(feature_set.info, features)}
    objects, found = feature_set.put_block(block, features, tables, replace_object)
    # Counted when the values were rounded, which they are no more.
    lost = {key: of.facts[key] for key in ("saturated", "flushed", "saturated_groups")}
    log.commit(block, generation, objects, {**of.facts, **found, **lost, "covariances": "stale"})
    return True


def is_unfinished(record: Record, erased: Sequence[int]) -> bool:
    """Whether the newest record of a block says that rows which the set has as erased may be in it, or may come to be."""
    if is_commit(record.generation):
        return not set(erased) <= set(record.facts.get("erased", ()))
    taken_back_by_erasure = record.facts["reason"] == REASON
    if taken_back_by_erasure and record.facts["of"] is None:
        return not set(erased) <= set(record.facts["erased"])
    return True


def _blocks_with(rows: Iterable[int], info: SetInfo) -> list[int]:
    return sorted({row // info.block_rows for row in rows})


def _delete_objects(feature_set: FeatureSet, block: int) -> None:
    info, member = feature_set.info, feature_set.member
    paths = [chunk_path(path, block, 0) for path in info.layouts(member)]
    paths += [part_path(f"{part}/{member}", block) for part in ("examples", "statistics")]
    for path in paths:
        feature_set.storage.delete(f"{info.folder}/{path}")


def _version_of_inputs(path: str) -> int:
    return int(path.rsplit("/", 1)[1].split(".")[1])
