"""What a block keeps beside its features: the example table, and the sums that kernels need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from gradstore.stages.reading import full_rows

if TYPE_CHECKING:
    import pyarrow as pa

    from gradstore.stages.loading import Batch
    from gradstore.store.examples import Example
    from gradstore.store.features import FeatureArray, SetInfo

# Output functions that a row of features counts otherwise for than eta times: see `gradstore.stages.contribute.rows`.
MARGIN = "margin"
DAS = "das"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What the model said of the examples of a block.

    Attributes
    ----------
    function
        Name of the output function f.
    values
        f of every example, float64; NaN where nothing was computed.
    residuals
        How wrong the model is about each, float64, where f is that of DAS.
    """

    function: str
    values: np.ndarray
    residuals: np.ndarray | None = None


def example_table(
    start: int,
    examples: Sequence[Example],
    outputs: Outputs,
    features: Mapping[str, np.ndarray],
    *,
    arrays: Sequence[FeatureArray],
) -> pa.Table:
    """Return the example table of a block: one row per example, with the norms of its features."""
    import pyarrow as pa

    # Of the same numbers as numpy's norm, in an eighth of its time.
    norms_NM = np.stack(
        [np.sqrt(np.square(full_rows(array, features[array.name]), dtype=np.float64).sum(1)) for array in arrays],
        1,
    )
    nothing = [None] * len(examples)
    values = outputs.values
    probability = np.exp(-np.logaddexp(0, -values)) if outputs.function == MARGIN else nothing
    residuals = nothing if outputs.residuals is None else outputs.residuals
    return pa.table(
        {
            "row": pa.array(range(start, start + len(examples)), pa.int64()),
            "example_id": pa.array([example.example_id for example in examples], pa.string()),
            "source": pa.array([example.source for example in examples], pa.string()),
            "label": pa.array([example.label for example in examples], pa.string()),
            "content_hash": pa.array([example.content_hash for example in examples], pa.string()),
            "tokens": pa.array([example.size for example in examples], pa.int64()),
            "loss": pa.array(values, pa.float64()),
            "p": pa.array(probability, pa.float64()),
            "residual": pa.array(residuals, pa.float64()),
            "gradient_norm": pa.array(np.sqrt(np.square(norms_NM).sum(1)), pa.float64()),
            "group_norms": pa.array(list(norms_NM.astype(np.float32)), pa.list_(pa.float32())),
            "valid": pa.array(np.isfinite(norms_NM).all(1) & np.isfinite(values), pa.bool_()),
        }
    )


def statistics_of(info: SetInfo, features: Mapping[str, np.ndarray]) -> pa.Table:
    """Return the statistics that features alone tell: without covariances."""
    return Statistics(info).table(features)


def _starts(array: FeatureArray) -> list[int]:
    """First feature of every part, as `full_rows` has them."""
    return [0, *accumulate(part.shape[0] * part.shape[1] for part in array.parts)][:-1]


class Statistics:
    """Sums over the valid rows of one block, group by group or, where features are matrices of parts, part by part.

    ``left`` is sum_t (P_o D_t)(P_o D_t)^T and ``right`` sum_t (P_i x_t)(P_i x_t)^T over all positions t at which the output
    gradient D_t is not zero: the covariances that EKFAC needs (docs/format.md).
    """

    def __init__(self, info: SetInfo) -> None:
        self._info = info
        self._covariances: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}

    def add(self, batch: Batch) -> None:
        """Take in the covariances of one batch."""
        for part, (left, right, positions) in batch.covariances.items():
            held = self._covariances.get(part)
            self._covariances[part] = (
                (left, right, positions) if held is None else (held[0] + left, held[1] + right, held[2] + positions)
            )

    def table(self, features: Mapping[str, np.ndarray]) -> pa.Table:
        """Return the statistics of the block whose features these are, NaN where a row is not valid."""
        import pyarrow as pa

        places: list[tuple[str, str | None, int, int]] = [
            (array.name, part.part, start, start + part.shape[0] * part.shape[1])
            for array in self._info.arrays
            for part, start in zip(array.parts, _starts(array), strict=True)
        ]
        places += [(array.name, None, 0, array.features) for array in self._info.arrays if not array.parts]
        found = [None if part is None else self._covariances.get(part) for _, part, _, _ in places]
        left = [None if item is None else item[0].astype(np.float32).reshape(-1) for item in found]
        right = [None if item is None else item[1].astype(np.float32).reshape(-1) for item in found]
        arrays = {array.name: array for array in self._info.arrays}
        energies = [
            np.square(full_rows(arrays[name], features[name])[:, start:stop], dtype=np.float64).sum(1)
            for name, _, start, stop in places
        ]
        return pa.table(
            {
                "group": pa.array([name for name, *_ in places], pa.string()),
                "part": pa.array([part for _, part, *_ in places], pa.string()),
                "rows": pa.array([int(np.isfinite(energy).sum()) for energy in energies], pa.int64()),
                "sum_squares": pa.array([float(np.nansum(energy)) for energy in energies], pa.float64()),
                "positions": pa.array([None if item is None else item[2] for item in found], pa.int64()),
                "left": pa.array(left, pa.list_(pa.float32())),
                "right": pa.array(right, pa.list_(pa.float32())),
            }
        )
