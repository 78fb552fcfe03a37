"""Publishing objects and committing units."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
import pytest

from gradstore.errors import IntegrityError, NotReadyError, ObjectMissingError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.blocks import (
    Buffers,
    claim_document,
    in_parallel,
    publish_object,
    read_chunk,
    read_object,
)
from gradstore.store.codecs import encode_chunk, encode_document, encode_table
from gradstore.store.commits import CommitLog, Record
from gradstore.store.layout import ArrayLayout

_NAMES = count()
LAYOUT = ArrayLayout(shape=(4, 2), chunk_shape=(4, 2), dtype="float32", dimension_names=("example", "feature"))
ONES, TWOS = (encode_chunk(np.full((4, 2), value, np.float32), LAYOUT) for value in (1, 2))


@pytest.fixture
def storage() -> Storage:
    return open_storage(f"memory://blocks-{next(_NAMES)}")


def commit(log: CommitLog, unit: int, facts: Mapping[str, Any] | None = None) -> Record:
    """Commit a unit without objects, as an attempt that begins now."""
    generation = log.begin(unit)
    if generation is None:
        record = log.latest(unit)
        assert record is not None
        return record
    return log.commit(unit, generation, {}, facts or {})


def test_a_sound_object_of_another_attempt_is_kept_and_recorded_as_it_is(storage: Storage) -> None:
    publish_object(storage, "a", ONES)
    entry = publish_object(storage, "a", TWOS)
    assert entry.crc32c == ONES.crc32c
    assert storage.read("a") == b"".join(ONES.parts)


def test_a_damaged_object_is_replaced(storage: Storage) -> None:
    storage.publish("a", [b"".join(ONES.parts)[:-1]])
    entry = publish_object(storage, "a", TWOS)
    assert entry.crc32c == TWOS.crc32c
    assert storage.read("a") == b"".join(TWOS.parts)


def test_of_several_claims_the_first_counts_for_all(storage: Storage) -> None:
    barrier = threading.Barrier(8)

    def claim(number: int) -> int:
        barrier.wait()
        return int(claim_document(storage, "claim.json", {"number": number}, remedy="")["number"])

    assert len(set(in_parallel(claim, range(8), threads=8))) == 1


@pytest.mark.parametrize("position", [0, 7, -1])
def test_a_flipped_bit_is_caught_and_the_object_named(storage: Storage, position: int) -> None:
    entry = publish_object(storage, "m0/a/c.0.0", ONES)
    data = bytearray(storage.read("m0/a/c.0.0"))
    data[position] ^= 4
    storage.delete("m0/a/c.0.0")
    storage.publish("m0/a/c.0.0", [bytes(data)])
    with pytest.raises(IntegrityError, match=r"m0/a/c.0.0: its bytes are not those that were committed\. Do so\."):
        read_chunk(storage, "m0/a/c.0.0", entry, LAYOUT, np.empty(LAYOUT.chunk_bytes, np.uint8), remedy="Do so.")


def test_a_swapped_chunk_is_caught_though_its_own_checksum_is_right(storage: Storage) -> None:
    entry = publish_object(storage, "a", ONES)
    storage.delete("a")
    publish_object(storage, "a", TWOS)
    with pytest.raises(IntegrityError, match="a: its bytes are not those"):
        read_chunk(storage, "a", entry, LAYOUT, np.empty(LAYOUT.chunk_bytes, np.uint8), remedy="Do so.")


def test_a_deleted_object_that_a_record_names_is_named_with_the_way_out(storage: Storage) -> None:
    entry = publish_object(storage, "t", encode_document({"a": 1}))
    storage.delete("t")
    with pytest.raises(ObjectMissingError, match=r"t: is missing, though it was committed\. Do so\."):
        read_object(storage, "t", entry, remedy="Do so.")


def test_a_changed_table_is_caught(storage: Storage) -> None:
    import pyarrow as pa

    entry = publish_object(storage, "t", encode_table(pa.table({"a": [1]})))
    storage.delete("t")
    publish_object(storage, "t", encode_table(pa.table({"a": [2]})))
    with pytest.raises(IntegrityError, match="t: its bytes are not those"):
        read_object(storage, "t", entry, remedy="Do so.")


def test_a_unit_is_missing_until_its_record_is_published(storage: Storage) -> None:
    log = CommitLog(storage, "set/blocks", "featurize")
    assert log.missing(3) == [0, 1, 2]
    record = log.commit(1, 0, {"a": publish_object(storage, "set/a", ONES)}, {"rows": 4})
    assert log.missing(3) == [0, 2]
    assert log.committed() == {1: record}
    assert log.committed_units() == {1: 0}


def test_the_loser_of_a_race_gets_the_winners_record(storage: Storage) -> None:
    log = CommitLog(storage, "set/blocks", "featurize")
    barrier = threading.Barrier(8)

    def race(number: int) -> str:
        barrier.wait()
        return log.commit(0, 0, {}, {"number": number}).attempt

    attempts = in_parallel(race, range(8), threads=8)
    assert len(set(attempts)) == 1
    assert log.committed()[0].attempt == attempts[0]


def test_the_highest_generation_counts(storage: Storage) -> None:
    log = CommitLog(storage, "set/blocks", "featurize")
    commit(log, 0)
    log.take_back(0, "repair")
    assert log.missing(1) == [0]
    assert log.committed() == {}
    with pytest.raises(NotReadyError, match="block 0 is not committed"):
        log.require(0, "block 0 is not committed")
    again = commit(log, 0)
    assert again.generation == 2
    assert log.committed_units() == {0: 2}
    assert log.require(0, "") == again


def test_a_reader_gets_one_generation_throughout_and_units_that_come_later(storage: Storage) -> None:
    log, writer = CommitLog(storage, "set/blocks", "featurize"), CommitLog(storage, "set/blocks", "featurize")
    first = commit(writer, 0)
    assert log.require(0, "") == first
    log.take_back(0, "repair")
    assert CommitLog(storage, "set/blocks", "featurize").latest(0) != first
    commit(CommitLog(storage, "set/blocks", "featurize"), 0)
    later = commit(CommitLog(storage, "set/blocks", "featurize"), 1)
    assert log.require(0, "") == first
    assert log.committed() == {0: first, 1: later}
    assert log.pin() == {0: 0, 1: 0}
    assert CommitLog(storage, "set/blocks", "featurize").pin() == {0: 2, 1: 0}


def test_committing_again_changes_nothing(storage: Storage) -> None:
    log = CommitLog(storage, "set/blocks", "featurize")
    first = commit(log, 0, {"try": 1})
    assert commit(log, 0, {"try": 2}) == first


def test_a_damaged_record_is_named(storage: Storage) -> None:
    storage.publish("set/blocks/000000.0.json", [b'{"unit": 0'])
    said = r"set/blocks/000000\.0\.json: is not a gradstore document: .*\. Run `gradstore repair memory://"
    with pytest.raises(IntegrityError, match=said):
        CommitLog(storage, "set/blocks", "featurize").committed()


def test_a_document_that_is_no_record_is_named(storage: Storage) -> None:
    storage.publish("set/blocks/000000.0.json", encode_document({"rows": 3}).parts)
    with pytest.raises(IntegrityError, match=r"000000\.0\.json: is not a commit record"):
        CommitLog(storage, "set/blocks", "featurize").committed()


@pytest.mark.parametrize("threads", [1, 4])
def test_results_come_in_order_and_the_first_error_is_raised(threads: int) -> None:
    assert in_parallel(lambda number: number**2, range(20), threads=threads) == [number**2 for number in range(20)]
    with pytest.raises(ZeroDivisionError):
        in_parallel(lambda number: 1 / (number - 3), range(20), threads=threads)


def test_buffers_are_reused_and_never_lent_twice() -> None:
    buffers = Buffers()
    with buffers.borrow(8) as first, buffers.borrow(8) as second:
        assert not np.shares_memory(first, second)
    with buffers.borrow(4) as third:
        assert np.shares_memory(third, first)
    with buffers.borrow(16) as larger:
        assert larger.size == 16
