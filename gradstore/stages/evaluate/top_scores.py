"""The highest scores that train examples have as queries: of themselves and of others, by a reading of all features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np

from gradstore.cluster import Engine
from gradstore.cluster.here import Here
from gradstore.spec import RunSpec
from gradstore.stages.contribute.queries import Slab, Target
from gradstore.stages.contribute.rows import prepare_rows, score_transform
from gradstore.stages.evaluate.over import over_store
from gradstore.stages.progress import Progress
from gradstore.stages.query.asked import copy_rows, precondition
from gradstore.stages.ranking import QUERY_BYTES, Ranker, query_bytes, rank
from gradstore.stages.score.sources import Method
from gradstore.stages.spectra import KeptSpectra
from gradstore.stages.weights import read_weights
from gradstore.store.features import BlockReader, FeatureStore, Room


def top_means(
    spec: RunSpec, methods: Sequence[Method], rows: np.ndarray, top: int, progress: Progress
) -> dict[Method, np.ndarray]:
    """Mean of the ``top`` highest scores [n] that some train rows have as queries, by methods of the run's kernel.

    The rows are queries over the store, in memory, as many in a reading of the features as memory takes.
    """
    base = FeatureStore.open(spec.run.store)
    train = base.open_set("train").info
    weightings = {method.name: read_weights(base, method.weights) for method in methods}
    transform = score_transform(str(base.contract["model"].get("output")))
    at_once = max(1, QUERY_BYTES // query_bytes(train))
    found: dict[Method, list[np.ndarray]] = {method: [] for method in methods}
    for first in range(0, len(rows), at_once):
        some = rows[first : first + at_once].tolist()
        with over_store(spec) as (over, store):
            prepare_rows(over, cast(Engine, Here()), progress)
            name = copy_rows(store, "train", some)
            precondition(store, over, name, KeptSpectra(Room(0)))
            ranker = Ranker(
                store=store,
                spec=over,
                weightings=weightings,
                transform=transform,
                make_reader=BlockReader,
                progress=progress,
                stage="top scores",
            )
            slab = Slab(target=Target(kernel=spec.kernel.name, set_name=name), first=0, last=len(some))
            winners = rank(ranker, slab, min(top, train.num_examples))
        for method in methods:
            found[method].append(winners[method.name].proponents.scores.mean(1))
    return {method: np.concatenate(parts) for method, parts in found.items()}
