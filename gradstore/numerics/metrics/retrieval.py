"""Recall@k, precision@k and the reciprocal rank: where a ranking puts the examples that are known to have contributed."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64

from gradstore.errors import DataError


class RankSearch:
    """Finds the ranks of some examples among all, whose scores stream by twice; nothing else of them is kept.

    The first time the scores of the wanted examples are taken, the second time the examples are counted that are ranked before
    each. The highest score has rank 1; of equal scores the example of the lower number comes first.

    Parameters
    ----------
    wanted
        Numbers of the wanted examples of each query, ascending; a query may have none.
    """

    def __init__(self, wanted: Sequence[Int64[np.ndarray, " _"]]) -> None:
        self._wanted = wanted
        self._scores = [np.full(len(rows), np.nan) for rows in wanted]
        self._before = [np.zeros(len(rows), np.int64) for rows in wanted]

    def find(self, scores_qn: Float[np.ndarray, "q n"], rows_n: Int64[np.ndarray, " n"], first: int = 0) -> None:
        """Take the scores of wanted examples among some, of ascending numbers, for some queries from the ``first`` on."""
        for query, scores_n in enumerate(scores_qn.astype(np.float64), start=first):
            wanted = self._wanted[query]
            places = np.searchsorted(rows_n, wanted)
            here = places < len(rows_n)
            here[here] = rows_n[places[here]] == wanted[here]
            self._scores[query][here] = scores_n[places[here]]

    def count(self, scores_qn: Float[np.ndarray, "q n"], rows_n: Int64[np.ndarray, " n"], first: int = 0) -> None:
        """Count those of some examples that are before the wanted ones; as `find`, and after all of it."""
        for query, scores_n in enumerate(scores_qn.astype(np.float64), start=first):
            ordered_n, scores, wanted = np.sort(scores_n), self._scores[query], self._wanted[query]
            above = len(ordered_n) - np.searchsorted(ordered_n, scores, side="right")
            equal = len(ordered_n) - np.searchsorted(ordered_n, scores, side="left") - above
            equal -= np.isin(wanted, rows_n)
            # Few scores are anybody else's.
            for place in np.flatnonzero(equal):
                equal[place] = np.count_nonzero((scores_n == scores[place]) & (rows_n < wanted[place]))
            self._before[query] += above + equal

    def ranks(self) -> list[Int64[np.ndarray, " _"]]:
        """Ranks of the wanted examples of each query, in the order of their numbers.

        Raises
        ------
        DataError
            If a wanted example was not among those that streamed by, or its score is no number.
        """
        for query, scores in enumerate(self._scores):
            if np.isnan(scores).any():
                missing = self._wanted[query][np.isnan(scores)].tolist()
                raise DataError(f"recall: query {query}: the examples {missing} have no score.")
        return [before + 1 for before in self._before]


def recall_at_k(ranks: Int64[np.ndarray, " _"], *, k: int) -> float:
    r"""Share of a query's known contributors that are among the first k: :math:`|\{r \le k\}| / R`.

    Raises
    ------
    DataError
        If the query has none.
    """
    _refuse_none(ranks)
    return float(np.mean(ranks <= k))


def precision_of_ranks(ranks: Int64[np.ndarray, " _"], *, k: int) -> float:
    r"""Share of the first k that are known contributors of the query: :math:`|\{r \le k\}| / k`.

    It is what arXiv 2506.05647, Table 6, calls Recall@10, where there are more contributors than k.

    Raises
    ------
    DataError
        If the query has none.
    """
    _refuse_none(ranks)
    return float(np.count_nonzero(ranks <= k) / k)


def reciprocal_rank(ranks: Int64[np.ndarray, " _"]) -> float:
    """Return 1 / r of the contributor that is ranked first; its mean over queries is the MRR.

    Raises
    ------
    DataError
        If the query has none.
    """
    _refuse_none(ranks)
    return 1 / int(ranks.min())


def _refuse_none(ranks: Int64[np.ndarray, " _"]) -> None:
    if len(ranks) == 0:
        raise DataError("recall: a query without known contributors has none. Leave it out.")
