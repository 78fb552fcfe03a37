"""What a sketch finds of the exact answer, measured on the learn queries: how many candidates it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradstore.numerics.scores import Ranking
from gradstore.plan.sketch import MEASURED_QUERIES, MEASURED_ROWS, ladder
from gradstore.spec import RunSpec
from gradstore.stages.contribute.blocks import BlockBuilder
from gradstore.stages.contribute.queries import Slab, Target
from gradstore.stages.progress import Progress
from gradstore.stages.sketches import Sketch
from gradstore.stages.weights import UNWEIGHTED, learned_under, read_weights
from gradstore.store.alignment import aligned
from gradstore.store.artifacts import SketchArtifact
from gradstore.store.features import FeatureStore

_SET = "learn"


def measure_recall(spec: RunSpec, store: FeatureStore, artifact: SketchArtifact, progress: Progress) -> None:
    """Measure and commit the recall of a sketch against C of all rows, which are read once."""
    started = time.monotonic()
    run = spec.model_copy(update={"contribute": spec.contribute.model_copy(update={"mode": "tensor", "weights": None})})
    names = (None, *learned_under(store, spec.kernel.name))
    weightings = {name or UNWEIGHTED: read_weights(store, name) for name in names}
    queries = min(MEASURED_QUERIES, store.open_set(_SET).info.rows)
    slab = Slab(target=Target(kernel=spec.kernel.name, set_name=_SET), first=0, last=queries)
    exact = _exact(run, store, slab, (weightings, progress))
    sketch = Sketch(store=store, spec=run, artifact=artifact)
    measured: dict[str, Any] = {
        "set": _SET,
        "queries": queries,
        "rows": [k for k in MEASURED_ROWS if k <= artifact.shape.num_examples] or [artifact.shape.num_examples],
        "candidates": ladder(artifact.shape.num_examples),
    }
    measured["recall"] = _recall(sketch, slab, (weightings, exact), measured)
    artifact.write_recall(measured, facts={"seconds": time.monotonic() - started})


def _recall(
    sketch: Sketch,
    slab: Slab,
    found: tuple[Mapping[str, np.ndarray], Mapping[str, Ranking]],
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """By weighting, side and number of best rows: the share of these that each number of candidates has."""
    from gradstore.numerics.sketch import needed_candidates, recalls

    weightings, exact = found
    estimates_VQN = sketch.estimates(_SET, np.stack([*weightings.values()]))[:, : slab.queries]
    result: dict[str, Any] = {}
    for estimates_QN, (name, ranking) in zip(estimates_VQN, exact.items(), strict=True):
        sides = {"proponents": (ranking.proponents(), True), "opponents": (ranking.opponents(), False)}
        result[name] = {}
        for side, (ranked, largest) in sides.items():
            needed = needed_candidates(estimates_QN, ranked.rows, largest=largest)
            result[name][side] = {str(k): recalls(needed, k, measured["candidates"]) for k in measured["rows"]}
    return result


def _exact(
    spec: RunSpec, store: FeatureStore, slab: Slab, told: tuple[Mapping[str, np.ndarray], Progress]
) -> dict[str, Ranking]:
    """The best rows of all, by weighting."""
    weightings, progress = told
    builder = BlockBuilder(store, spec, [slab])
    keep = min(max(MEASURED_ROWS), builder.info.num_examples)
    rankings = {name: Ranking(num_queries=slab.queries, num_groups=builder.columns, k=keep) for name in weightings}
    buffer = aligned(builder.part_shape)
    with progress.stage(f"recall {spec.kernel.name}", builder.info.num_examples, "rows") as advance:
        for block, rows, c_QNM in builder.build(range(builder.info.num_blocks), lambda: buffer):
            start, _ = builder.info.block_range(block)
            valid_N = np.isfinite(c_QNM).all((0, 2))
            for name, ranking in rankings.items():
                ranking.update(
                    c_QNM[:, valid_N], weightings[name], np.arange(start + rows.start, start + rows.stop)[valid_N]
                )
            advance(rows.stop - rows.start)
    return rankings
