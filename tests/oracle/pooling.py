"""Attention pooling in decimals of 50 digits, in which e to the power of 10,000 is a number like any other."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Context, Decimal, localcontext

import numpy as np

Array = np.ndarray


def attention_pooled(scores_qn: Array, subsets: Sequence[Sequence[int]], sharpness: float = 1.0) -> Array:
    """For every query and subset the sum of exp(t |s|) s over the sum of exp(t |s|), as it is written."""
    result = np.zeros((len(scores_qn), len(subsets)))
    with localcontext(Context(prec=50)):
        for q, scores_n in enumerate(scores_qn):
            for s, subset in enumerate(subsets):
                above = below = Decimal(0)
                for n in subset:
                    score = Decimal(float(scores_n[n]))
                    exponential = (Decimal(sharpness) * abs(score)).exp()
                    above += exponential * score
                    below += exponential
                result[q, s] = float(above / below)
    return result
