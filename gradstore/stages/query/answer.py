"""Answers: which train examples score highest and lowest for a query, and through which layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from gradstore.numerics.scores import Ranked
from gradstore.stages.query.screened import Screening
from gradstore.stages.ranking import Winners
from gradstore.store.examples import REDACTED
from gradstore.store.features import FeatureSet

By = Literal["group", "depth", "function"]
BY: Final[tuple[By, ...]] = ("group", "depth", "function")

# Layers that an answer tells of an example.
LAYERS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One of the M parameter groups, and its place in the model."""

    name: str
    depth: int | None
    function: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Winner:
    """A train example that scores among the highest or the lowest.

    Attributes
    ----------
    row, example_id, label, text
        The example.
    score
        S[q, n].
    parts
        The part w_j C[q, n, j] of each of the M groups in the score; in DAS in what the score is the square of.
    """

    row: int
    example_id: str
    label: str | None
    text: str
    score: float
    parts: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """The examples of the highest scores, highest first, and those of the lowest, lowest first."""

    proponents: tuple[Winner, ...]
    opponents: tuple[Winner, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The train examples that a query ranks highest and lowest.

    Attributes
    ----------
    query, label, text
        Name of the query (query-1, or set and row), its label if it has one, and what of it the model saw.
    kernel
        Name of the kernel.
    rankings
        By the name of the weights; ``unweighted`` is that of equal weights.
    groups
        The groups, in the order of all parts.
    screening
        How candidates were found by a sketch; None where every row was scored.
    """

    query: str
    label: str | None
    text: str
    kernel: str
    rankings: Mapping[str, Ranking]
    groups: tuple[Group, ...]
    screening: Screening | None = None

    def layers(self, winner: Winner, by: By = "group", count: int = LAYERS) -> list[tuple[str | int | None, float]]:
        """Return the groups, depths or functions of the largest parts in absolute value, and these parts.

        Parts of one depth or function are summed over its groups; a group outside of the blocks of layers has no depth.
        """
        key: Callable[[Group], str | int | None] = {
            "group": lambda group: group.name,
            "depth": lambda group: group.depth,
            "function": lambda group: group.function,
        }[by]
        sums: dict[str | int | None, float] = {}
        for group, part in zip(self.groups, winner.parts, strict=True):
            sums[key(group)] = sums.get(key(group), 0.0) + part
        return sorted(sums.items(), key=lambda item: -abs(item[1]))[:count]

    def redacted(self) -> Answer:
        """Return the same answer without texts; ids and labels stay."""

        def of(winners: Sequence[Winner]) -> tuple[Winner, ...]:
            return tuple(replace(winner, text=REDACTED) for winner in winners)

        rankings = {
            name: Ranking(proponents=of(ranking.proponents), opponents=of(ranking.opponents))
            for name, ranking in self.rankings.items()
        }
        return replace(self, text=REDACTED, rankings=rankings)

    def to_json(self, layers: int = LAYERS) -> dict[str, Any]:
        """Plain values: of every example its score and its ``layers`` largest groups, depths and functions."""

        def of(winners: Sequence[Winner]) -> list[dict[str, Any]]:
            return [
                {
                    "rank": place,
                    "row": winner.row,
                    "example_id": winner.example_id,
                    "label": winner.label,
                    "text": winner.text,
                    "score": winner.score,
                    "layers": {
                        by: [{by: name, "part": part} for name, part in self.layers(winner, by, layers)] for by in BY
                    },
                }
                for place, winner in enumerate(winners, start=1)
            ]

        return {
            "query": self.query,
            "label": self.label,
            "text": self.text,
            "kernel": self.kernel,
            "sketch": None if self.screening is None else self.screening.to_json(),
            "rankings": {
                name: {"proponents": of(ranking.proponents), "opponents": of(ranking.opponents)}
                for name, ranking in self.rankings.items()
            },
        }


def rankings_of(train: FeatureSet, found: Mapping[str, Winners]) -> Iterator[dict[str, Ranking]]:
    """Yield, query by query, what was ranked, with the examples that the rows are of."""
    ranked = [side for winners in found.values() for side in (winners.proponents, winners.opponents)]
    examples = _examples(train, {int(row) for side in ranked for row in side.rows.reshape(-1)})
    for query in range(len(ranked[0].rows)):
        yield {
            name: Ranking(
                proponents=_winners(winners.proponents, query, examples),
                opponents=_winners(winners.opponents, query, examples),
            )
            for name, winners in found.items()
        }


def _winners(ranked: Ranked, query: int, examples: Mapping[int, Mapping[str, Any]]) -> tuple[Winner, ...]:
    of_query = zip(
        ranked.rows[query].tolist(), ranked.scores[query].tolist(), ranked.parts[query].tolist(), strict=True
    )
    return tuple(Winner(row=row, score=score, parts=tuple(parts), **examples[row]) for row, score, parts in of_query)


def _examples(train: FeatureSet, rows: Collection[int]) -> dict[int, Mapping[str, Any]]:
    """Id, label and text of some examples, by row."""
    block_rows, found = train.info.block_rows, {}
    for block in sorted({row // block_rows for row in rows}):
        table = train.read_inputs(block).select(["example_id", "label", "text"])
        wanted = sorted(row for row in rows if row // block_rows == block)
        for row, values in zip(wanted, table.take([row % block_rows for row in wanted]).to_pylist(), strict=True):
            found[row] = values
    return found
