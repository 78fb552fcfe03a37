"""Ranking train rows for some queries by a sketch: candidates first, then exact scores of these alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from gradstore.numerics.scores import Ranking
from gradstore.stages.contribute.queries import Slab
from gradstore.stages.ranking import Ranker, Winners
from gradstore.stages.sketches import Candidates, Sketch, best_rows

# Of more of the rows than this share, reading all is no slower.
_MOST: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """How an answer was found through a sketch.

    Attributes
    ----------
    queries
        Learn queries that recall was measured on.
    candidates
        By weighting, how many rows were scored exactly, and how many of the best so many hold.
    """

    queries: int
    candidates: Mapping[str, Candidates]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"queries": self.queries, "candidates": {name: asdict(found) for name, found in self.candidates.items()}}


def rank_candidates(
    ranker: Ranker, sketch: Sketch, slab: Slab, keep: int
) -> tuple[dict[str, Winners], Screening] | None:
    """Return the winners of some preconditioned queries among their candidates, whose scores are exact.

    None where all rows are to be scored: no number of candidates was measured to hold the best ``keep`` as surely as was asked
    for, or they are too many of the rows.
    """
    counts = sketch.candidates_for(keep, ranker.weightings)
    if counts is None:
        return None
    rows = best_rows(sketch, slab, ranker.weightings, counts)
    if len(rows) > _MOST * sketch.artifact.shape.num_examples:
        return None
    groups = len(ranker.store.open_set("train").info.arrays)
    rankings = {
        name: Ranking(num_queries=slab.queries, num_groups=groups, k=keep, transform=ranker.transform)
        for name in ranker.weightings
    }
    for some, c_QNM in sketch.contributions(slab, rows):
        for name, ranking in rankings.items():
            ranking.update(c_QNM, ranker.weightings[name], some)
    winners = {
        name: Winners(proponents=ranking.proponents(), opponents=ranking.opponents())
        for name, ranking in rankings.items()
    }
    return winners, Screening(queries=sketch.recall["queries"], candidates=counts)
