"""How contributions are stored: in float32, or in float16 with a power-of-two scale for every query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from gradstore.store.codecs import Payload, encode_chunk
from gradstore.store.dtypes import DTYPES, Rounding
from gradstore.store.layout import ArrayLayout, chunk_path

ContributionDtype: TypeAlias = Literal["float32", "float16"]
# Beside the array that it scales.
_SCALE_NAME = "scale"
_SCALE = f"values/{_SCALE_NAME}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QueryRounding:
    """What contributions of every query become when they are stored, and back.

    Attributes
    ----------
    dtype
        The stored type.
    scales
        What stored values of every query are multiplied by, float32 [queries]; ones for float32.
    """

    dtype: ContributionDtype
    scales: npt.NDArray[np.float32]

    @classmethod
    def of(cls, dtype: ContributionDtype, scales: npt.NDArray[np.float32] | None, queries: int) -> QueryRounding:
        """Return that of some queries; float16 takes a power of two for each."""
        if scales is None:
            assert dtype == "float32", "float16 contributions need a scale for every query"
            scales = np.ones(queries, np.float32)
        assert scales.shape == (queries,)
        assert (np.frexp(scales)[0] == 0.5).all(), "scales must be powers of two"
        return cls(dtype=dtype, scales=scales)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """Type of stored values."""
        return DTYPES[self.dtype].numpy_dtype

    def encode(self, first: int, values: npt.NDArray[np.float32], out: npt.NDArray[Any]) -> Rounding:
        """Write contributions of the queries from ``first`` on as they are stored; return what was lost.

        Those of every query are contiguous in both.
        """
        dtype, lost = DTYPES[self.dtype], Rounding()
        for scale, source, target in zip(self.scales[first : first + len(values)], values, out, strict=True):
            lost += dtype.encode(source, float(scale), target)
        return lost

    def decode(self, first: int, stored: npt.NDArray[Any], out: npt.NDArray[np.float32]) -> None:
        """Write stored contributions of the queries from ``first`` on in their true scale."""
        dtype = DTYPES[self.dtype]
        for scale, source, target in zip(self.scales[first : first + len(stored)], stored, out, strict=True):
            dtype.decode(source, float(scale), target)

    def layouts(self) -> dict[str, ArrayLayout]:
        """Layout of ``values/scale`` [queries], by path, where there are scales."""
        if self.dtype != "float16":
            return {}
        shape = self.scales.shape
        return {_SCALE: ArrayLayout(shape=shape, chunk_shape=shape, dtype="float32", dimension_names=("query",))}

    def chunks(self) -> dict[str, Payload]:
        """Chunks of ``values/scale``, by path: known from artifact.json, so that no record names them."""
        return {chunk_path(path, 0): encode_chunk(self.scales, layout) for path, layout in self.layouts().items()}


def contribution_attributes(groups: Sequence[str], dtype: ContributionDtype) -> dict[str, Any]:
    """Zarr attributes of an array of contributions: the groups along its last axis, and what its queries are scaled by.

    ``scaled_by`` names the array beside it, [queries], whose values those of float16 are to be multiplied by.
    """
    scaled = {"scaled_by": _SCALE_NAME} if dtype == "float16" else {}
    return {"groups": list(groups), **scaled}
