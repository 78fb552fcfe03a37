"""Label precision: how many of the highest ranked examples are of the query's topic, which is not effect."""

from collections import Counter
from collections.abc import Sequence

from gradstore.errors import DataError, SpecError


def precision_at_k(ranked_labels: Sequence[str | None], label: str, *, k: int) -> float:
    """Share of the first k ranked training examples that carry the query's label.

    Parameters
    ----------
    ranked_labels
        Labels of the training examples, best first; None is the query's label for no query.
    label
        The query's label.
    k
        How many of the first are looked at.

    Raises
    ------
    SpecError
        If fewer than k are ranked.
    """
    if not 1 <= k <= len(ranked_labels):
        raise SpecError(f"precision at {k}: only {len(ranked_labels)} proponents are ranked. Raise score.k or lower k.")
    return sum(ranked == label for ranked in ranked_labels[:k]) / k


def chance_precision(train_labels: Sequence[str | None], query_labels: Sequence[str]) -> float:
    """Expected precision of a random ranking: each query's label's share of the training examples, mean over queries.

    Raises
    ------
    DataError
        If there is no training example or no query.
    """
    if not train_labels or not query_labels:
        raise DataError(f"chance precision of {len(query_labels)} queries among {len(train_labels)} training examples.")
    counts = Counter(train_labels)
    return sum(counts[label] for label in query_labels) / (len(train_labels) * len(query_labels))
