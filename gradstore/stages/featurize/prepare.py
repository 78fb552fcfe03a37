"""The task that looks at the model before a store is made: its hash, a token budget, and the scale of its features."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstore.errors import DataError, ResourceError
from gradstore.plan.sizes import AUTO_TOKEN_BUDGET
from gradstore.spec import RunSpec
from gradstore.stages.featurize.batches import batches, compute
from gradstore.stages.featurize.block import refuse_invalid
from gradstore.stages.loading import Loaded, load_first
from gradstore.store.dtypes import nearest_scale

if TYPE_CHECKING:
    from torch import Tensor

    from gradstore.store.examples import Example

# Largest distance, relative to a row's norm, that batch mates may move its features: rounding, of which bfloat16 has more.
INVARIANCE = {"float32": 1e-3, "bfloat16": 1e-1}
# The same of its features from those that plain autograd gives it in float32, a group that has less than a part of the whole
# gradient being measured against that part: rounding, of which a GPU's convolutions have more.
EXACTNESS = 1e-2
LEAST_PART = 1e-2
# A larger budget must be faster by this factor to be worth its memory, and may fill this part of a GPU.
WORTHWHILE = 1.05
DEVICE_SHARE = 0.8


def prepare(run: Mapping[str, Any], member: str, probe: Sequence[Example]) -> dict[str, Any]:
    """Task: return what identifies a member, the precision and token budget in use, and a scale per group.

    The scale is the power of two nearest to the root mean square of the group's features over the probe, so that stored
    values are near 1, the middle of float16's range.

    Raises
    ------
    DataError
        If too many examples of the probe are not finite, or an example's features are not its gradient's, or depend on its
        batch mates.
    """
    spec = RunSpec.model_validate(run)
    loaded = load_first(spec, member)
    asked = spec.features.token_budget
    budget = asked if asked != "auto" else _find_budget(loaded, probe)
    squares: dict[str, list[float]] = {}
    invalid: dict[int, str] = {}
    for found in compute(loaded, probe, budget, training=True):
        invalid |= found.invalid
        for name, rows in found.batch.features.items():
            squares.setdefault(name, []).extend(np.square(rows, dtype=np.float64).mean(1).tolist())
    refuse_invalid(probe, invalid, max(spec.features.max_invalid * len(probe), 1))
    sound = [example for row, example in enumerate(probe) if row not in invalid]
    refuse_inexact(loaded, sound[:1])
    # A budget of one token makes batches of one example.
    if budget > 1:
        refuse_mixing(loaded, sound[:2])
    return {
        "identity": loaded.identity(),
        "precision": loaded.precision,
        "token_budget": budget,
        "scales": {name: _scale(found) for name, found in squares.items()},
    }


def _scale(mean_squares: Sequence[float]) -> float:
    finite = [value for value in mean_squares if math.isfinite(value)]
    mean_square = math.fsum(finite) / max(len(finite), 1)
    return nearest_scale(math.sqrt(mean_square))


def refuse_inexact(loaded: Loaded, examples: Sequence[Example]) -> None:
    """Refuse a model some of whose parameters are used in a way that hooks in its layers do not see.

    Raises
    ------
    DataError
        Naming the first group in which an example's features are not those of the gradient that plain autograd computes.
    """
    for example in examples:

        def output(example: Example = example) -> Tensor:
            return loaded.outputs(loaded.model, [example], exactly=True)

        seen = loaded.extractor(output, examples=1, finished=False).features
        exact = loaded.extractor.by_autograd(output)
        rows = {name: [found[name].cpu().numpy() for found in (seen, exact)] for name in seen}
        norms = {name: float(np.linalg.norm(pair[1])) for name, pair in rows.items()}
        for name, (found, expected) in rows.items():
            distance = float(np.linalg.norm(found - expected))
            norm = max(norms[name], LEAST_PART * math.hypot(*norms.values()))
            if distance > EXACTNESS * norm:
                raise DataError(
                    f"{name}: the features of {example.example_id} differ from the gradient that autograd computes by "
                    f"{distance / norm:.1%}, so the model uses these parameters in a way that is not seen, such as a weight "
                    "that is read outside of its layer. Leave the module out with features.groups.exclude."
                )


def refuse_mixing(loaded: Loaded, pair: Sequence[Example]) -> None:
    """Refuse a model in which an example's gradient depends on what else is in its batch.

    Raises
    ------
    DataError
        Naming the first group in which the features of an example alone and beside another differ.
    """
    import torch

    if len(pair) < 2:
        return
    try:
        together = loaded.before_factors(pair)
    except torch.OutOfMemoryError:
        # Every batch will be of one example.
        return
    for row, example in enumerate(pair):
        for name, alone in loaded.before_factors([example]).items():
            both = together[name]
            distance = float(np.linalg.norm(both[row] - alone[0]))
            norm = max(float(np.linalg.norm(alone[0])), float(np.linalg.norm(both, axis=1).max()))
            if distance > INVARIANCE[loaded.precision] * norm:
                raise DataError(
                    f"{name}: the features of {example.example_id} alone and in a batch of {len(pair)} differ by "
                    f"{distance / norm:.1%}, so the model mixes the examples of a batch there. Leave the module out "
                    "with features.groups.exclude, or set features.token_budget = 1: batches of one example."
                )


def _find_budget(loaded: Loaded, probe: Sequence[Example]) -> int:
    """The token budget that the device likes: on a CPU one that fills its caches, on a GPU the fastest that fits."""
    import torch

    if loaded.device == "cpu":
        return AUTO_TOKEN_BUDGET
    best, best_rate, budget = AUTO_TOKEN_BUDGET, 0.0, AUTO_TOKEN_BUDGET
    while True:
        rows = _filled(probe, budget)
        torch.cuda.reset_peak_memory_stats()
        try:
            loaded.compute(rows)
            started = time.perf_counter()
            loaded.compute(rows)
        except torch.OutOfMemoryError as error:
            if best_rate == 0 and budget <= max(example.size for example in probe):
                raise ResourceError(
                    f"one example of {max(example.size for example in probe):,} tokens does not fit {loaded.device}. "
                    "Shorten data.length, lower the projection's rank, or use a larger device."
                ) from error
            if best_rate > 0:
                return best
            budget //= 2
            best = budget
            continue
        finally:
            torch.cuda.empty_cache()
        rate = sum(example.size for example in rows) / (time.perf_counter() - started)
        if rate < WORTHWHILE * best_rate:
            return best
        best, best_rate = budget, rate
        used = torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(loaded.device).total_memory
        if 2 * used > DEVICE_SHARE:
            return best
        budget *= 2


def _filled(probe: Sequence[Example], budget: int) -> list[Example]:
    """Examples of the probe, over and over, that fill one batch of the budget."""
    longest = max(probe, key=lambda example: example.size)
    first, *_ = batches([longest.size] * max(1, budget // longest.size), budget)
    return [longest] * len(first)
