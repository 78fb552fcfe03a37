"""Attention pooling: what the scores of single examples predict of a model that was trained on a set of them."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from gradstore.errors import DataError

# Q queries, S subsets, N examples; q queries and n examples of a piece, k of these in one subset; K in the largest subset.

# Scores of one subset in float64 that are worked on at once: they fit in a core's cache.
TILE_BYTES = 2**20
# Per example, at most: its share is rounded as it is made and whenever a larger score comes, then in a sum and a quotient.
ROUNDINGS = 8


class AttentionPools:
    r"""What scores predict of models that were trained on subsets, pooled by attention as scores stream by.

    .. math:: P[q, s] = \sum_{n \in s} \alpha_n S[q, n], \quad
        \alpha_n = \frac{\exp t |S[q, n]|}{\sum_{m \in s} \exp t |S[q, m]|}

    the pooling of AirRep (arXiv 2505.18513), where S[q, n] is the product of the vectors of query and example and t, the
    sharpness, is 1. It is in the units of the scores, between the smallest and the largest of a subset: of scores that are
    multiplied by t it is t times as large, and orders subsets alike.

    Exponentials are of differences to the largest size of a score that a query has had in the same subset, in float64:
    no score is too large, nor does a large one outside of a subset make those within it vanish. Held are the masks, three
    numbers for each query and subset, and some tiles.

    Parameters
    ----------
    masks_SN
        True where an example is in a subset. What is added of no example counts in none.
    num_queries
        Q.
    sharpness
        t, above 0, in one over the units of the scores: the larger, the more counts the score of the largest size.

    Raises
    ------
    DataError
        If a subset has no example.
    """

    def __init__(self, masks_SN: Bool[np.ndarray, "S N"], num_queries: int, *, sharpness: float = 1.0) -> None:
        _refuse_without_example(np.flatnonzero(~masks_SN.any(1)).tolist())
        self._masks_SN, self._sharpness = masks_SN, sharpness
        shape = num_queries, len(masks_SN)
        self._largest_QS = np.full(shape, -np.inf)
        self._attention_QS = np.zeros(shape)
        self._sums_QS = np.zeros(shape)

    def add(self, scores_qn: Float[np.ndarray, "q n"], rows_n: Int64[np.ndarray, " n"], first: int = 0) -> None:
        """Take in the scores of some examples, given by their numbers, for some queries from the ``first`` on.

        An example is to be added once for each query, in whatever pieces and order.

        Raises
        ------
        DataError
            If a score is not finite.
        """
        assert first + len(scores_qn) <= len(self._sums_QS)
        if strange := scores_qn.size - int(np.count_nonzero(np.isfinite(scores_qn))):
            raise DataError(
                f"attention pooling: {strange:,} of {scores_qn.size:,} scores are not finite. Leave out their queries, or "
                "the training examples and models they come from."
            )
        for subset, mask_N in enumerate(self._masks_SN):
            places_k = np.flatnonzero(mask_N[rows_n])
            if not len(places_k):
                continue
            queries_at_once = max(1, TILE_BYTES // (np.dtype(np.float64).itemsize * len(places_k)))
            for start in range(0, len(scores_qn), queries_at_once):
                tile_qk = scores_qn[start : start + queries_at_once].take(places_k, axis=1).astype(np.float64)
                queries = slice(first + start, first + start + len(tile_qk))
                self._take_in(tile_qk, queries, subset)

    def _take_in(self, scores_qk: Float64[np.ndarray, "q k"], queries: slice, subset: int) -> None:
        place = queries, subset
        attention_qk = np.abs(scores_qk)
        largest_q = np.maximum(self._largest_QS[place], attention_qk.max(1))
        # Before the first score the largest is minus infinity, and what it keeps of the sums is 0.
        kept_q = np.exp(self._sharpness * (self._largest_QS[place] - largest_q))
        attention_qk -= largest_q[:, None]
        attention_qk *= self._sharpness
        np.exp(attention_qk, out=attention_qk)
        self._largest_QS[place] = largest_q
        self._attention_QS[place] = self._attention_QS[place] * kept_q + attention_qk.sum(1)
        attention_qk *= scores_qk
        self._sums_QS[place] = self._sums_QS[place] * kept_q + attention_qk.sum(1)

    def pools(self) -> Float64[np.ndarray, "Q S"]:
        """P.

        Raises
        ------
        DataError
            If of some query no score in some subset was added.
        """
        if len(missing := np.argwhere(np.isneginf(self._largest_QS))):
            query, subset = missing[0].tolist()
            raise DataError(
                f"attention pooling: query {query} has no score yet of an example in subset {subset}. Add the scores of all "
                "examples before the total."
            )
        return self._sums_QS / self._attention_QS

    def total(self) -> Float64[np.ndarray, "Q S"]:
        """P; zero for a query whose pools differ by no more than rounding.

        Raises
        ------
        DataError
            If of some query no score in some subset was added.
        """
        pools_QS = self.pools()
        # Pools of equal scores in another order differ in their last bits, which must not become ranks.
        roundings = ROUNDINGS * self._masks_SN.shape[1] * np.finfo(np.float64).eps
        rounding_Q = roundings * self._largest_QS.max(1)
        return np.where((np.ptp(pools_QS, axis=1) <= rounding_Q)[:, None], 0.0, pools_QS)


def attention_pool(scores_QN: Float[Tensor, "Q N"], masks_SN: Bool[Tensor, "S N"]) -> Float[Tensor, "Q S"]:
    r"""What scores predict of models that were trained on subsets, pooled by attention; differentiable in the scores.

    .. math:: P[q, s] = \sum_{n \in s} \alpha_n S[q, n], \quad
        \alpha_n = \frac{\exp |S[q, n]|}{\sum_{m \in s} \exp |S[q, m]|}

    It is what `AttentionPools` gives, of scores that are all there, and without its zeros where pools differ by rounding: it is
    for training (arXiv 2505.18513). The gradient passes through the attention too; where a score is 0, the size has slope 0.

    Scores are gathered into [Q, S, K], so that the cost follows the largest subset: as many small subsets share few examples, a
    softmax over all N of them would mostly be of zeros. Two products of matrices would cost less still, but their
    exponentials, of differences to a query's largest score, vanish in float32 where a subset's own are 104 below it.

    Parameters
    ----------
    scores_QN
        Products of the vectors of queries and examples.
    masks_SN
        True where an example is in a subset.

    Returns
    -------
    Tensor
        [Q, S], in the units of the scores; at least float32 whatever their precision. NaN where a score of the subset is
        not finite.

    Raises
    ------
    DataError
        If a subset has no example.
    """
    sizes_S = masks_SN.sum(1)
    _refuse_without_example(torch.nonzero(sizes_S == 0)[:, 0].tolist())
    examples_SK, inside_SK = _gathered(masks_SN, sizes_S)
    wide_QN = scores_QN.to(torch.promote_types(scores_QN.dtype, torch.float32))
    # The gradient of index_select is one index_add, which that of an index in brackets is not.
    own_QSK = wide_QN.index_select(1, examples_SK.flatten()).view(len(wide_QN), *examples_SK.shape)
    attention_QSK = torch.softmax(own_QSK.abs().masked_fill(~inside_SK, float("-inf")), 2)
    pools_QS: Tensor = (attention_QSK * own_QSK.masked_fill(~inside_SK, 0)).sum(2)
    return pools_QS


def _gathered(
    masks_SN: Bool[Tensor, "S N"], sizes_S: Int[Tensor, " S"]
) -> tuple[Int[Tensor, "S K"], Bool[Tensor, "S K"]]:
    """The numbers of every subset's examples, example 0 where it has fewer than the largest, and whether it has not."""
    largest = int(sizes_S.max())
    inside_SK = torch.arange(largest, device=masks_SN.device) < sizes_S[:, None]
    examples_SK = torch.zeros_like(inside_SK, dtype=torch.int64)
    # Both are in the order of subsets, and within one in that of its examples.
    examples_SK[inside_SK] = torch.nonzero(masks_SN)[:, 1]
    return examples_SK, inside_SK


def _refuse_without_example(subsets: list[int]) -> None:
    if subsets:
        raise DataError(
            f"attention pooling: subset {subsets[0]} has no example, of which its pool would be a mean. Leave such subsets out, "
            "or draw larger ones."
        )
