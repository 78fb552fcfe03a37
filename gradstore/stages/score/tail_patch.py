"""Tail-patch of the run's rankings: one optimizer step on a query's proponents, as tasks of one query each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gradstore.cluster import Engine, Task
from gradstore.spec import RunSpec
from gradstore.stages.featurize.tables import MARGIN
from gradstore.stages.loading import load_for
from gradstore.stages.progress import Progress
from gradstore.store.examples import Example, from_table
from gradstore.store.features import FeatureSet, FeatureStore

if TYPE_CHECKING:
    from torch import Tensor, nn

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
    patch = spec.score.tail_patch
    tasks = []
    for query in queries:
        proponents = {name: [int(row) for row in rows[query][: patch.k]] for name, rows in rankings.items()}
        arguments = (spec.run.store, spec.model_dump(), query, proponents)
        name, resources = f"tail-patch-{query:04d}", spec.cluster.model_resources
        tasks.append(Task(name=name, function=patch_query, arguments=arguments, resources=resources))
    changes: dict[int, dict[str, float]] = {}
    with progress.stage("tail-patch", len(tasks), "queries") as advance:
        for task, found in engine.run(tasks):
            changes[task.arguments[2]] = found
            advance(1)
    return {name: [changes[query][name] for query in queries] for name in rankings}


def patch_query(
    store_url: str, run: Mapping[str, Any], query: int, proponents: Mapping[str, Sequence[int]]
) -> dict[str, float]:
    """Task: the tail-patch of one eval query under every ranking."""
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

    patch = spec.score.tail_patch
    return {
        name: tail_patch(
            loaded.model,
            outputs,
            example,
            examples_at(train, rows),
            optimizer=patch.optimizer,
            learning_rate=patch.learning_rate,
        )
        for name, rows in proponents.items()
    }


def examples_at(feature_set: FeatureSet, rows: Sequence[int]) -> list[Example]:
    """The examples of some rows of a set, in that order."""
    block_rows = feature_set.info.block_rows
    blocks = {row // block_rows for row in rows}
    tables = {block: from_table(feature_set.read_inputs(block)) for block in blocks}
    return [tables[row // block_rows][row % block_rows] for row in rows]
