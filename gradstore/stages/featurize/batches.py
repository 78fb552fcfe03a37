"""Examples in batches: cut by a budget of tokens, computed, and halved where a device runs out of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from gradstore.errors import ResourceError

if TYPE_CHECKING:
    from gradstore.stages.loading import Batch
    from gradstore.store.examples import Example


class Source(Protocol):
    """What computes the features of examples: a model as a worker holds it, or what stands for one."""

    @property
    def device(self) -> str:
        """Where it computes."""
        ...

    def compute(self, examples: Sequence[Example], *, training: bool = False, covariances: bool = False) -> Batch:
        """Outputs and features of one batch, and the covariances of its factors if asked for."""
        ...

    def facts(self) -> dict[str, object]:
        """What computed a block, for its record."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A batch of rows, what was computed of it, and why rows that are not finite are not: {row: what was found}."""

    rows: Sequence[int]
    batch: Batch
    invalid: dict[int, str]


def batches(sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cut rows into batches of similar length with at most ``token_budget`` tokens, pads counted.

    They depend on the sizes of these rows alone, so a block is cut in the same way whoever computes it; a row longer than
    the budget is a batch of its own.
    """
    cut: list[list[int]] = []
    # Longest first: the first batch shows whether the budget fits the memory.
    for index in sorted(range(len(sizes)), key=lambda row: (-sizes[row], row)):
        if cut and (len(cut[-1]) + 1) * sizes[cut[-1][0]] <= token_budget:
            cut[-1].append(index)
        else:
            cut.append([index])
    return cut


def compute(
    loaded: Source, examples: Sequence[Example], token_budget: int, *, training: bool = False, covariances: bool = False
) -> Iterator[Computed]:
    """Compute the features of some examples, batch by batch; ``training`` says whether they are those of the train set.

    A row whose output or gradient is not finite is told apart, and the rows beside it are computed once more without it, so
    that sums over a batch hold valid rows only. A batch that a GPU has no memory for is halved; a batch of one is not.

    Raises
    ------
    ResourceError
        If one example alone does not fit the device.
    """
    waiting = batches([example.size for example in examples], token_budget)
    waiting.reverse()
    while waiting:
        rows = waiting.pop()
        batch = _within_memory(loaded, [examples[row] for row in rows], training=training, covariances=covariances)
        if batch is None:
            half = len(rows) // 2
            waiting += [rows[half:], rows[:half]]
            continue
        invalid = {rows[place]: what for place, what in _not_finite(batch).items()}
        if invalid and len(rows) > 1:
            valid = [row for row in rows if row not in invalid]
            waiting += [[row] for row in invalid] + ([valid] if valid else [])
            continue
        yield Computed(rows=rows, batch=batch, invalid=invalid)


def _within_memory(loaded: Source, examples: Sequence[Example], *, training: bool, covariances: bool) -> Batch | None:
    """What was computed of a batch, or None if the device has no memory for it but may have for half of it."""
    import torch

    try:
        return loaded.compute(examples, training=training, covariances=covariances)
    except torch.OutOfMemoryError as error:
        if len(examples) == 1:
            raise ResourceError(
                f"{examples[0].example_id}: one example of {examples[0].size:,} tokens does not fit {loaded.device}: "
                f"{error}. Shorten data.length, lower the projection's rank, or use a larger device."
            ) from error
    # Outside of the handler, which holds on to the failed pass and all of its tensors.
    torch.cuda.empty_cache()
    return None


def _not_finite(batch: Batch) -> dict[int, str]:
    """Rows of a batch whose output, residual or features are not finite, and what was found."""
    found: dict[int, str] = {}
    numbers = {"loss": batch.outputs} | ({} if batch.residuals is None else {"residual": batch.residuals})
    for what, values in numbers.items():
        for row in np.flatnonzero(~np.isfinite(values)).tolist():
            found.setdefault(row, f"its {what} is {values[row]}")
    for name, features in batch.features.items():
        for row in np.flatnonzero(~np.isfinite(features).all(1)).tolist():
            found.setdefault(row, f"its gradient in group {name} is not finite")
    return found
