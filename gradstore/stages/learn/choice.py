"""Which queries are held out, and which candidate does best on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradstore.errors import DataError
from gradstore.stages.contributions import Reads

if TYPE_CHECKING:
    from gradstore.numerics.scores import Transform


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """The candidate that is taken.

    Attributes
    ----------
    place
        Which one.
    gains
        By what factor each raises the top scores of the held-out queries; None where none are held out.
    """

    place: int
    gains: np.ndarray | None


def hold_out(valid: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Numbers of the queries that are held out, ascending: a share of the valid ones, drawn by a seed.

    At least one is held out and one is left.

    Raises
    ------
    DataError
        If there are fewer than two.
    """
    from gradstore.numerics.generator import derive_key, permutation, words

    if not share:
        return np.empty(0, np.int64)
    if len(valid) < 2:
        raise DataError(
            f"learn.held_out: found {share} of {len(valid)} valid learn queries; one is to be held out and one learned from. Add "
            "queries, or learn one candidate with learn.held_out = 0."
        )
    count = min(max(1, round(share * len(valid))), len(valid) - 1)
    drawn = permutation(words(derive_key(seed, "learner", "held out"), len(valid)))[:count]
    return np.sort(valid[drawn])


def choose(
    reads: Reads, weights_VM: np.ndarray, ks: Sequence[int], *, held_out: np.ndarray, transform: Transform
) -> Choice:
    """Take the candidate whose weights do best on the held-out queries, by one read of C; of equal ones the first.

    Judged are the top k of every k among the candidates, beside uniform weights: see `gain`.
    """
    from gradstore.numerics.learner import gain, judge

    if not len(held_out):
        return Choice(place=0, gains=None)
    num_groups = weights_VM.shape[1]
    compared_VM = np.concatenate([weights_VM, np.full((1, num_groups), 1 / num_groups)])
    judged_VK = judge(reads.read, compared_VM, ks, queries=held_out, transform=transform)
    gains = gain(judged_VK[:-1], judged_VK[-1])
    return Choice(place=int(gains.argmax()), gains=gains)
