"""The power of two that contributions to every query are divided by when they are stored in float16."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradstore.spec import RunSpec
from gradstore.stages.contribute.blocks import BlockBuilder
from gradstore.stages.contribute.queries import Slab, Target
from gradstore.store.alignment import aligned
from gradstore.store.dtypes import nearest_scale
from gradstore.store.features import FeatureStore

# Blocks that are looked at: the first, one of the middle and the last.
_LOOKED_AT = 3


def query_scales(store: FeatureStore, spec: RunSpec, slabs: Sequence[Sequence[Slab]]) -> dict[Target, np.ndarray]:
    """Scales, float32 [Q], of every target: they bring stored contributions near 1.

    The root mean square of C[q, n, j] over the rows of some blocks, in the group j in which it is largest, is stored as about
    1, which leaves a factor of 65504 above it.

    Parameters
    ----------
    store, spec
        The store and the run.
    slabs
        Queries of every pass.
    """
    last = store.open_set("train").info.num_blocks - 1
    blocks = sorted({last * place // (_LOOKED_AT - 1) for place in range(_LOOKED_AT)})
    found: dict[Target, list[np.ndarray]] = {}
    for of_pass in slabs:
        builder = BlockBuilder(store, spec, of_pass)
        buffer = aligned(builder.part_shape)
        squares_QM = np.zeros((builder.queries, builder.columns))
        count = 0
        for _, _, c_QNM in builder.build(blocks, lambda buffer=buffer: buffer):  # type: ignore[misc]
            valid_N = np.isfinite(c_QNM[0]).all(1)
            count += int(valid_N.sum())
            for query, c_NM in enumerate(c_QNM):
                squares_QM[query] += np.einsum("nm,nm->m", c_NM[valid_N], c_NM[valid_N], dtype=np.float64)
        typical_Q = np.sqrt(squares_QM.max(1) / max(count, 1))
        start = 0
        for slab in of_pass:
            found.setdefault(slab.target, []).append(typical_Q[start : start + slab.queries])
            start += slab.queries
    return {
        target: np.array([nearest_scale(typical) for typical in np.concatenate(parts).tolist()], np.float32)
        for target, parts in found.items()
    }
