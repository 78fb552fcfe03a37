"""Memory whose address does not depend on what the process did before."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

# Bytes of a cache line: libraries of linear algebra sum in one order where addresses are equal modulo this.
LINE: Final = 64


def aligned(shape: int | tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Return a new array that is not filled and begins at a cache line."""
    item = np.dtype(dtype)
    count = int(np.prod(shape))
    memory = np.empty(count * item.itemsize + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + count * item.itemsize].view(item).reshape(shape)


def lines(num_bytes: int) -> int:
    """Bytes of the cache lines that ``num_bytes`` take."""
    return -(-num_bytes // LINE) * LINE
