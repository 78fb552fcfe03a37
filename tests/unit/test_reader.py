"""Streaming blocks through reused buffers, with read-ahead."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from gradstore.errors import IntegrityError, NotReadyError, SupersededError
from gradstore.store.features import BlockReader, FeatureSet, FeatureStore, Piece
from gradstore.store.layout import chunk_path
from tests import stores

WAIT_SECONDS = 20.0
EIGHT_GROUPS = {f"layers.{index}": 2 * index + 2 for index in range(8)}


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def written(url: str, **described: Any) -> FeatureSet:
    """A set of 11 rows in 3 blocks, all committed, opened anew."""
    info = stores.set_info(**described)
    made = stores.create(url, info)
    for block in range(info.num_blocks):
        stores.write(made, block)
    return FeatureStore.open(url).open_set("train")


def before_each_chunk(feature_set: FeatureSet, patch: pytest.MonkeyPatch, act: Callable[[str], None]) -> None:
    """Let ``act`` see the path of every chunk, in the thread that reads it and before it is read."""
    read_into = feature_set.storage.read_into

    def watched(path: str, buffer: memoryview) -> int:
        act(path)
        return read_into(path, buffer)

    patch.setattr(feature_set.storage, "read_into", watched)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < until, "did not happen in time"
        time.sleep(0.002)


def reading_threads() -> int:
    return sum(thread.name.startswith("gradstore-read") for thread in threading.enumerate())


def chunks(feature_set: FeatureSet, *blocks: int) -> set[str]:
    """Paths of all chunks of some blocks."""
    info = feature_set.info
    arrays = [info.array_path(feature_set.member, array.name) for array in info.arrays]
    return {f"{info.folder}/{chunk_path(array, block, 0)}" for array in arrays for block in blocks}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_pieces_are_what_reading_single_blocks_gives(
    url: str, dtype: Literal["float32", "float16"], ahead: int
) -> None:
    opened = written(url, dtype=dtype)

    seen = []
    for piece in BlockReader([opened], ahead=ahead).read([2, 0, 1, 0]):
        seen.append((piece.block, piece.member))
        expected = opened.read_block(piece.block)
        assert list(piece.rows) == list(expected)
        for group, rows in piece.rows.items():
            assert rows.dtype == np.float32
            assert rows.flags.c_contiguous
            np.testing.assert_array_equal(rows, expected[group])

    assert seen == [(2, "m0"), (0, "m0"), (1, "m0"), (0, "m0")]


def test_of_a_block_come_all_bundles_and_each_as_all_members_have_it(url: str) -> None:
    info = replace(stores.set_info(), members=("first", "second"))
    first = stores.create(url, info)
    second = first.of_member("second")
    for block in range(info.num_blocks):
        stores.write(first, block)
        doubled = {name: 2 * values for name, values in stores.features(info, block).items()}
        tables = {"examples": stores.examples(info, block), "statistics": stores.statistics(info, block)}
        second.write_block(block, doubled, **tables, facts={})
    bundles = [["head/μ", "layers.0.mlp"], ["layers.1.mlp"]]

    seen = []
    for piece in BlockReader([first, second], bundles).read([0, 2]):
        seen.append((piece.block, piece.member, list(piece.rows)))
        factor = 1 if piece.member == "first" else 2
        for group, rows in piece.rows.items():
            np.testing.assert_array_equal(rows, factor * stores.features(info, piece.block)[group])

    assert seen == [(block, member, bundle) for block in (0, 2) for bundle in bundles for member in ("first", "second")]


def test_the_same_buffers_serve_all_pieces(url: str) -> None:
    opened = written(url)
    places = {
        piece.rows["layers.0.mlp"].__array_interface__["data"][0]
        for piece in BlockReader([opened], ahead=1).read([0, 1, 0, 1, 0, 1, 0])
    }
    assert len(places) == 2


def test_a_piece_stays_as_it_is_until_the_next_is_asked_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = written(url)
    asked: list[str] = []
    before_each_chunk(opened, monkeypatch, asked.append)

    pieces = BlockReader([opened], ahead=1).read([0, 1, 2])
    first = next(pieces)
    copies = {group: rows.copy() for group, rows in first.rows.items()}
    # All that may be read ahead has been, and no more.
    wait_for(lambda: len(asked) == 2 * len(stores.GROUPS))
    time.sleep(0.05)
    assert set(asked) == chunks(opened, 0, 1)
    for group, rows in first.rows.items():
        np.testing.assert_array_equal(rows, copies[group])
    pieces.close()


def test_the_next_pieces_are_read_while_one_is_worked_on(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = written(url, rows=32)
    asked: list[str] = []
    before_each_chunk(opened, monkeypatch, asked.append)

    def are_read(blocks: int) -> bool:
        return len(asked) == len(stores.GROUPS) * blocks

    for piece in BlockReader([opened], ahead=2).read(range(8)):
        wait_for(partial(are_read, min(piece.block + 3, 8)))


def test_as_many_chunks_are_read_at_once_as_the_storage_serves(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = written(url, groups=EIGHT_GROUPS)
    together = threading.Barrier(opened.storage.concurrency)
    lock, now, most = threading.Lock(), 0, 0

    def meet(path: str) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        # Ends only if as many are here at the same time.
        together.wait(WAIT_SECONDS)
        with lock:
            now -= 1

    before_each_chunk(opened, monkeypatch, meet)
    assert [piece.block for piece in BlockReader([opened]).read([0, 1, 2])] == [0, 1, 2]
    assert most == opened.storage.concurrency > 1


@pytest.mark.parametrize("groups_of_a_piece", [1, 3, 8])
def test_the_record_of_a_block_is_asked_for_once_however_many_chunks_it_names(
    url: str, monkeypatch: pytest.MonkeyPatch, groups_of_a_piece: int
) -> None:
    opened = written(url, groups=EIGHT_GROUPS)
    read = opened.storage.read
    asked: list[str] = []

    def slow(path: str) -> bytes:
        asked.append(path)
        time.sleep(0.02)
        return read(path)

    monkeypatch.setattr(opened.storage, "read", slow)
    names = list(EIGHT_GROUPS)
    bundles = [names[first : first + groups_of_a_piece] for first in range(0, 8, groups_of_a_piece)]
    list(BlockReader([opened], bundles, ahead=5).read([0, 1, 2]))
    assert asked.count("features/train/blocks/m0/000001.0.json") == 1


def test_the_record_of_the_next_block_is_asked_for_before_the_chunks_of_this_one(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = written(url)
    read = opened.storage.read
    asked: list[str] = []

    def noted(path: str) -> bytes:
        asked.append(path)
        return read(path)

    monkeypatch.setattr(opened.storage, "read", noted)
    before_each_chunk(
        opened, monkeypatch, lambda _: wait_for(lambda: "features/train/blocks/m0/000001.0.json" in asked)
    )
    pieces = BlockReader([opened], ahead=0).read([0, 1, 2])
    assert next(pieces).block == 0
    assert "features/train/blocks/m0/000002.0.json" not in asked
    pieces.close()


def test_a_block_that_is_not_committed_is_refused_at_its_turn(url: str) -> None:
    made = stores.create(url, stores.set_info())
    stores.write(made, 0)
    stores.write(made, 2)

    pieces = BlockReader([made], ahead=2).read([0, 1, 2])

    assert next(pieces).block == 0
    with pytest.raises(NotReadyError, match=r"features/train: block 1 is not committed. Run `gradstore featurize`"):
        next(pieces)
    assert reading_threads() == 0


def test_a_damaged_chunk_is_refused_by_name_at_its_turn(url: str) -> None:
    opened = written(url)
    path = f"features/train/{chunk_path(opened.info.array_path('m0', 'layers.1.mlp'), 1, 0)}"
    data = bytearray(opened.storage.read(path))
    data[5] ^= 1
    opened.storage.delete(path)
    opened.storage.publish(path, [bytes(data)])

    pieces = BlockReader([opened], ahead=2).read([0, 1, 2])

    assert next(pieces).block == 0
    with pytest.raises(IntegrityError, match=f"{re.escape(path)}: its bytes are not those that were committed"):
        next(pieces)
    assert reading_threads() == 0


def test_a_block_that_is_taken_back_ends_the_reading_at_its_turn(url: str) -> None:
    opened = written(url)
    opened.snapshot()
    path = f"features/train/{chunk_path(opened.info.array_path('m0', 'layers.1.mlp'), 2, 0)}"
    FeatureStore.open(url).open_set("train").log.take_back(2, "a test")
    opened.storage.delete(path)

    pieces = BlockReader([opened]).read([0, 1, 2])

    assert [next(pieces).block, next(pieces).block] == [0, 1]
    with pytest.raises(SupersededError, match="unit 2 was taken back by a repair or an erasure"):
        next(pieces)


def stop_early(reader: BlockReader) -> None:
    for _ in reader.read(range(3)):
        break


def close(reader: BlockReader) -> None:
    pieces = reader.read(range(3))
    next(pieces)
    assert reading_threads() > 0
    pieces.close()


def fail(reader: BlockReader) -> None:
    def divide() -> None:
        for piece in reader.read(range(3)):
            _ = 1 // piece.block

    with pytest.raises(ZeroDivisionError) as caught:
        divide()
    # While the error and the frames it passed are still known.
    assert reading_threads() == 0
    del caught


@pytest.mark.parametrize("stop", [stop_early, close, fail])
def test_threads_end_when_the_reader_of_the_pieces_stops(
    url: str, monkeypatch: pytest.MonkeyPatch, stop: Callable[[BlockReader], None]
) -> None:
    opened = written(url, groups=EIGHT_GROUPS)
    asked: list[str] = []

    def slow(path: str) -> None:
        asked.append(path)
        time.sleep(0.01)

    before_each_chunk(opened, monkeypatch, slow)
    stop(BlockReader([opened], ahead=2))
    assert reading_threads() == 0
    # What was not yet begun is not read any more.
    assert len(asked) < 3 * len(EIGHT_GROUPS)


def test_two_streams_of_one_reader_do_not_share_buffers(url: str) -> None:
    opened = written(url)
    reader = BlockReader([opened])
    for one, two in zip(reader.read([0, 1, 2]), reader.read([2, 1, 0]), strict=True):
        assert_is_block(opened, one)
        assert_is_block(opened, two)


def test_no_blocks_and_no_groups_are_read_as_nothing(url: str) -> None:
    opened = written(url)
    assert list(BlockReader([opened]).read([])) == []
    assert [piece.rows for piece in BlockReader([opened], [[]]).read([0, 1])] == [{}, {}]


def test_memory_is_told_from_blocks_bundles_and_threads(url: str) -> None:
    opened = written(url, dtype="float16")
    chunk = 2 * 4 * 6 + 4
    # Groups of 6, 4 and 2 float32 features in blocks of 4 rows, each from a cache line on.
    widest, block = 128, 128 + 64 + 64
    assert BlockReader([opened]).memory_bytes == 2 * block + 4 * chunk
    assert BlockReader([opened], ahead=0).memory_bytes == block + 4 * chunk
    by_group = [[group] for group in stores.GROUPS]
    assert BlockReader([opened], by_group, ahead=2).memory_bytes == 3 * widest + 4 * chunk


def test_chunks_of_float32_are_read_where_they_are_worked_on(url: str) -> None:
    opened = written(url, dtype="float32")
    # With the four bytes of their checksums.
    assert BlockReader([opened]).memory_bytes == 2 * (128 + 128 + 64)


def assert_is_block(feature_set: FeatureSet, piece: Piece) -> None:
    for group, rows in piece.rows.items():
        np.testing.assert_array_equal(rows, stores.features(feature_set.info, piece.block)[group])
