"""Lossless compression of chunks, between their values and their checksum; readers of Zarr have it built in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from zarr.codecs import BloscCodec

Bytes = npt.NDArray[np.uint8]

# Bytes of blosc's header, in which those from the fourth on are the size of the values.
_HEADER_BYTES: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Blosc:
    """blosc: the bits of equal weight of all values side by side, then lz4.

    Attributes
    ----------
    level
        From 1, the fastest, to 9.
    overhead_bytes
        What a chunk that cannot be compressed grows by.
    """

    level: int = 5
    overhead_bytes: int = _HEADER_BYTES

    def compress(self, raw: Bytes, item_bytes: int) -> bytes:
        """Compress values of ``item_bytes`` each; the same values always give the same bytes."""
        # zarr tells numcodecs to compress in the calling thread: in several, blocks would lie in the order of completion.
        import zarr.codecs.blosc  # noqa: F401
        from numcodecs import blosc

        packed: bytes = blosc.compress(raw, b"lz4", self.level, blosc.BITSHUFFLE, typesize=item_bytes)
        return packed

    def size(self, packed: Bytes) -> int | None:
        """Bytes of the values that some bytes are of by their header, or None if they have none."""
        if packed.size < _HEADER_BYTES:
            return None
        return int.from_bytes(packed[4:8].tobytes(), "little")

    def decompress(self, packed: Bytes, out: Bytes) -> bool:
        """Write the values into ``out``, which has their size; False if the bytes are not theirs."""
        from numcodecs import blosc

        try:
            blosc.decompress(packed, out)
        except (RuntimeError, ValueError):
            return False
        return True

    def zarr_codec(self, item_bytes: int) -> BloscCodec:
        """Codec that the array's metadata names."""
        from zarr.codecs import BloscCodec

        return BloscCodec(typesize=item_bytes, cname="lz4", clevel=self.level, shuffle="bitshuffle", blocksize=0)


COMPRESSIONS: Final[Mapping[str, Blosc | None]] = {"none": None, "blosc": Blosc()}
