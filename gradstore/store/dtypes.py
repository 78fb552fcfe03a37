"""The types that numbers are stored in: what each rounds, how far, and how it reads back.

Every conversion goes both ways between float32 and the stored type, in one pass of pieces that stay in the processor's
cache, by torch's vectorised copy: numpy narrows value by value, at six times the cost (ADR 0011). Rounding is to
the nearest, ties to even, and gives the same bits on every machine. What the store writes is read again without loss:
encoding a decoded value gives the value that was decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

# Names of DTYPES.
DtypeName: TypeAlias = Literal["float32", "float16", "bfloat16", "int8"]
Floats: TypeAlias = npt.NDArray[np.float32]
# One number for a whole array, or one for each of its rows.
Scale: TypeAlias = float | Floats

# What an int8 array holds where there is no number.
NO_NUMBER: Final = -128

# Values converted at a time: 512 KiB of float32, which stays in the second-level cache from step to step.
_PIECE: Final = 2**17
# Where torch may use several threads it does so above this size. The store never sets their number: it is the model's.
_PIECE_OF_ONE_THREAD: Final = 2**15
# Stored values looked at a time, of which only 16 bits are read.
_INSPECTED: Final = 2**17
# Bits of a 16-bit float without its sign.
_MAGNITUDE: Final = 0x7FFF
_LARGEST_LEVEL: Final = 127
_SCALE_EXPONENT: Final = 126
# In float32 a sum of this and a level has no bits left for fractions.
_NO_FRACTIONS: Final = 1.5 * 2.0**23
# A scale has 17 significant bits, so that its product with a level, of 7, is exact in float32.
_SPARE_BITS: Final = 2**7 - 1
_LEAST_SCALE: Final = np.float32(2.0**-142)
# The largest of 17 bits of which 127 are in float32's range.
_GREATEST_SCALE: Final = np.float32(float.fromhex("0x1.0204p+121"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """What storing lost.

    Attributes
    ----------
    saturated
        Numbers beyond the range of the stored type, which became its largest.
    flushed
        Numbers other than zero that became zero.
    finite
        Whether there was neither NaN nor infinity among the numbers.
    """

    saturated: int = 0
    flushed: int = 0
    finite: bool = True

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            saturated=self.saturated + other.saturated,
            flushed=self.flushed + other.flushed,
            finite=self.finite and other.finite,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDtype:
    """A type that numbers are stored in.

    Attributes
    ----------
    zarr_dtype
        The type of the Zarr array.
    fill_value
        What an unwritten value reads as: never a plausible number.
    scaled
        What value = stored x scale has one scale for: ``array``, a power of two; ``row``, found as the row is encoded; or
        ``none``, where value = stored.
    tags
        Attributes of the array, beside its scale.
    """

    zarr_dtype: str
    fill_value: float | int
    scaled: Literal["none", "array", "row"]
    tags: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    encoder: Callable[[Floats, Scale, npt.NDArray[Any]], Rounding]
    decoder: Callable[[npt.NDArray[Any], Scale, Floats], None]

    @property
    def item_bytes(self) -> int:
        """Bytes of a stored value."""
        return self.numpy_dtype.itemsize

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Type of the values in a chunk: little-endian on every machine."""
        return np.dtype(self.zarr_dtype).newbyteorder("<")

    def attributes(self, scale: float) -> dict[str, Any]:
        """Attributes of an array of this type that tell a reader what its values are."""
        return {**self.tags, **({"scale_factor": scale} if self.scaled == "array" else {})}

    def scale_of(self, values: Floats, scale: float) -> Scale:
        """Return what the values [n, k] are to be scaled by: ``scale``, or a scale for each of their rows."""
        return row_scales(values) if self.scaled == "row" else scale

    def encode(self, values: Floats, scale: Scale, out: npt.NDArray[Any]) -> Rounding:
        """Write ``values / scale``, rounded, into ``out`` of the stored type; both are contiguous and of one shape.

        NaN stays NaN. Returns what was lost.
        """
        assert out.shape == values.shape
        assert out.dtype == self.numpy_dtype
        assert out.flags.c_contiguous
        assert self.scaled != "array" or is_scale(float(scale)), "scales must be powers of two"
        return self.encoder(_for_torch(values), scale, out)

    def decode(self, stored: npt.NDArray[Any], scale: Scale, out: Floats) -> None:
        """Write ``stored * scale`` into ``out``; both are contiguous and of one shape."""
        assert out.shape == stored.shape
        assert out.flags.c_contiguous
        self.decoder(_for_torch(stored), scale, out)


def is_scale(scale: float) -> bool:
    """Whether a number can be the scale of an array: a power of two whose reciprocal float32 holds too."""
    return math.frexp(scale)[0] == 0.5 and 2.0**-_SCALE_EXPONENT <= scale <= 2.0**_SCALE_EXPONENT


def nearest_scale(size: float) -> float:
    """Return the scale that brings numbers of a size nearest to 1, the middle of float16's range; of no such size, 1."""
    if not 0 < size < math.inf:
        return 1.0
    return 2.0 ** max(-_SCALE_EXPONENT, min(round(math.log2(size)), _SCALE_EXPONENT))


def row_scales(values: Floats) -> Floats:
    """Scale of every row of values [n, k] in int8: s = max |x| / 127, rounded up to 17 significant bits.

    So every s x level is exact in float32, and a row that was read has again the same scale. A row with a NaN has the
    scale NaN, and a row of zeros 0. An infinity counts as the largest float32.
    """
    largest = np.maximum(values.max(axis=1, initial=0), -values.min(axis=1, initial=0))
    quotients = np.minimum(largest, np.finfo(np.float32).max) / np.float32(_LARGEST_LEVEL)
    # Where the division gave zero, the least of 17 bits; and none whose largest level is beyond float32.
    least = np.where(largest > 0, _LEAST_SCALE, np.float32(0))
    scales: Floats = np.clip(_rounded_up(quotients), least, _GREATEST_SCALE)
    scales[np.isnan(largest)] = np.nan
    return scales


def _rounded_up(values: Floats) -> Floats:
    """Round to 17 significant bits, those that are not negative, away from zero."""
    bits = (values.view(np.uint32) + np.uint32(_SPARE_BITS)) & np.uint32(2**32 - 1 - _SPARE_BITS)
    return bits.view(np.float32)


def _encode_float32(values: Floats, scale: Scale, out: npt.NDArray[Any]) -> Rounding:
    del scale
    np.copyto(out, values)
    return Rounding(finite=bool(np.isfinite(values).all()))


def _decode_float32(stored: npt.NDArray[Any], scale: Scale, out: Floats) -> None:
    del scale
    np.copyto(out, stored)


def _encode_float16(values: Floats, scale: Scale, out: npt.NDArray[Any]) -> Rounding:
    import torch

    inverse = 1 / float(scale)
    for piece, halves in _pieces(values, out):
        # An exact product, since the scale is a power of two, and then one rounding.
        torch.mul(piece, inverse, out=halves)
    return _settle(values, out.reshape(-1).view(np.uint16), infinity=0x7C00, nan=0x7E00)


def _decode_float16(stored: npt.NDArray[Any], scale: Scale, out: Floats) -> None:
    factor = float(scale)
    for halves, piece in _pieces(stored, out):
        piece.copy_(halves)
        if factor != 1:
            piece.mul_(factor)


def _encode_bfloat16(values: Floats, scale: Scale, out: npt.NDArray[Any]) -> Rounding:
    import torch

    del scale
    for piece, halves in _pieces(values, out.view(np.int16)):
        halves.view(torch.bfloat16).copy_(piece)
    return _settle(values, out.reshape(-1), infinity=0x7F80, nan=0x7FC0)


def _decode_bfloat16(stored: npt.NDArray[Any], scale: Scale, out: Floats) -> None:
    import torch

    del scale
    for halves, piece in _pieces(stored.view(np.int16), out):
        piece.copy_(halves.view(torch.bfloat16))


def _encode_int8(values: Floats, scale: Scale, out: npt.NDArray[Any]) -> Rounding:
    import torch

    scales = np.asarray(scale, np.float32)
    lost = np.isnan(scales)
    # Rows of zeros stay what they are; rows without a number are overwritten.
    divisors = torch.from_numpy(np.where(lost | (scales == 0), np.float32(1), scales))[:, None]
    source, target, scratch = torch.from_numpy(values), torch.from_numpy(out), torch.empty(_piece())
    for rows, columns in _tiles(values.shape):
        piece = source[rows, columns]
        levels = torch.div(piece, divisors[rows], out=scratch[: piece.numel()].view(piece.shape))
        # Above 2^23 float32 has no fractions, so the sum is rounded to an integer, ties to even.
        levels.clamp_(-_LARGEST_LEVEL, _LARGEST_LEVEL).add_(_NO_FRACTIONS).sub_(_NO_FRACTIONS)
        target[rows, columns].copy_(levels)
    out[lost] = NO_NUMBER
    kept = (values[~lost], out[~lost]) if lost.any() else (values, out)
    flushed = np.count_nonzero(kept[0]) - np.count_nonzero(kept[1])
    # Only an infinity is beyond the range, since a row's scale is that of its largest number: then it is the greatest.
    near = bool((scales >= _GREATEST_SCALE).any())
    saturated = int(np.count_nonzero(np.isinf(kept[0]))) if near else 0
    return Rounding(saturated=saturated, flushed=int(flushed), finite=not saturated and not lost.any())


def _decode_int8(stored: npt.NDArray[Any], scale: Scale, out: Floats) -> None:
    import torch

    factors = torch.from_numpy(np.array(scale, np.float32))[:, None]
    source, target = torch.from_numpy(stored), torch.from_numpy(out)
    for rows, columns in _tiles(stored.shape):
        target[rows, columns].copy_(source[rows, columns]).mul_(factors[rows])


def _settle(values: Floats, bits: npt.NDArray[np.uint16], *, infinity: int, nan: int) -> Rounding:
    """Mend what the conversion of ``values`` to a 16-bit float made of those that it cannot hold, and count them.

    Few pieces hold a zero or a number that is not finite, and only these are looked at closely: twice the bits, less one,
    are largest for just those.
    """
    flat, rounding = values.reshape(-1), Rounding()
    scratch = np.empty(min(_INSPECTED, bits.size), np.uint16)
    for start in range(0, bits.size, _INSPECTED):
        piece = bits[start : start + _INSPECTED]
        doubled = np.add(piece, piece, out=scratch[: piece.size])
        np.subtract(doubled, np.uint16(1), out=doubled)
        if doubled.max() >= 2 * infinity - 1:
            rounding += _settle_piece(flat[start : start + _INSPECTED], piece, infinity, nan)
    return rounding


def _settle_piece(values: Floats, bits: npt.NDArray[np.uint16], infinity: int, nan: int) -> Rounding:
    saturated, finite = 0, True
    magnitudes = bits & np.uint16(_MAGNITUDE)
    if magnitudes.max() >= infinity:
        is_finite = np.isfinite(values)
        beyond = (magnitudes == infinity) & is_finite
        # The bits before infinity's are those of the largest number, of either sign.
        bits[beyond] -= np.uint16(1)
        # Of the many NaN one is stored, whatever processor converted it.
        bits[np.isnan(values)] = nan
        saturated, finite = int(np.count_nonzero(beyond)), bool(is_finite.all())
    flushed = np.count_nonzero(values) - np.count_nonzero(magnitudes)
    return Rounding(saturated=saturated, flushed=int(flushed), finite=finite)


def _for_torch(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array that torch takes without a warning; it writes to none that is not an ``out``."""
    return np.ascontiguousarray(array) if array.flags.writeable else array.copy()


def _pieces(source: npt.NDArray[Any], target: npt.NDArray[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    import torch

    size = _piece()
    first, second = torch.from_numpy(source).view(-1), torch.from_numpy(target).view(-1)
    for start in range(0, first.numel(), size):
        yield first[start : start + size], second[start : start + size]


def _piece() -> int:
    import torch

    return _PIECE if torch.get_num_threads() == 1 else _PIECE_OF_ONE_THREAD


def _tiles(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Pieces of a matrix: some rows, or of a long one some columns."""
    rows, columns = shape
    size = _piece()
    width = max(1, min(columns, size))
    height = size // width
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            yield slice(row, row + height), slice(column, column + width)


DTYPES: Final[Mapping[str, StoredDtype]] = {
    "float32": StoredDtype(
        zarr_dtype="float32",
        fill_value=float("nan"),
        scaled="none",
        encoder=_encode_float32,
        decoder=_decode_float32,
    ),
    "float16": StoredDtype(
        zarr_dtype="float16",
        fill_value=float("nan"),
        scaled="array",
        encoder=_encode_float16,
        decoder=_decode_float16,
    ),
    # No Zarr reader has bfloat16: its bits are kept as integers, of which those of NaN stand where nothing was written.
    "bfloat16": StoredDtype(
        zarr_dtype="uint16",
        fill_value=0x7FC0,
        scaled="none",
        tags=MappingProxyType({"stored_as": "bfloat16"}),
        encoder=_encode_bfloat16,
        decoder=_decode_bfloat16,
    ),
    "int8": StoredDtype(
        zarr_dtype="int8",
        fill_value=NO_NUMBER,
        scaled="row",
        tags=MappingProxyType({"scaled_by": "scales"}),
        encoder=_encode_int8,
        decoder=_decode_int8,
    ),
}
