"""What sets of train rows do to the eval queries, pooled by attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstore.errors import SpecError
from gradstore.stages.influence.totals import Asked, Influence, scores_on_queries
from gradstore.store.features import FeatureStore


def pooled(
    store: FeatureStore, asked: Asked, named: Mapping[str | None, Sequence[int]], *, sharpness: float
) -> tuple[Influence, dict[str | None, dict[str, Any]]]:
    """What was asked of, and of every set with a valid row f(q, S): its sum and mean over the queries, and how many are above 0.

    Raises
    ------
    SpecError
        If no set has a valid row.
    """
    from gradstore.numerics.representation import AttentionPools

    kernel, counted_Q, rows_N, scores = scores_on_queries(store, asked)
    masks = np.zeros((len(named), store.open_set("train").info.rows), bool)
    for mask, rows in zip(masks, named.values(), strict=True):
        mask[list(rows)] = True
    masks[:, np.setdiff1d(np.arange(masks.shape[1]), rows_N)] = False
    kept = np.asarray(masks.any(1))
    if not kept.any():
        raise SpecError(f"{store.storage.url}: none of the rows that are asked for has valid features. Choose others.")
    pools = AttentionPools(masks[kept], len(counted_Q), sharpness=sharpness)
    for first, place_N, s_QN in scores:
        pools.add(s_QN, place_N, first)
    of_queries = pools.pools()[counted_Q]
    influence = Influence(
        store=store, kernel=kernel, asked=asked, queries=int(counted_Q.sum()), rows=rows_N, totals=np.empty(0)
    )
    names = [name for name, is_kept in zip(named, kept, strict=True) if is_kept]
    return influence, {
        name: {
            "rows": int(mask.sum()),
            "sum": float(column.sum()),
            "mean": float(column.mean()),
            "positive": float((column > 0).mean()),
        }
        for name, mask, column in zip(names, masks[kept], of_queries.T, strict=True)
    }
