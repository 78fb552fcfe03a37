"""Bytes of chunks, tables and documents, and what float16 loses."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.errors import IntegrityError
from gradstore.store.codecs import (
    Rounding,
    checksum,
    decode_chunk,
    decode_document,
    decode_table,
    encode_chunk,
    encode_document,
    encode_table,
    from_half,
    to_half,
)
from gradstore.store.layout import ArrayLayout

LAYOUT = ArrayLayout(shape=(10, 3), chunk_shape=(4, 3), dtype="float32", dimension_names=("example", "feature"))


@pytest.mark.parametrize("scale", [1.0, 2.0**-24, 2.0**-40, 2.0**10, 2.0**15, 2.0**16, 2.0**40, 2.0**112])
def test_every_float16_is_widened_exactly_as_numpy_widens_it(scale: float) -> None:
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    out = np.empty(half.shape, np.float32)
    with np.errstate(invalid="ignore"):
        expected = half.astype(np.float32) * np.float32(scale)
        from_half(half, scale, out)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("exponent", [-40, 15, 16, 40])
def test_float16_with_a_large_or_small_scale_reads_back(exponent: int) -> None:
    values = np.array([0.0, 1.5, -2.25], np.float32) * np.float32(2.0**exponent)
    half, out = np.empty(3, np.float16), np.empty(3, np.float32)
    assert to_half(values, 2.0**exponent, half) == Rounding()
    from_half(half, 2.0**exponent, out)
    np.testing.assert_array_equal(out, values)


def test_widening_keeps_the_sign_of_zero_and_the_bits_of_every_finite_value() -> None:
    half = np.arange(2**16, dtype=np.uint16).view(np.float16)
    half = half[np.isfinite(half)]
    out = np.empty(half.shape, np.float32)
    from_half(half, 1.0, out)
    np.testing.assert_array_equal(out.view(np.uint32), half.astype(np.float32).view(np.uint32))


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=50), st.integers(-20, 20)
)
def test_narrowing_counts_what_numpy_would_have_lost(values: list[float], exponent: int) -> None:
    array, scale = np.array(values, np.float32), 2.0**exponent
    half = np.empty(array.shape, np.float16)
    rounding = to_half(array, scale, half)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = (array / np.float32(scale)).astype(np.float16)
    saturated = np.isinf(expected) & np.isfinite(array)
    expected[saturated] = np.copysign(np.float16(65504), expected[saturated])
    np.testing.assert_array_equal(half, expected)
    assert rounding == Rounding(saturated=int(saturated.sum()), flushed=int(((expected == 0) & (array != 0)).sum()))


def test_infinite_and_nan_features_stay_what_they_are() -> None:
    half = np.empty(5, np.float16)
    rounding = to_half(np.array([np.inf, -np.inf, np.nan, 1e9, -1e9], np.float32), 1.0, half)
    np.testing.assert_array_equal(half, np.array([np.inf, -np.inf, np.nan, 65504, -65504], np.float16))
    assert rounding == Rounding(saturated=2, flushed=0)


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


def test_a_truncated_chunk_is_noticed() -> None:
    data = b"".join(encode_chunk(np.ones((4, 3), np.float32), LAYOUT).parts)
    assert decode_chunk(np.frombuffer(data[:-1], np.uint8), LAYOUT) is None


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
