"""The run that is looked at: its plan, its model, a few examples, and what several looks need of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import psutil

from gradstore.plan import Plan
from gradstore.spec import RunSpec
from gradstore.stages.doctor.exact import Comparison, ExactGradients
from gradstore.stages.doctor.measure import filled, seconds_of
from gradstore.stages.doctor.model import token_budget
from gradstore.stages.featurize.batches import compute
from gradstore.stages.loading import Loaded

if TYPE_CHECKING:
    from gradstore.numerics.projection import Matrices
    from gradstore.store.examples import Example

# Part of the free memory that exact gradients of several examples may take.
FREE_SHARE = 0.5


# Without slots: what several looks need is computed once.
@dataclass(frozen=True, kw_only=True, eq=False)
class Patient:
    """A run, and the examples of its train split that it is looked at through."""

    spec: RunSpec
    plan: Plan
    loaded: Loaded
    matrices: Matrices | None
    examples: Sequence[Example]

    @cached_property
    def invalid(self) -> dict[int, str]:
        """Examples whose loss or gradient is not finite, and what was found."""
        found: dict[int, str] = {}
        for computed in compute(self.loaded, self.examples, token_budget(self.spec), training=True):
            found |= computed.invalid
        return found

    @cached_property
    def sound(self) -> list[Example]:
        """The other examples."""
        return [example for row, example in enumerate(self.examples) if row not in self.invalid]

    @cached_property
    def batch(self) -> list[Example]:
        """One batch such as the run's are."""
        return filled(self.sound or self.examples, token_budget(self.spec))

    @cached_property
    def seconds(self) -> float:
        """Seconds that the features of that batch take."""
        return seconds_of(lambda: self.loaded.compute(self.batch, training=True), self.loaded.device)

    @cached_property
    def compared(self) -> list[Comparison]:
        """Gradients and features of the sound examples, as many as memory has room for."""
        seed = self.spec.run.seed
        exact = ExactGradients(self.loaded, self.plan.projection, seed=seed, matrices=self.matrices)
        room = max(1, int(psutil.virtual_memory().available * FREE_SHARE) // exact.bytes)
        return [exact.compare(example) for example in self.sound[:room]]
