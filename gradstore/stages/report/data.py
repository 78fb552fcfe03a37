"""What a report shows, as plain values: filled from the store by the stage, drawn by `page` and `terminal`.

Nothing here is formatted or escaped; every text may come from a stranger's corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from gradstore.store.features import FeatureArray

Side = Literal["proponent", "opponent"]
Verdict = Literal["better", "worse", "unknown"]

# With fewer, chance alone lets all of them agree in more than one case of twenty: 2^(1 - n) > 0.05.
LEAST_QUERIES: Final = 6

TAIL_PATCH: Final = ("Tail-patch", "% change of the log-probability of a query after one step on its proponents")
"""What it is called, and what it says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One of the M parameter groups, with what a reader knows it by.

    Attributes
    ----------
    name
        The group's name in the store.
    depth
        Index of its block of layers, or None outside of them.
    function
        What it does inside its block, such as ``mlp.up_proj``.
    """

    name: str
    depth: int | None
    function: str


def groups_of(arrays: Iterable[FeatureArray]) -> list[Group]:
    """Return the groups of a set's arrays, in the order of the model."""
    return [Group(name=array.name, depth=array.depth, function=array.function) for array in arrays]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightVector:
    """One learned w: M weights in the order of the groups, each >= 0, with sum 1."""

    name: str
    weights: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedExample:
    """A training example at its rank among the proponents or the opponents of one query.

    Attributes
    ----------
    side
        ``proponent``: among the highest scores; ``opponent``: among the lowest.
    rank
        From 1, the most extreme score of its side.
    score
        S[q, n], the sum of ``parts``.
    parts
        The part w_j C[q, n, j] of each of the M groups in the score.
    image
        Address of the example's picture, where there is one.
    """

    side: Side
    rank: int
    example_id: str
    label: str | None
    text: str
    score: float
    parts: Sequence[float]
    image: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryReport:
    """A query, and what each ranking holds for it: by `UNWEIGHTED` or by the name of a weight vector."""

    query_id: str
    label: str | None
    text: str
    rankings: Mapping[str, Sequence[RankedExample]]
    image: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionRow:
    """Share of a method's top k that have the query's label, mean over queries; and of all examples (chance)."""

    method: str
    precision: float
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRow:
    """What a method is worth by a measure: mean over queries and 95 % interval.

    ``difference`` is that to no weights under the same kernel, paired: mean and interval.
    """

    method: str
    mean: float
    ci_low: float
    ci_high: float
    queries: int
    difference: tuple[float, float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredTable:
    """An evaluation by one measure: what it is called, what it says, its methods, and what values are of."""

    title: str
    about: str
    rows: Sequence[MeasuredRow]
    noun: str = "queries"


def tail_patch_table(rows: Sequence[MeasuredRow]) -> MeasuredTable:
    """What `score` measured of tail-patch, as a table."""
    title, about = TAIL_PATCH
    return MeasuredTable(title=title, about=about, rows=rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What weights change in a measure: the mean over queries of its difference to no weights, and the 95 % interval.

    Attributes
    ----------
    measure, weights
        What was measured, larger being better, and the name of the weights.
    queries
        How many queries were measured both ways.
    """

    measure: str
    weights: str
    difference: float
    ci_low: float
    ci_high: float
    queries: int

    @property
    def verdict(self) -> Verdict:
        """Whether the interval lies above or below zero, and is of enough queries to say so."""
        if self.queries < LEAST_QUERIES or not (self.ci_low > 0 or self.ci_high < 0):
            return "unknown"
        return "better" if self.ci_low > 0 else "worse"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything that a report shows.

    Attributes
    ----------
    name
        The run's name.
    facts
        (label, value) of what a reader must know to trust or repeat the run, the most important first.
    groups
        The M groups, in the order of every weight vector and of all parts.
    weights
        Learned weight vectors; empty where none was learned.
    queries
        The queries, in the order in which they are shown.
    precision, precision_k
        Label precision@k by method; empty where the data has no labels.
    tail_patch
        Tail-patch by method; empty where it was not measured.
    comparisons
        Every weighting beside no weights, in every measure that both have; empty where none was learned.
    notes
        What the figures do not show, a sentence each.
    evaluations
        What `gradstore evaluate` measured, a table for each measure.
    pictures
        (what it shows, PNG) of each picture of what was measured by retraining.
    """

    name: str
    facts: Sequence[tuple[str, str]]
    groups: Sequence[Group]
    weights: Sequence[WeightVector]
    queries: Sequence[QueryReport]
    precision: Sequence[PrecisionRow] = ()
    precision_k: int = 10
    tail_patch: Sequence[MeasuredRow] = ()
    comparisons: Sequence[Comparison] = ()
    notes: Sequence[str] = ()
    evaluations: Sequence[MeasuredTable] = ()
    pictures: Sequence[tuple[str, bytes]] = ()

    def __post_init__(self) -> None:
        num_groups = len(self.groups)
        for vector in self.weights:
            assert len(vector.weights) == num_groups, (
                f"{vector.name}: {len(vector.weights)} weights, {num_groups} groups"
            )
        for query in self.queries:
            for ranking, ranked in query.rankings.items():
                for example in ranked:
                    assert len(example.parts) == num_groups, (
                        f"{query.query_id}, {ranking}, {example.example_id}: {len(example.parts)} parts, {num_groups} groups"
                    )
