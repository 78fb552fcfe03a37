"""What storing features in a type does to scores, as it was measured on a real store.

SmolLM2-135M in float32 on BBC News: 200 train and 30 eval articles of up to 96 tokens, 210 groups, logra with r = 16. The train
features were rounded through each type, and the scores of every query compared with those of the float32 features:
tests/benchmarks/bench_dtypes.py, which a slow test runs on fewer articles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

MEASURED_ON: Final = "SmolLM2-135M on BBC News, logra with r = 16"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreError:
    """Root mean square of the differences of scores, over that of the float32 ones, under two kernels.

    The block kernel's damping is 0.1 of the mean eigenvalue.
    """

    identity: float
    block: float


SCORE_ERRORS: Final[Mapping[str, ScoreError]] = {
    "float32": ScoreError(identity=0.0, block=0.0),
    "float16": ScoreError(identity=3.2e-5, block=2.6e-4),
    "bfloat16": ScoreError(identity=2.5e-4, block=2.1e-3),
    "int8": ScoreError(identity=9.7e-4, block=1.0e-2),
}
# What blosc leaves of the bytes of each type, on the same features.
BLOSC_RATIOS: Final[Mapping[str, float]] = {"float32": 0.91, "float16": 0.95, "bfloat16": 0.83, "int8": 1.0}
