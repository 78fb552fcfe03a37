"""[learn]: how weights are learned, and from which candidates they are chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, Literal

from pydantic import Field, model_validator

from gradstore.errors import SpecError
from gradstore.spec.quantities import parse_bytes
from gradstore.spec.section import NAME, Section

# Share of the learn queries that candidates are judged by, unless the run says how many.
HELD_OUT = 0.2
# Where a solver begins, unless the run says otherwise.
BEGINS_AT: Final[Mapping[str, Literal["random", "uniform"]]] = {
    "algorithm_1": "random",
    "full_batch": "uniform",
    "closed_form": "uniform",
}
# Objectives whose top rows a read of C can verify, and so those that the full-batch solver takes.
_VERIFIED = ("top", "unnormalized", "pairs")


class LearnSection(Section):
    """[learn]: what the loss is, what brings it down and where that begins, and how its weights are found.

    Lists of ``k`` and ``weight_decay`` and several ``restarts`` make candidates, each with each; the one is taken that does
    best on the learn queries that are held out. ``method`` and ``memory`` change no weights.
    """

    name: str = Field(default="learned", pattern=NAME)
    objective: Literal["top", "bottom", "gap", "unnormalized", "pairs"] = "top"
    pairs: str | None = Field(default=None, min_length=1)
    solver: Literal["algorithm_1", "full_batch", "closed_form"] = "algorithm_1"
    start: Literal["random", "uniform", "closed_form"] | None = None
    method: Literal["certified", "streamed"] = "certified"
    memory: str = "1GiB"
    k: int | list[int] = 10
    epochs: int = Field(default=10, ge=1)
    learning_rate: float = Field(default=0.01, gt=0)
    weight_decay: float | list[float] = 0.1
    restarts: int = Field(default=1, ge=1)
    held_out: float | None = Field(default=None, ge=0, lt=1)
    noise: float = Field(default=0.0, ge=0)
    seed: int | None = Field(default=None, ge=0, lt=2**63)

    @property
    def memory_bytes(self) -> int:
        """Most memory for the rows of C that certifying keeps."""
        return parse_bytes("learn.memory", self.memory)

    @property
    def ks(self) -> list[int]:
        """Every k that is asked for."""
        return self.k if isinstance(self.k, list) else [self.k]

    @property
    def weight_decays(self) -> list[float]:
        """Every weight decay that is asked for."""
        return self.weight_decay if isinstance(self.weight_decay, list) else [self.weight_decay]

    @property
    def num_candidates(self) -> int:
        """How many weight vectors are learned, of which one is taken."""
        return len(self.ks) * len(self.weight_decays) * self.restarts

    @property
    def share_held_out(self) -> float:
        """Share of the learn queries that candidates are judged by, and not learned from."""
        if self.held_out is not None:
            return self.held_out
        return HELD_OUT if self.num_candidates > 1 else 0.0

    @property
    def begins_at(self) -> Literal["random", "uniform", "closed_form"]:
        """Which weights the solver begins with."""
        return self.start or BEGINS_AT[self.solver]

    @model_validator(mode="after")
    def _check(self) -> LearnSection:
        parse_bytes("learn.memory", self.memory)
        for key, values, low in (("k", self.ks, 1), ("weight_decay", self.weight_decays, 0)):
            if not values or len({*values}) < len(values) or not all(low <= value < math.inf for value in values):
                raise SpecError(
                    f"learn.{key}: found {getattr(self, key)}; accepted: a number of at least {low}, or a list of different ones."
                )
        if self.num_candidates > 1 and self.held_out == 0:
            raise SpecError(
                f"learn.held_out: found 0 with {self.num_candidates} candidates (every k with every weight_decay, restarts times "
                "each), among which held-out queries choose; accepted: a share of the learn queries above 0, such as 0.2."
            )
        self._check_objective()
        self._check_solver()
        return self

    def _check_objective(self) -> None:
        if self.objective == "pairs" and self.pairs is None:
            raise SpecError(
                'learn.pairs: is missing; objective = "pairs" needs a .jsonl, .csv or .parquet file with the columns query and '
                "example: ids of learn queries, and of train examples that are to score best for them."
            )
        if self.objective != "pairs" and self.pairs is not None:
            raise SpecError(
                f'learn.pairs: found {self.pairs!r} with objective = "{self.objective}", which has no use for pairs. Set '
                'objective = "pairs", or leave learn.pairs out.'
            )
        if self.objective == "pairs" and len(self.ks) > 1:
            raise SpecError('learn.k: found a list with objective = "pairs", which raises given rows, not the top k.')

    def _check_solver(self) -> None:
        if self.solver == "algorithm_1":
            return
        if self.solver == "full_batch":
            refused: dict[str, str | Literal[False]] = {
                "objective": self.objective not in _VERIFIED and f"accepted: {', '.join(_VERIFIED)}",
                "method": self.method == "streamed" and "it reads C again only to verify. Leave it out",
                "restarts": self.restarts > 1 and self.begins_at != "random" and 'set start = "random" too',
            }
        else:
            refused = {
                "objective": self.objective != "top" and "accepted: top",
                "start": self.start is not None and "a formula begins nowhere. Leave it out",
                "restarts": self.restarts > 1 and "a formula draws nothing. Leave it out",
                "weight_decay": len(self.weight_decays) > 1 and "a formula has no weight decay. Leave it out",
            }
        for key, why in refused.items():
            if why:
                found = getattr(self, key)
                raise SpecError(f'learn.{key}: found {found!r} with solver = "{self.solver}": {why}.')
