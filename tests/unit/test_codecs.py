"""Bytes of chunks, tables and documents."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gradstore.errors import IntegrityError
from gradstore.store.codecs import (
    checksum,
    decode_chunk,
    decode_document,
    decode_table,
    encode_chunk,
    encode_document,
    encode_table,
)
from gradstore.store.layout import ArrayLayout

LAYOUT = ArrayLayout(shape=(10, 3), chunk_shape=(4, 3), dtype="float32", dimension_names=("example", "feature"))
PACKED = replace(LAYOUT, compression="blosc")


def test_a_chunk_reads_back_and_its_missing_rows_are_nan() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    payload = encode_chunk(values, LAYOUT)
    data = np.frombuffer(b"".join(payload.parts), np.uint8)
    decoded = decode_chunk(data, LAYOUT)
    assert decoded is not None
    np.testing.assert_array_equal(decoded[0][:2], values)
    assert np.isnan(decoded[0][2:]).all()
    assert decoded[1] == payload.crc32c == checksum(data[:-4])
    assert payload.bytes == LAYOUT.chunk_bytes == data.size


@given(st.integers(0, LAYOUT.chunk_bytes - 1), st.integers(0, 7))
def test_any_flipped_bit_of_a_chunk_is_noticed(byte: int, bit: int) -> None:
    data = bytearray(b"".join(encode_chunk(np.ones((4, 3), np.float32), LAYOUT).parts))
    data[byte] ^= 1 << bit
    assert decode_chunk(np.frombuffer(data, np.uint8), LAYOUT) is None


@pytest.mark.parametrize("layout", [LAYOUT, PACKED])
def test_a_truncated_chunk_is_noticed(layout: ArrayLayout) -> None:
    payload = encode_chunk(np.ones((4, 3), np.float32), layout)
    data = b"".join(payload.parts)
    for size in range(len(data)):
        assert decode_chunk(np.frombuffer(data[:size], np.uint8), layout) is None
        assert payload.inspect(data[:size]) is None
    assert payload.inspect(data) == payload.crc32c


def test_what_a_chunk_lacks_is_filled_with_what_its_type_has_for_no_number() -> None:
    layout = replace(LAYOUT, dtype="uint16", fill_value=0x7FC0)
    data = np.frombuffer(b"".join(encode_chunk(np.ones((1, 3), np.uint16), layout).parts), np.uint8)
    decoded = decode_chunk(data, layout)
    assert decoded is not None
    assert decoded[0].tolist() == [[1, 1, 1]] + [[0x7FC0] * 3] * 3


@given(arrays.arrays(np.float32, (4, 3), elements=st.floats(width=32)))
def test_a_compressed_chunk_reads_back_with_the_checksum_of_its_stored_bytes(values: np.ndarray) -> None:
    payload = encode_chunk(values, PACKED)
    data = np.frombuffer(b"".join(payload.parts), np.uint8)
    assert payload.bytes == data.size <= PACKED.chunk_bytes
    spare = np.empty(PACKED.buffer_bytes - PACKED.chunk_bytes, np.uint8)
    decoded = decode_chunk(data, PACKED, spare)
    assert decoded is not None
    assert decoded[0].tobytes() == values.tobytes()
    assert np.shares_memory(decoded[0], spare)
    assert decoded[1] == payload.crc32c == checksum(data[:-4])


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_any_flipped_bit_of_a_compressed_chunk_is_noticed(byte: int, bit: int) -> None:
    data = bytearray(b"".join(encode_chunk(np.ones((4, 3), np.float32), PACKED).parts))
    data[byte % len(data)] ^= 1 << bit
    assert decode_chunk(np.frombuffer(data, np.uint8), PACKED) is None


def test_a_chunk_that_cannot_be_compressed_fits_its_buffer() -> None:
    layout = replace(PACKED, shape=(64, 1024), chunk_shape=(64, 1024), dtype="int8", fill_value=-128)
    values = np.random.default_rng(0).integers(-128, 128, (64, 1024), np.int8)
    payload = encode_chunk(values, layout)
    assert layout.raw_bytes < payload.bytes <= layout.chunk_bytes


def test_repetition_is_compressed_and_always_to_the_same_bytes() -> None:
    layout = replace(PACKED, shape=(2048, 1024), chunk_shape=(2048, 1024))
    values = np.arange(2**21, dtype=np.float32).reshape(2048, 1024)
    payloads = [encode_chunk(values, layout)]
    thread = threading.Thread(target=lambda: payloads.append(encode_chunk(values, layout)))
    thread.start()
    thread.join()
    assert payloads[0].parts == payloads[1].parts
    assert payloads[0].bytes < layout.raw_bytes / 10


def test_a_table_reads_back_whole_or_by_column_and_damage_is_noticed() -> None:
    table = pa.table({"row": [1, 2], "label": ["a", None]})
    payload = encode_table(table)
    data = b"".join(payload.parts)
    assert decode_table(data).equals(table)
    assert decode_table(data, ["label"]).column_names == ["label"]
    assert payload.inspect(data) == payload.crc32c == checksum(data)
    assert payload.inspect(data[:-9]) is None
    values = data.index(b"\x28\xb5\x2f\xfd") + 12  # inside the first page: past the magic number of zstd
    assert payload.inspect(data[:values] + bytes([data[values] ^ 1]) + data[values + 1 :]) is None


def test_a_document_reads_back_as_plain_json_whatever_its_keys() -> None:
    payload = encode_document({"blocks": ((0, 1),), "counts": {10: "ten", 2: "two"}, "text": "μ", "x": 0.1})
    data = b"".join(payload.parts)
    assert decode_document(data, "here", "") == {
        "blocks": [[0, 1]],
        "counts": {"10": "ten", "2": "two"},
        "text": "μ",
        "x": 0.1,
    }
    assert payload.inspect(data) == payload.crc32c


def test_an_edited_document_is_refused_by_name() -> None:
    value = json.loads(b"".join(encode_document({"rows": 3}).parts))
    value["rows"] = 4
    with pytest.raises(IntegrityError, match=r"set\.json: was changed after it was written: .*\. Do so\."):
        decode_document(json.dumps(value).encode(), "set.json", "Do so.")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value: line 1 column 1"),
        (b"{", "Expecting property name"),
        (b"[1]", "it holds no crc32c"),
        (b"{}", "it holds no crc32c"),
        (b'{"a": 1, "b": "\xff"}', "invalid start byte"),
        (b'{"crc32c": "0", "b": "\\ud800"}', "surrogates not allowed"),
    ],
)
def test_what_is_no_document_is_refused_in_one_line_with_its_name_and_the_way_out(data: bytes, reason: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        decode_document(data, "set.json", "Do so.")
    message = str(caught.value)
    assert message.startswith("set.json: is not a gradstore document: ")
    assert message.endswith(". Do so.")
    assert reason in message
    assert str(data) not in message or not data
    assert "\n" not in message


def test_a_table_is_read_by_no_thread_that_may_outlive_the_process() -> None:
    script = (
        "import os; import pyarrow as pa; import pyarrow.parquet as pq; from gradstore.store.codecs import decode_table; "
        "sink = pa.BufferOutputStream(); pq.write_table(pa.table({'row': [0, 1], 'id': ['a', 'b']}), sink); "
        "data = sink.getvalue().to_pybytes(); before = os.listdir('/proc/self/task'); "
        "assert decode_table(data, ['id', 'row']).to_pydict() == {'id': ['a', 'b'], 'row': [0, 1]}; "
        "assert os.listdir('/proc/self/task') == before"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
