"""What a sketch finds of the exact answer, measured on the learn queries: how many candidates it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstore.plan.sketch import MEASURED_QUERIES, MEASURED_ROWS, ladder
from gradstore.spec import RunSpec
from gradstore.stages.contribute.queries import Slab, Target
from gradstore.stages.progress import Progress
from gradstore.stages.ranking import Ranker, Winners, rank
from gradstore.stages.sketches import Sketch, digest_of
from gradstore.stages.weights import UNWEIGHTED, learned_under, read_weights
from gradstore.store.artifacts import SketchArtifact
from gradstore.store.features import BlockReader, FeatureStore

_SET = "learn"


def update_recall(spec: RunSpec, store: FeatureStore, artifact: SketchArtifact, progress: Progress) -> None:
    """Commit the recall of a sketch under the weights that the store has, and what is wanted of it.

    It is measured where it never was, or not under weights as they are now: against C of all rows, which are read once.
    """
    started = time.monotonic()
    names = (None, *learned_under(store, spec.kernel.name))
    weightings = {name or UNWEIGHTED: read_weights(store, name) for name in names}
    weights = {name: digest_of(weights_M) for name, weights_M in weightings.items()}
    wanted = {"candidates": spec.sketch.candidates, "recall": spec.sketch.recall}
    before = artifact.read_recall() if artifact.is_complete() else None
    measured = before if before is not None and weights.items() <= before["weights"].items() else None
    if measured is not None and measured["wanted"] == wanted:
        return
    if measured is None:
        measured = _measure(spec, store, artifact, weightings, progress)
    if before is not None:
        artifact.forget_recall("other weights, or another recall is wanted")
    facts = {"seconds": time.monotonic() - started}
    artifact.write_recall({**measured, "weights": weights, "wanted": wanted}, facts=facts)


def _measure(
    spec: RunSpec,
    store: FeatureStore,
    artifact: SketchArtifact,
    weightings: Mapping[str, np.ndarray],
    progress: Progress,
) -> dict[str, Any]:
    run = spec.model_copy(update={"contribute": spec.contribute.model_copy(update={"mode": "tensor", "weights": None})})
    queries, examples = min(MEASURED_QUERIES, store.open_set(_SET).info.rows), artifact.shape.num_examples
    slab = Slab(target=Target(kernel=spec.kernel.name, set_name=_SET), first=0, last=queries)
    ranker = Ranker(
        store=store,
        spec=run,
        weightings=weightings,
        transform="none",
        make_reader=BlockReader,
        progress=progress,
        stage=f"recall {spec.kernel.name}",
    )
    exact = rank(ranker, slab, min(max(MEASURED_ROWS), examples))
    best, tried = [k for k in MEASURED_ROWS if k <= examples] or [examples], ladder(examples)
    estimates_VQN = Sketch(store=store, spec=run, artifact=artifact).estimates(slab, np.stack([*weightings.values()]))
    found = {
        name: _shares(estimates_QN, exact[name], (best, tried))
        for name, estimates_QN in zip(weightings, estimates_VQN, strict=True)
    }
    return {"set": _SET, "queries": queries, "rows": best, "candidates": tried, "recall": found}


def _shares(
    estimates_QN: np.ndarray, exact: Winners, counts: tuple[Sequence[int], Sequence[int]]
) -> dict[str, dict[str, list[float]]]:
    """By side and number of best rows: the share of these that each number of candidates has."""
    from gradstore.numerics.sketch import needed_candidates, recalls

    best, tried = counts
    needed = {
        "proponents": needed_candidates(estimates_QN, exact.proponents.rows, largest=True),
        "opponents": needed_candidates(estimates_QN, exact.opponents.rows, largest=False),
    }
    return {side: {str(k): recalls(of_side, k, tried) for k in best} for side, of_side in needed.items()}
