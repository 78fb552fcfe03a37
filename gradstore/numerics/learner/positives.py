"""Rows of C that are to score best for a query, because it is known that they belong to it (arXiv 2506.05647, table 10)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from gradstore.errors import SpecError
from gradstore.numerics.learner.settings import Objective


def given_positives(
    objectives: Sequence[Objective], positives: Sequence[Int64[np.ndarray, " _"]] | None, num_queries: int
) -> list[Int64[np.ndarray, " K"]] | None:
    """Rows that are to score best for each query, ascending and each once; None where the objective is another.

    Raises
    ------
    SpecError
        If there are none where some setting needs them, or some where none does.
    """
    needed = "pairs" in objectives
    if positives is None:
        if needed:
            raise SpecError(
                'learn.pairs: found none, for learn.objective = "pairs"; accepted: the pairs to learn from.'
            )
        return None
    if not needed:
        raise SpecError(
            f"learn.pairs: found pairs, for learn.objective = {objectives[0]!r}, which has no use for them; "
            'accepted: none, or learn.objective = "pairs".'
        )
    assert len(positives) == num_queries, f"positives of {len(positives)} queries, where there are {num_queries}"
    return [np.unique(rows_K) for rows_K in positives]


def refuse_missing(missing: Int64[np.ndarray, " _"], query: int) -> None:
    """Raise the error of positives that are not among the rows read, if there are any."""
    for row in missing[:1]:
        raise SpecError(
            f"learn.pairs: row {row}, a positive of query {query}, is not among the training rows that are valid. Leave "
            "out this pair."
        )
