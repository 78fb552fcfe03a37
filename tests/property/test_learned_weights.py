"""Weights do not depend on how rows are cut into blocks, queries into tiles and work into tasks, nor on whether C is kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import contributing
from tests.contributing import make_spec, make_store
from tests.learning import weights_of
from tests.runs import InSmallerTasks, InThisProcess

INVALID = (2, 9)
LEARNERS: list[dict[str, Any]] = [
    {},
    {"k": [2, 5], "weight_decay": [0.0, 1.0]},
    {"solver": "full_batch"},
    {"solver": "closed_form"},
    {"noise": 0.3},
    {"objective": "unnormalized", "start": "closed_form"},
]


def found(
    learner: dict[str, Any], *, block_rows: int = 8, tile: int = 5, mode: str = "tensor", smaller: bool = False
) -> np.ndarray:
    """Weights of the same features, whatever they are cut into."""
    store = make_store(invalid=INVALID, block_rows=block_rows)
    tables = {"contribute": {"mode": mode}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradstore.stages.contribute.artifacts.query_tile", lambda *_: tile)
        contributing.run(make_spec(store, **tables), InSmallerTasks() if smaller else InThisProcess())
        return weights_of(store, "learned", tables, **learner)[0]


@cache
def uncut(learner: int) -> np.ndarray:
    return found(LEARNERS[learner])


@settings(max_examples=8)
@given(
    learner=st.sampled_from(range(len(LEARNERS))),
    block_rows=st.integers(1, 23),
    tile=st.integers(1, 5),
    mode=st.sampled_from(["tensor", "streamed"]),
    smaller=st.booleans(),
)
def test_weights_are_the_same_however_work_is_cut(
    learner: int, block_rows: int, tile: int, mode: str, smaller: bool
) -> None:
    weights = found(LEARNERS[learner], block_rows=block_rows, tile=tile, mode=mode, smaller=smaller)

    np.testing.assert_allclose(weights, uncut(learner), rtol=1e-3)
