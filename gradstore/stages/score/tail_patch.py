"""Tail-patch of the run's rankings: one optimizer step on a query's proponents, as tasks of one query each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from gradstore.adapters.models.optimizer import read_adam
from gradstore.cluster import Engine, Task
from gradstore.spec import RunSpec
from gradstore.stages.featurize.tables import MARGIN
from gradstore.stages.loading import load_for
from gradstore.stages.progress import Progress
from gradstore.stages.reading import examples_at
from gradstore.store.examples import Example
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradstore.numerics.metrics import AdamState

# Output functions f that are minus a log-probability, or tell one.
LOG_PROBABILITIES: Final = ("token_cross_entropy", "cross_entropy", MARGIN)


def tail_patches(
    spec: RunSpec,
    engine: Engine,
    progress: Progress,
    rankings: Mapping[str, Sequence[Sequence[int]]],
    queries: Sequence[int],
) -> dict[str, list[float]]:
    """Relative change, in percent, of the log-probability of some queries, by ranking.

    ``rankings`` holds, by name, the train rows of every query's proponents, best first.
    """
    step = spec.score.tail_patch
    tasks = []
    for query in queries:
        proponents = {name: [int(row) for row in rows[query][: step.k]] for name, rows in rankings.items()}
        arguments = (spec.run.store, spec.model_dump(), query, proponents, step.model_dump())
        name, resources = f"tail-patch-{query:04d}", spec.cluster.model_resources
        tasks.append(Task(name=name, function=patch_query, arguments=arguments, resources=resources))
    changes: dict[int, dict[str, float]] = {}
    with progress.stage("tail-patch", len(tasks), "queries") as advance:
        for task, found in engine.run(tasks):
            changes[task.arguments[2]] = found
            advance(1)
    return {name: [changes[query][name] for query in queries] for name in rankings}


def patch_query(
    store_url: str,
    run: Mapping[str, Any],
    query: int,
    proponents: Mapping[str, Sequence[int]],
    step: Mapping[str, Any],
) -> dict[str, float]:
    """Task: the tail-patch of one eval query under every ranking; ``step`` holds the values of a `StepSection`."""
    import torch

    from gradstore.numerics.metrics import tail_patch

    spec = RunSpec.model_validate(run)
    store = FeatureStore.open(store_url)
    loaded = load_for(store, spec)
    of_margin = store.contract["model"]["output"] == MARGIN
    train, evaluated = store.open_set("train"), store.open_set("eval")
    (example,) = examples_at(evaluated, [query])

    def outputs(model: nn.Module, examples: Sequence[Example]) -> Tensor:
        # The step may be in half precision like the features; what it changes is far below its rounding.
        found = loaded.outputs(model, examples, exactly=not torch.is_grad_enabled())
        # Training raises a margin m = log(p / (1 - p)) and lowers its loss -log p = log(1 + e^-m).
        return torch.nn.functional.softplus(-found) if of_margin else found

    kind = step["optimizer"]
    file = spec.model.of_member([*spec.model.etas][-1]).optimizer
    optimizer = _saved_state(loaded.model, str(file)) if kind == "saved" else kind
    return {
        name: tail_patch(
            loaded.model,
            outputs,
            example,
            examples_at(train, rows),
            optimizer=optimizer,
            learning_rate=step["learning_rate"],
        )
        for name, rows in proponents.items()
    }


@lru_cache(maxsize=1)
def _saved_state(model: nn.Module, file: str) -> dict[str, AdamState]:
    """By parameter, the state of the optimizer that is in a file; read once for a model that a worker keeps."""
    from gradstore.numerics.metrics import AdamState

    return {
        name: AdamState(settings=group, moments=moments) for name, (group, moments) in read_adam(file, model).items()
    }
