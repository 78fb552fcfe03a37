"""Settings of Algorithm 1."""

import math
from dataclasses import dataclass
from typing import Final, Literal

from gradstore.errors import SpecError
from gradstore.numerics.scores import Transform

Objective = Literal["top", "bottom", "gap", "unnormalized", "pairs"]
"""What Algorithm 1 minimises (arXiv 2506.05647, eq. 6 and table 10): see `learn_weights`."""

# Ends of the ranking whose rows an objective raises, as signs of their scores; pairs raise given rows.
ENDS: Final[dict[Objective, tuple[int, ...]]] = {
    "top": (1,),
    "bottom": (-1,),
    "gap": (1, -1),
    "unnormalized": (1,),
    "pairs": (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """Settings of Algorithm 1; the defaults are the paper's where it gives one.

    Attributes
    ----------
    k
        Number of best-scored rows whose mean score is raised; pairs have no use for it.
    epochs
        E: visits to every query.
    learning_rate
        Of AdamW, falling to 0 over E * Q visits along a cosine.
    weight_decay
        Decoupled, on w_raw.
    seed
        Of the initial w_raw and of the order of the visits.
    tile
        Queries that are stored together: each epoch permutes the tiles, then the queries inside each.
    transform
        What becomes of the scores S when rows are ranked in the end: where that is their square, |S| takes the place of S.
    objective
        What is minimised.
    start
        w to begin with, in place of random numbers: one for each group. Only ratios matter.
    """

    k: int = 10
    epochs: int = 10
    learning_rate: float = 0.01
    weight_decay: float = 0.1
    seed: int = 0
    tile: int = 1
    transform: Transform = "none"
    objective: Objective = "top"
    start: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, low in {"k": 1, "epochs": 1, "tile": 1, "weight_decay": 0}.items():
            if not low <= getattr(self, name) < math.inf:
                raise SpecError(f"learn.{name}: found {getattr(self, name)}; accepted: at least {low}, and finite.")
        if not 0 < self.learning_rate < math.inf:
            raise SpecError(f"learn.learning_rate: found {self.learning_rate}; accepted: above 0, and finite.")
        if self.transform == "square" and -1 in ENDS[self.objective]:
            raise SpecError(
                f"learn.objective: found {self.objective!r}, for scores that are squared in the end (DAS): they have no negative "
                'end. Accepted: "top", "unnormalized", "pairs".'
            )
        refuse_start(self.start)


def refuse_start(start: tuple[float, ...] | None) -> None:
    """Raise the error of weights that nothing can begin with."""
    if start is not None and not (all(0 <= weight < math.inf for weight in start) and any(start)):
        raise SpecError(
            "learn.start: found weights below 0, not finite, or all 0; accepted: at least 0, finite, and one above 0."
        )
