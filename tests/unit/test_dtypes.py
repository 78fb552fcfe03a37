"""What every stored type makes of a number, against plain loops in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gradstore.spec import FeaturesSection
from gradstore.store.dtypes import DTYPES, NO_NUMBER, Rounding, Scale, is_scale, nearest_scale, row_scales

FLOAT32_MAX = float(np.finfo(np.float32).max)
# Significant bits, least exponent of a normal number, largest number.
FLOAT16 = (11, -14, 65504.0)
BFLOAT16 = (8, -126, (2 - 2.0**-7) * 2.0**127)
# Numbers that a rounding may get wrong: ties, subnormals, both ends of every range.
EDGES = [
    *(0.0, 1.0, 1 / 3, 1e-3, 65504.0, 65519.99, 65520.0, 65536.0, 1e9, FLOAT32_MAX, 3.39e38, 3.3895e38, 3.3962e38),
    *(2.0**-24, 2.0**-25, 1.0001 * 2.0**-25, 1.5 * 2.0**-24, 2.0**-14, 2.0**-14 - 2.0**-25, 1023.5 * 2.0**-24),
    *(2.0**-126, 2.0**-133, 2.0**-134, 1.5 * 2.0**-133, 2.0**-126 - 2.0**-134, 2.0**-149, 127.5 * 2.0**-133),
    *((1 + odd * 2.0**-11) for odd in (1, 3, 5)),
    *((1 + odd * 2.0**-8) for odd in (1, 3, 5)),
]
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
rows_of_numbers = arrays.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.floats(width=32)
)


def nearest(value: float, kind: tuple[int, int, float]) -> float:
    """Round to the nearest float of a kind, ties to even; finite numbers beyond its range become its largest."""
    bits, least, largest = kind
    if value == 0 or not math.isfinite(value):
        return value
    quantum = 2.0 ** (max(math.frexp(value)[1] - 1, least) - (bits - 1))
    return max(-largest, min(largest, round(value / quantum) * quantum))


def rounded(values: npt.NDArray[np.float32], scale: float, kind: tuple[int, int, float]) -> tuple[np.ndarray, Rounding]:
    """(what should be stored, in float64, and what that loses), number by number."""
    found = np.array([nearest(float(value) / scale, kind) for value in values.flat]).reshape(values.shape)
    lost = [float(value) / scale for value in values.flat]
    return found, Rounding(
        saturated=sum(math.isfinite(value) and abs(value) >= overflow(kind) for value in lost),
        flushed=sum(value != 0 and new == 0 for value, new in zip(lost, found.flat, strict=True)),
        finite=all(map(math.isfinite, lost)),
    )


def overflow(kind: tuple[int, int, float]) -> float:
    """The least number that rounds beyond the largest of a kind: half a unit above it, which is a tie and so rounds up."""
    bits, _, largest = kind
    return largest + 2.0 ** (math.frexp(largest)[1] - 1 - bits)


def encoded(name: str, values: npt.NDArray[np.float32], scale: float = 1.0) -> tuple[np.ndarray, Scale, Rounding]:
    dtype = DTYPES[name]
    out = np.empty(values.shape, dtype.numpy_dtype)
    scales = dtype.scale_of(values, scale)
    return out, scales, dtype.encode(values, scales, out)


def decoded(name: str, stored: np.ndarray, scale: Scale) -> npt.NDArray[np.float32]:
    out = np.empty(stored.shape, np.float32)
    DTYPES[name].decode(stored, scale, out)
    return out


def numbers(seed: int = 0) -> npt.NDArray[np.float32]:
    """Numbers of every exponent, and edges, of both signs: not one that is not finite."""
    bits = np.random.default_rng(seed).integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    edges = np.array([sign * value for value in EDGES for sign in (1, -1)], np.float32)
    return np.concatenate([bits[np.isfinite(bits)], edges])[None]


def test_run_toml_accepts_the_types_that_the_store_has() -> None:
    assert set(get_args(FeaturesSection.model_fields["dtype"].annotation)) == set(DTYPES)


@pytest.mark.parametrize(("name", "kind"), [("float16", FLOAT16), ("bfloat16", BFLOAT16)])
def test_narrowing_rounds_to_the_nearest_and_counts_what_it_loses(name: str, kind: tuple[int, int, float]) -> None:
    values = numbers()
    stored, scale, rounding = encoded(name, values)
    expected, lost = rounded(values, 1.0, kind)
    found = decoded(name, stored, scale)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(values))
    assert rounding == lost
    assert lost.saturated > 0
    assert lost.flushed > 0


@pytest.mark.parametrize("exponent", [-126, -40, -24, -1, 0, 10, 40, 126])
def test_narrowing_to_float16_divides_by_its_scale_without_a_second_rounding(exponent: int) -> None:
    values = numbers(1)
    stored, _, rounding = encoded("float16", values, 2.0**exponent)
    expected, lost = rounded(values, 2.0**exponent, FLOAT16)
    np.testing.assert_array_equal(stored.astype(np.float64), expected)
    assert rounding == lost


def test_narrowing_to_float16_has_the_bits_that_numpy_gives_in_float64() -> None:
    values = np.random.default_rng(2).integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)][None]
    stored, _, _ = encoded("float16", values, 2.0**7)
    with np.errstate(over="ignore"):
        expected = np.clip(values.astype(np.float64) / 2.0**7, -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(stored.view(np.uint16), expected.view(np.uint16))


@given(rows_of_numbers, st.sampled_from([2.0**-20, 1.0, 2.0**9]))
def test_float16_and_bfloat16_agree_with_the_loops_on_any_numbers(
    values: npt.NDArray[np.float32], scale: float
) -> None:
    for name, kind, by in (("float16", FLOAT16, scale), ("bfloat16", BFLOAT16, 1.0)):
        stored, _, rounding = encoded(name, values, by)
        expected, lost = rounded(values, by, kind)
        np.testing.assert_array_equal(decoded(name, stored, 1.0), expected)
        assert rounding == lost


@pytest.mark.parametrize("scale", [1.0, 2.0**-24, 2.0**-40, 2.0**10, 2.0**16, 2.0**40, 2.0**112])
def test_every_float16_is_widened_exactly_as_numpy_widens_it(scale: float) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        expected = halves.astype(np.float32) * np.float32(scale)
    found = decoded("float16", halves, scale)
    np.testing.assert_array_equal(found, expected)
    sound = np.isfinite(halves)
    np.testing.assert_array_equal(found[sound].view(np.uint32), expected[sound].view(np.uint32))


def test_every_bfloat16_is_widened_to_its_bits_and_sixteen_zeros() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    found = decoded("bfloat16", bits, 1.0)
    expected = np.left_shift(bits.astype(np.uint32), 16).view(np.float32)
    np.testing.assert_array_equal(found, expected)
    sound = np.isfinite(expected)
    np.testing.assert_array_equal(found[sound].view(np.uint32), expected[sound].view(np.uint32))


@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=finite))
def test_int8_has_the_level_that_the_loops_find_within_half_a_scale(values: npt.NDArray[np.float32]) -> None:
    stored, scales, rounding = encoded("int8", values)
    assert not isinstance(scales, float)
    flushed = 0
    for row, (numbers, scale) in enumerate(zip(values.tolist(), scales.tolist(), strict=True)):
        # The quotient is a float32; the double rounding of a quotient by way of float64 is none.
        levels = [round(float(np.float32(number / scale))) if scale else 0 for number in numbers]
        assert stored[row].tolist() == [max(-127, min(127, level)) for level in levels]
        flushed += sum(level == 0 and number != 0 for level, number in zip(levels, numbers, strict=True))
        largest = max(map(abs, numbers))
        assert largest / 127 * (1 - 2.0**-16) <= scale <= largest / 127 * (1 + 2.0**-16) + 2.0**-142
    errors = np.abs(decoded("int8", stored, scales).astype(np.float64) - values)
    assert (errors <= scales[:, None].astype(np.float64) / 2 * (1 + 2.0**-16)).all()
    assert rounding == Rounding(flushed=flushed)


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=finite),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([2.0**-30, 1.0, 2.0**20]),
)
def test_what_was_read_is_stored_again_without_loss(values: npt.NDArray[np.float32], name: str, scale: float) -> None:
    stored, scales, _ = encoded(name, values, scale)
    read = decoded(name, stored, scales)
    if not np.isfinite(read).all():
        # 65504 times a scale may be beyond float32; such a scale is of numbers that are.
        assert name == "float16"
        return
    again, scales_again, rounding = encoded(name, read, scale)
    np.testing.assert_array_equal(again, stored)
    np.testing.assert_array_equal(scales_again, scales)
    assert rounding == Rounding()


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001])
def test_rows_of_nan_stay_nan_and_have_one_pattern_of_bits(name: str, bits: int) -> None:
    values = np.random.default_rng(0).standard_normal((7, 33), dtype=np.float32)
    values[[2, 6]] = np.array(bits, np.uint32).view(np.float32)
    stored, scales, rounding = encoded(name, values)
    found = decoded(name, stored, scales)
    assert np.isnan(found[[2, 6]]).all()
    assert np.isfinite(found[[0, 1, 3, 4, 5]]).all()
    assert not rounding.finite
    assert rounding.saturated == 0
    if name != "float32":
        unwritten = np.full(33, DTYPES[name].fill_value, DTYPES[name].numpy_dtype)
        assert stored[2].tobytes() == stored[6].tobytes() == unwritten.tobytes()


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_a_nan_among_numbers_is_alone_in_a_type_of_floats(name: str) -> None:
    stored, scales, rounding = encoded(name, np.array([[1.0, np.nan, 0.0]], np.float32))
    np.testing.assert_array_equal(decoded(name, stored, scales), [[1.0, np.nan, 0.0]])
    assert rounding == Rounding(finite=False)


def test_a_nan_among_numbers_takes_its_row_with_it_in_int8() -> None:
    stored, scales, rounding = encoded("int8", np.array([[1.0, np.nan, 0.0], [1.0, 2.0, 0.0]], np.float32))
    assert stored[0].tolist() == [NO_NUMBER] * 3
    assert np.isnan(decoded("int8", stored, scales)[0]).all()
    assert decoded("int8", stored, scales)[1].tolist() == pytest.approx([1.0, 2.0, 0.0], abs=0.01)
    assert rounding == Rounding(finite=False)


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_infinities_stay_in_a_type_that_has_them(name: str) -> None:
    values = np.array([[np.inf, -np.inf, np.nan, 1.0]], np.float32)
    stored, scales, rounding = encoded(name, values)
    np.testing.assert_array_equal(decoded(name, stored, scales), values)
    assert rounding == Rounding(finite=False)


def test_infinities_become_the_largest_number_in_int8_and_are_counted() -> None:
    values = np.array([[np.inf, -np.inf, 0.0, 1.0], [np.inf, np.nan, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], np.float32)
    stored, scales, rounding = encoded("int8", values)
    found = decoded("int8", stored, scales)
    np.testing.assert_allclose(found[0], [FLOAT32_MAX, -FLOAT32_MAX, 0.0, 0.0], rtol=2.0**-16)
    assert np.isnan(found[1]).all()
    assert rounding == Rounding(saturated=2, flushed=1, finite=False)


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (3, 5), (1, 2**15), (2, 2**15 + 1), (300, 1000)])
def test_zeros_of_any_shape_stay_zeros_without_loss(name: str, shape: tuple[int, int]) -> None:
    stored, scales, rounding = encoded(name, np.zeros(shape, np.float32))
    np.testing.assert_array_equal(decoded(name, stored, scales), np.zeros(shape))
    assert rounding == Rounding()


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_piece_of_a_large_array_is_converted(name: str) -> None:
    values = np.random.default_rng(3).standard_normal((70, 5000), dtype=np.float32) + 3
    values[10, 4000] = np.nan
    values[69, 4999] = 1e6
    stored, scales, rounding = encoded(name, values)
    found = decoded(name, stored, scales)
    sound = [row for row in range(70) if row not in (10, 69)]
    np.testing.assert_allclose(found[sound], values[sound], atol=0.03, rtol=2.0**-8)
    assert np.isnan(found[10, 4000])
    # float16 alone has no 1e6.
    assert rounding.saturated == (name == "float16")
    assert found[69, 4999] == pytest.approx(65504 if name == "float16" else 1e6, rel=2.0**-8)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_arrays_that_may_not_be_written_are_read(name: str) -> None:
    values = np.array([[1.0, -2.0]], np.float32)
    values.flags.writeable = False
    stored, scales, _ = encoded(name, values)
    kept = np.frombuffer(stored.tobytes(), stored.dtype).reshape(stored.shape)
    np.testing.assert_allclose(decoded(name, kept, scales), values, rtol=2.0**-6)


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        (0.0, 1.0),
        (math.nan, 1.0),
        (math.inf, 1.0),
        (1.0, 1.0),
        (3.0, 4.0),
        (2.8, 2.0),
        (1e-3, 2.0**-10),
        (1e-45, 2.0**-126),
        (3e38, 2.0**126),
    ],
)
def test_the_scale_of_an_array_is_the_power_of_two_nearest_to_the_size_of_its_numbers(
    size: float, scale: float
) -> None:
    assert nearest_scale(size) == scale
    assert is_scale(scale)


@pytest.mark.parametrize("scale", [0.0, 3.0, -2.0, 2.0**-127, 2.0**127, math.inf, math.nan])
def test_what_float32_cannot_divide_by_exactly_is_no_scale(scale: float) -> None:
    assert not is_scale(scale)


@pytest.mark.parametrize("largest", [0.0, 2.0**-149, 2.0**-140, 1e-38, 1.0, 3.0, FLOAT32_MAX])
def test_a_scale_times_any_level_is_exact_in_float32(largest: float) -> None:
    (scale,) = row_scales(np.array([[largest, 0.0, -largest / 2]], np.float32)).tolist()
    for level in range(-127, 128):
        assert float(np.float32(level) * np.float32(scale)) == level * scale
    assert math.isfinite(127 * scale)
    assert (scale == 0) == (largest == 0)


def test_conversions_stay_in_one_thread_and_leave_torchs_threads_alone() -> None:
    program = """
import os, numpy as np, torch
from gradstore.store.dtypes import DTYPES
torch.set_num_threads(2)
def threads(): return len(os.listdir("/proc/self/task"))
values = np.ones((256, 4096), np.float32)
before = threads()
for dtype in DTYPES.values():
    out = np.empty(values.shape, dtype.numpy_dtype)
    scale = dtype.scale_of(values, 1.0)
    dtype.encode(values, scale, out)
    dtype.decode(out, scale, values)
after = threads()
torch.ones(2**22).mul_(2)
print(after - before, torch.get_num_threads(), threads() - after)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # The last figure says that this torch does start threads where it is given more.
    assert done.stdout.split() == ["0", "2", "1"]


def test_the_store_is_imported_without_torch() -> None:
    program = "import sys, gradstore.store.features, gradstore.store.artifacts; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
